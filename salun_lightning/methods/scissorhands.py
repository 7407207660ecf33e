"""Scissorhands: make the weights anew that what is to be forgotten depends on, then repair the rest."""

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from salun_lightning.data import Order, Samples, epoch_seed, run_seed
from salun_lightning.methods.base import Method, part
from salun_lightning.saliency import SaliencyMask, gradient_sums
from salun_lightning.weights import laid_like, local_of, reshard, weights_of

if TYPE_CHECKING:
    from salun_lightning.modules.base import UnlearningModule


class Scissorhands(Method):
    r"""Scissorhands: trim, then repair (Wu and Harandi, ECCV 2024).

    The weights with the largest connection sensitivity :math:`|\theta_i \partial \ell_f / \partial \theta_i|` get random values
    as in a new layer, once: uniform up to :math:`1 / \sqrt{n}` for n inputs, biases 0. Then the loss is
    :math:`E_{D_r} \ell - \lambda E_{D_f} \ell`, and the gradient g of a step the nearest one that undoes no forgetting:

    .. math::
        \min_{\tilde g} \| \tilde g - g \|^2 \quad \text{subject to} \quad \langle \tilde g, \nabla(-\ell_f) \rangle \ge 0

    :math:`\nabla \ell_f` is that of the whole forget set, in eval mode, at the start and anew in each epoch. (The released code
    takes one batch for it, leaves :math:`\ell_f` out of the loss once an epoch has gone through the forget set, and moves g by
    half of :math:`\nabla(-\ell_f)` at least.)

    Args:
        trim: The fraction of weights that is made anew.
        forget_weight: :math:`\lambda`.
        layers: Which weights may be trimmed: a regular expression that is searched in their plain names, as released
            ``layer3|layer4|fc`` for a ResNet-18. By default all. Those of normalisation layers never are.

    Raises:
        ValueError: ``trim`` or ``forget_weight`` is out of range, or ``layers`` is found in no name.
    """

    order: Order = "paired"

    def __init__(self, trim: float = 0.03, forget_weight: float = 0.05, layers: str = "") -> None:
        if not (0 <= trim <= 1 and 0 <= forget_weight < math.inf):
            raise ValueError(f"trim {trim} must be from 0 to 1, forget_weight {forget_weight} not negative. Try 0.03 and 0.05.")
        self.trim = trim
        self.forget_weight = forget_weight
        self.layers = layers
        self._trimmed = False
        self._memory: dict[str, Tensor] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._trimmed = False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reshard(pl_module)
        if self._trimmed:
            return  # the run is resumed
        module = cast("UnlearningModule", pl_module)
        weights, gradients = self._may_be_trimmed(module), self._forget_gradients(module)
        trimmed = SaliencyMask.from_scores({n: (w.detach() * gradients[n]).abs() for n, w in weights.items()}, self.trim)
        generator = torch.Generator().manual_seed(epoch_seed(run_seed(), -1, 0))  # other numbers than the original began with
        with torch.no_grad():
            for name, weight in weights.items():
                anew = torch.zeros(weight.shape)
                if weight.ndim > 1:
                    anew.uniform_(-1, 1, generator=generator).div_(math.sqrt(weight[0].numel()))
                weight.copy_(torch.where(laid_like(trimmed[name], weight), laid_like(anew.to(weight.dtype), weight), weight))
        # a step that moves nothing, after which a mask puts back what lies outside it, as after any other
        torch.optim.SGD(weights.values(), lr=0.0).step()
        self._trimmed = True

    def _may_be_trimmed(self, module: "UnlearningModule") -> dict[str, nn.Parameter]:
        norms = [layer for layer in module.network.modules() if "norm" in type(layer).__name__.lower()]
        never = {weight for layer in norms for weight in layer.parameters(recurse=False)}
        weights = {name: weight for name, weight in weights_of(module).items() if weight not in never}
        if chosen := {name: weight for name, weight in weights.items() if re.search(self.layers, name)}:
            return chosen
        raise ValueError(f"layers '{self.layers}' is in the name of no weight that may be trimmed: {', '.join(weights)}.")

    def _forget_gradients(self, module: "UnlearningModule") -> dict[str, Tensor]:
        return gradient_sums(module, module.datamodule.set_dataloader("forget"), strategy=module.trainer.strategy)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._memory = self._forget_gradients(cast("UnlearningModule", pl_module))

    @override
    def loss(self, module: "UnlearningModule", batch: Mapping[str, Samples]) -> Tensor:
        retain, forget = module.task_loss(part(batch, "retain", self)), module.unlearned_loss(part(batch, "forget", self))
        return retain - self.forget_weight * forget

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        pairs = []
        for name, weight in weights_of(pl_module).items():
            if weight.grad is not None:
                gradient = local_of(weight.grad)
                # a gradient is zero where a mask holds the weight still, and stays so
                pairs.append((gradient, local_of(self._memory[name]) * (gradient != 0)))
        inner = torch.stack([(gradient * memory).sum() for gradient, memory in pairs]).sum()
        square = torch.stack([memory.square().sum() for _, memory in pairs]).sum()
        inner, square = trainer.strategy.reduce(torch.stack([inner, square]), reduce_op="sum")  # over shards
        for gradient, memory in pairs:
            gradient.sub_(memory * (inner.clamp(min=0) / square.clamp(min=1e-30)))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._memory = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"trimmed": self._trimmed}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._trimmed = state_dict["trimmed"]
