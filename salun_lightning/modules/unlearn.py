"""Any method for classifiers, in a LightningModule of another project."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import nn
from torch.utils.data import DataLoader
from typing_extensions import override

from salun_lightning.data import ForgetRetainDataModule, Order, Samples
from salun_lightning.methods.base import Method, all_of
from salun_lightning.methods.one_shot import OneShot
from salun_lightning.modules.base import UnlearningModule
from salun_lightning.modules.classifier import ImageClassifier
from salun_lightning.modules.record import KEY, check_resumed, what_was_run
from salun_lightning.weights import fingerprint

_MISSING = object()


class Unlearn(Callback):
    """Makes a LightningModule of another project forget by a method of this library.

    Its ``forward`` maps images to logits, see ``logits_of``. While it is fitted with a ``ForgetRetainDataModule``, the method's
    loss takes the place of its ``training_step``; optimizers (except for edits, which are one plain step), logging and
    validation stay its own. A validation batch has the form of its data, {input_key: images, target_key: classes} or a pair,
    and is of the set ``val`` alone. The method and its hooks see a :class:`ForeignClassifier` around the module. With
    ``SaliencyMasking`` the saliency is that of the true labels. After the fit, the module is as it was, but for its weights.

    The original model is what the module holds when the fit starts, also if a run is resumed: load its weights before.

    Args:
        method: How it forgets.

    Raises:
        MisconfigurationException: The module has a method of its own, optimizes manually, or comes without a
            ``ForgetRetainDataModule``; or the run that is resumed had another method, seed or original model.

    Example:
        >>> from salun_lightning.methods import RandomLabel
        >>> trainer = Trainer(callbacks=[Unlearn(RandomLabel())], logger=False, enable_checkpointing=False)
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self._view: ForeignClassifier | None = None
        self._made_by: dict[str, Any] = {}
        self._before: list[tuple[Any, str, Any]] = []

    @property
    def order(self) -> Order:
        """The order of training batches that the method was published with."""
        return self.method.order

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        check(pl_module, data)
        # behind SaliencyMasking: what a method writes when training starts is no original weight
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        last = [callback for callback in others if isinstance(callback, Checkpoint)]
        trainer.callbacks = [*(one for one in others if one not in last), self, *last]  # type: ignore[attr-defined]
        view = self._view = ForeignClassifier(pl_module, method=self.method)
        view.trainer = trainer
        view.setup(stage)
        refers = any(method.needs_original for method in all_of(self.method))
        original = fingerprint(pl_module.state_dict().items()) if refers else None
        self._made_by = {**what_was_run(self.method), "original": original}
        self._stand_in(
            pl_module, training_step=lambda batch, batch_idx: view.training_step(batch), forget_loss=view.forget_loss
        )
        self._stand_in(data, val_dataloader=partial(_validation, data))
        if isinstance(self.method, OneShot):
            weights = [weight for weight in pl_module.parameters() if weight.requires_grad]
            self._stand_in(pl_module, configure_optimizers=lambda: torch.optim.SGD(weights, lr=1.0))
        for method in all_of(self.method):
            method.setup(trainer, view, stage)

    def _stand_in(self, holder: Any, **methods: Callable[..., Any]) -> None:
        self._before += [(holder, name, vars(holder).get(name, _MISSING)) for name in methods]
        vars(holder).update(methods)

    def _put_back(self) -> None:
        for holder, name, value in reversed(self._before):
            del vars(holder)[name]
            if value is not _MISSING:
                vars(holder)[name] = value
        self._before, self._view = [], None

    @override
    def state_dict(self) -> dict[str, Any]:
        states = {method.state_key: method.state_dict() for method in all_of(self.method)}
        return {KEY: self._made_by, "states": states}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        made_by = state_dict.get(KEY, {})
        if "original" not in made_by:
            raise MisconfigurationException(
                "The checkpoint does not say which model its run started from, so that cannot go on. Start a new run."
            )
        check_resumed(made_by, self.method)
        if self._made_by["original"] != made_by["original"]:
            raise MisconfigurationException(
                "The module does not hold the original model that the resumed run started from. Load that before the fit."
            )
        for method in all_of(self.method):
            method.load_state_dict(state_dict["states"][method.state_key])


class ForeignClassifier(ImageClassifier):
    """What a method sees of a LightningModule of another project, which is its network."""

    def __init__(self, module: LightningModule, method: Method) -> None:
        super().__init__(
            module, channels_last=any(_lies_channels_last(weight) for weight in module.parameters()), method=method
        )

    @override
    def log(self, *args: Any, **kwargs: Any) -> None:
        self.network.log(*args, **kwargs)  # type: ignore[operator]  # to which the trainer listens

    @override
    def on_fit_start(self) -> None:
        if self._reference is not None:
            self.trainer.strategy.precision_plugin.convert_module(self._reference)
        self.to(self.network.device)
        super().on_fit_start()


def check(module: LightningModule, data: Any) -> None:
    """Refuse what no method can be put into.

    Raises:
        MisconfigurationException: See ``Unlearn``.
    """
    name = type(module).__name__
    if isinstance(module, UnlearningModule):
        raise MisconfigurationException(f"{name} has a method of its own. Give it the method, and leave Unlearn out.")
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"{name} optimizes manually, so a method cannot take the place of its loss. Train its network in an"
            " ImageClassifier."
        )
    if not isinstance(data, ForgetRetainDataModule):
        raise MisconfigurationException(
            "Unlearn needs to know what is to be forgotten. Fit with datamodule=ForgetRetainDataModule(...)."
        )


def _lies_channels_last(weight: nn.Parameter) -> bool:
    return weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def _validation(data: ForgetRetainDataModule) -> list[DataLoader[Any]]:
    loaders = [loader for name, loader in type(data).val_dataloader(data).items() if name == "val"]
    for loader in loaders:
        loader.collate_fn = partial(_as_theirs, data.keys)
    return loaders


def _as_theirs(keys: tuple[int | str, int | str], samples: Samples) -> Any:
    """A batch in the form of their data."""
    return dict(zip(keys, samples, strict=False)) if isinstance(keys[0], str) else (samples.inputs, samples.targets)


def _passed_on(name: str) -> Callable[..., None]:
    """A hook that calls the method's with the view in the place of the module."""

    def hook(self: Unlearn, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        if self._view is None:
            return
        if name == "on_fit_start":  # the original network comes to its device
            self._view.on_fit_start()
        for method in all_of(self.method):
            getattr(method, name)(trainer, self._view, *args, **kwargs)
        if name in ("on_train_epoch_start", "on_before_optimizer_step", "on_train_epoch_end"):
            getattr(self._view, name)(*args)
        if name in ("on_exception", "teardown"):
            self._put_back()

    return hook


for _name in vars(Callback):
    if _name.startswith("on_") or _name == "teardown":
        setattr(Unlearn, _name, _passed_on(_name))
