"""ESD: steer the model away from what it would draw for a class."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from salun_lightning.data import Order, Samples
from salun_lightning.methods.base import Kind, Method, part

if TYPE_CHECKING:
    from salun_lightning.modules.base import UnlearningModule
    from salun_lightning.modules.diffusion import Diffusion


class ESD(Method):
    r"""Erased stable diffusion (Gandikota et al., ICCV 2023), for classes in the place of prompts.

    .. math::
        \min_\theta \| \epsilon_\theta(x_t | c) - \epsilon_{\theta_o}(x_t)
        + \eta (\epsilon_{\theta_o}(x_t | c) - \epsilon_{\theta_o}(x_t)) \|^2

    No image is looked at: :math:`x_t` lies on the way of the original model from noise to an image of the class. (The first
    release went that way with the model in training, the authors' later one with the original model, as here.) Needs a model
    with a null class.

    Args:
        strength: :math:`\eta`, how far to the other side of the unconditional prediction.
        start_guidance: Guidance scale with which :math:`x_t` is sampled, in the convention of diffusers (1 is none).
        steps: How many DDIM steps the whole way has. As released, t is drawn from the timesteps between two steps.

    Raises:
        ValueError: ``strength`` is negative, or ``steps`` is not positive.
    """

    order: Order = "forget"
    needs_original = True
    kind: Kind = "diffusion"

    def __init__(self, strength: float = 1.0, start_guidance: float = 3.0, steps: int = 50) -> None:
        if not strength >= 0:
            raise ValueError(f"strength must not be negative, got {strength}.")
        if steps < 1:
            raise ValueError(f"steps must be positive, got {steps}.")
        self.strength = strength
        self.start_guidance = start_guidance
        self.steps = steps

    @override
    def loss(self, module: "UnlearningModule", batch: Mapping[str, Samples]) -> Tensor:
        model, targets = cast("Diffusion", module), part(batch, "forget", self).targets
        with torch.no_grad():
            noisy, timesteps = model.partly_sampled(targets, self.start_guidance, self.steps)
            without = model.denoise(noisy, timesteps, original=True)
            toward = model.denoise(noisy, timesteps, targets, original=True) - without
        return functional.mse_loss(model.denoise(noisy, timesteps, targets), without - self.strength * toward)
