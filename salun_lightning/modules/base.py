"""What the LightningModules for all kinds of models share."""

import os
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Literal, Self

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from salun_lightning.data import ForgetRetainDataModule, Order, Samples, epoch_seed, run_seed, split
from salun_lightning.methods.base import Kind, Method, all_of, check_kind
from salun_lightning.methods.finetune import FineTune
from salun_lightning.modules.record import KEY, arguments_from, check_resumed, made_from, record_of
from salun_lightning.modules.trouble import EpochLoss, batch_norm_explained, check_cycle
from salun_lightning.networks.frozen import Frozen
from salun_lightning.networks.loading import load_weights, read_checkpoint
from salun_lightning.weights import local_of, train_only, weights_of

SETS = ("forget", "retain", "val", "test", "test_forget")


class UnlearningModule(LightningModule, ABC):
    """A network that is trained by a method: one module for the original, the retrained and the unlearned model.

    Every epoch starts from random numbers that depend on the seed, the epoch and the rank alone, so that a run resumed at the
    end of an epoch goes on as if it had never stopped.

    Args:
        network: The network.
        method: How it is trained: ``FineTune`` for the original and the retrained model, else a method of forgetting.
        original: The original model to start from: a checkpoint or state_dict, also of another project, or a pipeline of
            diffusers. None starts from the network as it is. To resume or test a run use Lightning's ``ckpt_path``, which also
            restores the optimizer and the epoch, and takes precedence.
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the learning-rate scheduler from the optimizer.
        lr_interval: Whether the scheduler steps each epoch or each optimizer step.
        trainable: Which weights are trained, and so covered by a mask: a regular expression that is searched in their plain
            names, such as ``^layer4``; or ``xattn``, ``xattn-strict``, ``noxattn``, ``selfattn`` or ``full`` of a UNet of
            diffusers. None for all of the network.

    Raises:
        ValueError: The method is not for this kind of model, or no weight is trained.
    """

    kind: Kind = "any"  # of model; methods may be for one kind only
    pretrained = False  # whether the network comes with the weights of an original model

    def __init__(
        self,
        network: nn.Module,
        method: Method | None = None,
        original: str | os.PathLike[str] | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=5e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        trainable: str | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.method = FineTune() if method is None else method
        check_kind(self.method, self)
        train_only(network, trainable)
        self.original = original
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        self._started = False
        self._reference: Frozen | None = None

    @abstractmethod
    def losses(self, samples: Samples) -> Tensor:
        """The ordinary training loss of each sample, (B,)."""

    def task_loss(self, samples: Samples) -> Tensor:
        """The ordinary training loss, as a mean over the samples; a scalar."""
        return self.losses(samples).mean()

    def unlearned_loss(self, samples: Samples) -> Tensor:
        """The task loss of what a method unlearns, of the very targets of the samples; by default the task loss."""
        return self.task_loss(samples)

    def forget_loss(self, samples: Samples) -> Tensor:
        """The loss whose gradient over the forget set is the saliency: by default the task loss (its sign does not matter)."""
        return self.task_loss(samples)

    @property
    def order(self) -> Order:
        """The order of training batches that the method was published with."""
        return self.method.order

    @property
    def datamodule(self) -> Any:
        """The datamodule that is trained or tested with."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @property
    def num_classes(self) -> int:
        """The number of classes, as the datamodule has it."""
        return _num_classes(self.datamodule)

    @override
    def configure_callbacks(self) -> list[Callback]:
        """Attach the method and those that it is made of, so that Lightning calls their hooks."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        callbacks[:] = [callback for callback in callbacks if not isinstance(callback, Method)]  # of a module trained before
        return [*all_of(self.method)]

    @override
    def setup(self, stage: str) -> None:
        if stage != "fit":  # it is not known yet whether a checkpoint will be loaded
            return
        used = self._started  # the network may hold other weights, of training or of a test before
        self._load_original()  # before the strategy wraps or shards the network; a resumed run restores its own weights later
        if any(method.needs_original for method in all_of(self.method)):
            self._reference = Frozen(deepcopy(self.network))
            if used and self.original is not None:
                load_weights(self.reference, read_checkpoint(self.original))

    def _load_original(self) -> None:
        """Load the original model, unless training or a checkpoint has already put other weights in place."""
        if self.original is None or self._started:
            return
        checkpoint = read_checkpoint(self.original)
        check_training_set(checkpoint, self.datamodule)
        self.check_original(checkpoint)
        load_weights(self.network, checkpoint)
        self._started = True

    def check_original(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse a checkpoint, as ``read_checkpoint`` returned it, of a model that does not fit: original or resumed."""

    @property
    def reference(self) -> nn.Module:
        """The original network: a frozen copy in eval mode, kept while training by a method that needs it.

        Raises:
            MisconfigurationException: The method does not, or nothing is trained.
        """
        if self._reference is None:
            raise MisconfigurationException("There is no original model to refer to: only for methods with needs_original.")
        return self._reference.network

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = record_of(self, self.method)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            check_resumed(checkpoint.get(KEY, {}), self.method)
        self.check_original(checkpoint)
        self._started = True

    @classmethod
    @override
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Make the module that a checkpoint is of, with its weights. No pickle is executed.

        Args:
            checkpoint_path: The file. That of a run from a configuration needs nothing else.
            *args: See ``LightningModule.load_from_checkpoint``.
            **kwargs: Likewise, and arguments of the module; ``network`` or ``pipeline``, if it does not say how that was made.
        """
        checkpoint = read_checkpoint(checkpoint_path)  # always: it refuses a pickle in a sentence
        if made_from(cls) not in kwargs:
            kwargs = {**arguments_from(cls, checkpoint), **kwargs}
        return super().load_from_checkpoint(checkpoint_path, *args, **{**kwargs, "weights_only": True})

    def check_network(self) -> None:  # which depends on the kind of model
        """Refuse a network that does not fit the data, before anything is spent on it."""

    @override
    def on_fit_start(self) -> None:
        self._epoch_loss = EpochLoss()
        self.check_network()

    @override
    def on_validation_start(self) -> None:
        if self.trainer.state.fn != TrainerFn.FITTING:
            self._start_evaluation()

    def _start_evaluation(self) -> None:
        if self.original is not None and not self._started:
            warn_of_original(self.original)
        self._load_original()
        self.check_network()

    on_test_start = on_predict_start = _start_evaluation

    @override
    def on_fit_end(self) -> None:
        self._reference = None

    @override
    def on_train_epoch_start(self) -> None:
        seed_all(epoch_seed(run_seed(), self.current_epoch, self.global_rank))

    @override
    def training_step(self, batch: Mapping[str, Samples]) -> Tensor:
        sizes = {name: len(part.targets) for name, part in batch.items()}
        with batch_norm_explained(sizes):
            loss = self.method.loss(self, batch)
        if loss is None:  # several processes must not return None, and each weight needs a gradient
            return 0 * torch.stack([local_of(weight).sum() for weight in weights_of(self).values()]).sum()
        self._epoch_loss.add(loss, sum(sizes.values()))
        return loss

    @override
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._epoch_loss.none_new():  # all batches were passed over; without a gradient, momentum moves nothing either
            optimizer.zero_grad()

    @override
    def on_train_epoch_end(self) -> None:
        self._epoch_loss.report(self)

    @override
    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(parameter for parameter in self.parameters() if parameter.requires_grad)
        make = self.make_lr_scheduler
        return optimizer if make is None else {"optimizer": optimizer, "lr_scheduler": _schedule(self, make(optimizer))}


def _num_classes(data: Any) -> int:
    if not hasattr(data, "num_classes"):
        raise MisconfigurationException("The number of classes is not known: give the datamodule an attribute num_classes.")
    return int(data.num_classes)


def _schedule(module: UnlearningModule, scheduler: Any) -> dict[str, Any]:
    """What Lightning is told of a learning-rate scheduler; its ReduceLROnPlateau has a monitor."""
    trainer: Any = module._trainer
    if module.lr_interval == "epoch" and trainer is not None and not trainer.fast_dev_run:
        check_cycle(scheduler, trainer.max_epochs)
    return {"scheduler": scheduler, "interval": module.lr_interval, "monitor": getattr(scheduler, "monitor", None)}


def warn_of_original(original: str | os.PathLike[str]) -> None:
    """Say that it is the original model that is evaluated, which may have been meant otherwise."""
    rank_zero_warn(
        f"Nothing was trained or loaded, so the original model '{original}' is evaluated. For another, give its checkpoint as"
        " ckpt_path."
    )


def check_training_set(checkpoint: Mapping[str, Any], datamodule: Any) -> None:
    """Refuse an original model that was trained on another training set than that of our datamodule."""
    for part in checkpoint.values():  # one of them may be the state of the datamodule, under the name of its class
        if isinstance(datamodule, ForgetRetainDataModule) and isinstance(part, Mapping) and "training_set" in part:
            split.check_training_set(part, datamodule.split)


def seed_all(seed: int) -> None:
    """Seed the random numbers of Python, NumPy and torch; without the line that Lightning prints for it."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def set_name(module: LightningModule, loaders: Any, number: int) -> str:
    """Which set an evaluation loader holds.

    Raises:
        MisconfigurationException: The loaders are not a dictionary by set.
    """
    if not isinstance(loaders, Mapping) or not set(loaders) <= {*SETS}:
        raise MisconfigurationException(
            f"{type(module).__name__} tells the evaluation sets apart by name: give a dictionary of loaders called"
            f" {', '.join(SETS)}, as ForgetRetainDataModule does."
        )
    return str(list(loaders)[number])
