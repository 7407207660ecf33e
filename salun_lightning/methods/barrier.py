"""BARRIER: a method at work in a few layers, whose answers to anything but the forget set are held."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from typing_extensions import override

from salun_lightning.data import Samples, run_seed
from salun_lightning.methods.base import Method, on_device
from salun_lightning.methods.random_label import RandomLabel
from salun_lightning.networks.guard import Guard, Layer, can_be_held, vectors
from salun_lightning.saliency.rehearsal import undisturbed
from salun_lightning.weights import weights_of

if TYPE_CHECKING:
    from salun_lightning.modules.base import UnlearningModule


class Barrier(Method):
    r"""BARRIER adds to the loss of a base method a barrier in each layer, :math:`\lambda` times their mean (arXiv 2605.15737).

    .. math::
        \overline{(\Delta W \mu + \Delta b)^2} + \overline{(\Delta W U_r S_r)^2} + \overline{(P l - N z_-)^2}
        + \overline{(P z_- - N l)^2} + \overline{(P z_+ - N h)^2} + \overline{(P h - N z_+)^2}

    :math:`\mu`, :math:`U`, :math:`S` are the mean, the right singular vectors and the singular values of the layer's centred
    inputs on the forget set, in the original network in eval mode. :math:`U_f` are the first directions, :math:`U_r` the rest,
    :math:`P` and :math:`N` the positive and the negative part of :math:`\Delta W U_f`. The last four terms bound the change of
    the answers on both sides of the forget set, from :math:`l` to :math:`z_-` and from :math:`z_+` to :math:`h`, where
    :math:`z_\pm` are its quantiles of 5 and 95 % along :math:`U_f`. The layers are the linear ones and the padded convolutions
    that ``model.trainable`` names, and all else is frozen. As released, a convolution is held as if each pixel were an image:
    of a kernel of 3 x 3 the centre. (The released runs of classifiers hold the last layer alone, without a retain loss.)

    Args:
        base: The method that forgets, by default random labels.
        weight: :math:`\lambda`.
        directions: How many directions :math:`U_f` has.
        margin: How far :math:`l` and :math:`h` lie beyond :math:`z_\pm`. By default, as in the released configurations, they
            are the smallest and the largest projection of the whole training set.

    Raises:
        ValueError: A number is out of range, or there is no layer that can be held.
        MisconfigurationException: The weights are sharded.
    """

    needs_original = True

    def __init__(
        self, base: Method | None = None, weight: float = 1.0, directions: int = 32, margin: float | None = None
    ) -> None:
        if not (0 <= weight < math.inf and directions >= 1 and (margin is None or margin >= 0)):
            numbers = f"weight {weight}, directions {directions}, margin {margin}"
            raise ValueError(f"{numbers} make no barrier. Give numbers that are not negative, and at least one direction.")
        self.base = RandomLabel() if base is None else base
        self.inner, self.order, self.kind = (self.base,), self.base.order, self.base.kind
        self.weight, self.directions, self.margin = weight, directions, margin
        self._guards: list[Guard] = []
        self._frozen: list[nn.Parameter] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        held = {weight for layer in _layers(pl_module).values() for weight in layer.parameters()}
        if not held:
            raise ValueError(
                "Barrier trains linear layers and padded convolutions. Name some in model.trainable, as '(fc|head)'."
            )
        self._frozen = [weight for weight in weights_of(pl_module).values() if weight not in held]
        for weight in self._frozen:
            weight.requires_grad_(False)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise MisconfigurationException("Barrier needs whole layers, which no process has of sharded weights. Use 'ddp'.")
        module, layers = cast("UnlearningModule", pl_module), _layers(pl_module)
        self._guards = [Guard(layer, cast(Layer, module.reference.get_submodule(name))) for name, layer in layers.items()]
        _look(module, "forget", {guard.original: guard.spread.add for guard in self._guards})
        for name, guard in zip(layers, self._guards, strict=True):
            if not guard.spread.count:
                raise ValueError(f"The layer '{name}' is not called as a module. Leave it out of model.trainable.")
            guard.fix(self.directions)
        _look(module, "forget", {guard.original: guard.project for guard in self._guards})
        for guard in self._guards:
            guard.bound(0.05, self.margin)
        if self.margin is None:
            _look(module, "retain", {guard.original: guard.widen for guard in self._guards})

    @override
    def loss(self, module: "UnlearningModule", batch: Mapping[str, Samples]) -> Tensor | None:
        if (loss := self.base.loss(module, batch)) is None:
            return None
        with torch.autocast(module.device.type, enabled=False):
            barriers = torch.stack([guard.barrier() for guard in self._guards])
        return loss + self.weight * barriers.mean()

    def _release(self, *_: Any, **__: Any) -> None:
        for weight in self._frozen:
            weight.requires_grad_(True)
        self._guards, self._frozen = [], []

    on_exception = teardown = _release  # after an exception there is no teardown


def _layers(module: LightningModule) -> dict[str, Layer]:
    """The layers that are trained and can be held, by name."""
    held = [(name, layer) for name, layer in module.get_submodule("network").named_modules() if can_be_held(layer)]
    return {name: cast(Layer, layer) for name, layer in held if any(weight.requires_grad for weight in layer.parameters())}


def _look(module: "UnlearningModule", name: str, looks: Mapping[nn.Module, Callable[[Tensor], object]]) -> None:
    """Show what is put into layers of the original network on a whole set."""

    def look(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        looks[layer](vectors(layer, inputs[0]))

    trainer, hooks = module.trainer, [layer.register_forward_pre_hook(look) for layer in looks]
    try:
        with undisturbed(module), torch.no_grad(), trainer.precision_plugin.forward_context():
            module.network = module.reference  # until the end of the block, where everything is put back
            torch.manual_seed(run_seed())  # the same on all ranks, and when the run is resumed
            for samples in on_device(module, module.datamodule.set_dataloader(name)):
                module.losses(samples)
    finally:
        for hook in hooks:
            hook.remove()
