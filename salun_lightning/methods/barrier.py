"""BARRIER: a method at work in a few layers, whose answers to anything but the forget set are held."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from typing_extensions import override

from salun_lightning.data import Samples, run_seed
from salun_lightning.guard import Guard, Layer, takes_a_pixel, vectors
from salun_lightning.methods.base import Method
from salun_lightning.methods.random_label import RandomLabel
from salun_lightning.saliency.rehearsal import undisturbed
from salun_lightning.weights import weights_of

if TYPE_CHECKING:
    from salun_lightning.modules.base import UnlearningModule

_TAIL = 0.05  # the fraction of the forget set on each side that may lie where the answers are held


class Barrier(Method):
    r"""BARRIER adds to the loss of a base method a barrier in each layer, :math:`\lambda` times their mean (arXiv 2605.15737).

    .. math::
        \overline{(\Delta W \mu + \Delta b)^2} + \overline{(\Delta W U_r S_r)^2} + \overline{(P l - N z_-)^2}
        + \overline{(P z_- - N l)^2} + \overline{(P z_+ - N h)^2} + \overline{(P h - N z_+)^2}

    :math:`\mu`, :math:`U`, :math:`S` are the mean, the right singular vectors and the singular values of the layer's centred
    inputs on the forget set, in the original network in eval mode. :math:`U_f` are the first directions, :math:`U_r` the rest;
    :math:`P` and :math:`N` are the positive and the negative part of :math:`\Delta W U_f`. The last four terms bound the change
    of the answers on both sides of the forget set, from :math:`l` to :math:`z_-`, its 5 % quantile along :math:`U_f`, and from
    the 95 % quantile :math:`z_+` to :math:`h`.
    The layers are those that are trained, and nothing else may be: ``model.trainable`` says which. As released, a convolution
    is held as if each of its pixels were an image, so of a kernel of 3 x 3 with padding 1 only the centre. (The released runs
    have no retain loss; that of the base method stays here.)

    Args:
        base: The method that forgets, by default random labels.
        weight: :math:`\lambda`.
        directions: How many directions :math:`U_f` has.
        margin: How far :math:`l` and :math:`h` lie beyond :math:`z_\pm`. By default, as in the released configurations, they
            are the smallest and the largest projection of the whole training set, which takes a pass over it.

    Raises:
        ValueError: A number is out of range, or what is trained is no linear layer or convolution with padding.
        MisconfigurationException: The weights are sharded.
    """

    needs_original = True

    def __init__(
        self, base: Method | None = None, weight: float = 1.0, directions: int = 32, margin: float | None = None
    ) -> None:
        if not (0 <= weight < math.inf and directions >= 1 and (margin is None or margin >= 0)):
            raise ValueError(
                f"weight {weight}, directions {directions}, margin {margin} make no barrier. Give a weight and a margin that"
                " are not negative, and at least one direction."
            )
        self.base = RandomLabel() if base is None else base
        self.inner, self.order, self.kind = (self.base,), self.base.order, self.base.kind
        self.weight, self.directions, self.margin = weight, directions, margin
        self._guards: list[Guard] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise MisconfigurationException("Barrier needs whole layers, which no process has of sharded weights. Use 'ddp'.")
        module = cast("UnlearningModule", pl_module)
        guards = _guards(module)
        _look(module, "forget", {guard.original: guard.spread.add for guard in guards.values()})
        for name, guard in guards.items():
            if not guard.spread.count:
                raise ValueError(f"Nothing is put into the layer '{name}' by itself. Leave it out of model.trainable.")
            guard.fix(self.directions)
        _look(module, "forget", {guard.original: guard.project for guard in guards.values()})
        for guard in guards.values():
            guard.bound(_TAIL, self.margin)
        if self.margin is None:
            _look(module, "retain", {guard.original: guard.widen for guard in guards.values()})
        self._guards = list(guards.values())

    @override
    def loss(self, module: "UnlearningModule", batch: Mapping[str, Samples]) -> Tensor | None:
        if (loss := self.base.loss(module, batch)) is None:
            return None
        with torch.autocast(module.device.type, enabled=False):
            barriers = torch.stack([guard.barrier() for guard in self._guards])
        return loss + self.weight * barriers.mean()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._guards = []


def _guards(module: "UnlearningModule") -> dict[str, Guard]:
    """A guard of each layer that is trained, by name; a ValueError if anything else is."""
    layers, trained = dict(module.network.named_modules()), weights_of(module)
    fit = [name for name, layer in layers.items() if isinstance(layer, Layer) and takes_a_pixel(layer)]
    guarded = {weight: name for name in fit for weight in layers[name].parameters()}
    if other := next((name for name, weight in trained.items() if weight not in guarded), None):
        raise ValueError(
            f"Barrier holds the answers of linear layers and of convolutions with padding, but '{other}' would be trained as"
            " well. Name such layers alone in model.trainable, such as '(fc|head)'."
        )
    names = dict.fromkeys(guarded[weight] for weight in trained.values())
    return {name: Guard(cast(Layer, layers[name]), cast(Layer, module.reference.get_submodule(name))) for name in names}


def _look(module: "UnlearningModule", name: str, looks: Mapping[nn.Module, Callable[[Tensor], object]]) -> None:
    """Show what is put into layers of the original network on a whole set."""

    def look(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        looks[layer](vectors(layer, inputs[0]))

    trainer, hooks = module.trainer, [layer.register_forward_pre_hook(look) for layer in looks]
    with undisturbed(module), torch.no_grad(), trainer.precision_plugin.forward_context():
        module.network = module.reference  # until the end of the block, where everything is put back
        torch.manual_seed(run_seed())  # the same on all ranks, and when the run is resumed
        for batch in module.datamodule.set_dataloader(name):
            module.losses(trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), module.device))
    for hook in hooks:
        hook.remove()
