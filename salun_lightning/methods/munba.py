"""MUNBa: forgetting and retaining bargain over each step."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from typing_extensions import override

from salun_lightning.data import Order, Samples
from salun_lightning.methods.base import Method, part
from salun_lightning.methods.finetune import FineTune
from salun_lightning.methods.random_label import RandomLabel
from salun_lightning.weights import weights_of

if TYPE_CHECKING:
    from salun_lightning.modules.base import UnlearningModule

_APART = 1e-6  # what 1 + cos is at least; below, the step becomes smaller until it is none


class MUNBa(Method):
    r"""Minimises :math:`\alpha_f \ell_f + \alpha_r \ell_r`, the Nash bargaining solution (Wu and Harandi, ICCV 2025).

    .. math::
        \alpha_i = \frac{1}{\lVert g_i \rVert \sqrt{1 + \cos \varphi}}, \quad g_i = \nabla_\theta \ell_i, \quad
        \cos \varphi = \frac{\langle g_f, g_r \rangle}{\lVert g_f \rVert \lVert g_r \rVert}

    It solves :math:`G^\top G \alpha = 1 / \alpha`. Both players gain the same, and the gradient of the sum has norm
    :math:`\sqrt 2`, whatever the losses are: the learning rate alone decides how long a step is. Where the two gradients point
    in opposite directions there is nothing to bargain for, and no step; a gradient of zero has the weight 0. The gradients are
    means over all processes. (The released code adds a tenth of the forget loss to the retain loss where its formula finds no
    positive weights, and clips the norm to 1.)

    Args:
        forget: The method whose loss is :math:`\ell_f`, which gets the forget part of each batch; as released, random labels.
        retain: The method whose loss is :math:`\ell_r`, which gets the retain part; as released, plain training.

    Raises:
        MisconfigurationException: The weights are sharded.
    """

    order: Order = "paired"

    def __init__(self, forget: Method | None = None, retain: Method | None = None) -> None:
        self.forget = RandomLabel() if forget is None else forget
        self.retain = FineTune() if retain is None else retain
        self.inner = (self.forget, self.retain)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise MisconfigurationException(
                "MUNBa compares whole gradients, which no process has of sharded weights. Use 'ddp'."
            )

    @override
    def loss(self, module: "UnlearningModule", batch: Mapping[str, Samples]) -> Tensor | None:
        players = {"forget": self.forget, "retain": self.retain}
        forget, retain = (method.loss(module, {name: part(batch, name, self)}) for name, method in players.items())
        if forget is None or retain is None:
            return None
        alphas = bargained(_gradient(module, forget), _gradient(module, retain))
        return alphas[0] * forget + alphas[1] * retain


def bargained(first: Tensor, second: Tensor) -> Tensor:
    """The weights (2,) of two losses, from their gradients as vectors."""
    least = torch.finfo(first.dtype).tiny
    norms = torch.stack([first.norm(), second.norm()])
    one, other = norms.clamp(min=least)
    cosine = ((first / one) * (second / other)).sum()
    return torch.where(norms > least, 1 / (norms * (1 + cosine).clamp(min=_APART).sqrt()), 0.0)


def _gradient(module: "UnlearningModule", loss: Tensor) -> Tensor:
    """The gradient of a loss as a vector, at least in float32, as a mean over all processes."""
    weights, scaler = list(weights_of(module).values()), getattr(module.trainer.precision_plugin, "scaler", None)
    scale = 1.0 if scaler is None else float(scaler.get_scale())  # in half precision small gradients would be none
    gradients = torch.autograd.grad(scale * loss, weights, retain_graph=True, materialize_grads=True, allow_unused=True)
    whole = torch.cat([gradient.flatten().to(torch.promote_types(gradient.dtype, torch.float32)) for gradient in gradients])
    mean: Tensor = module.trainer.strategy.reduce(whole / scale, reduce_op="mean")
    return mean
