"""ESD: steer the model away from what it would draw for a class."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from salun_lightning.data import ForgetClasses, Order, Samples
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
        conditions: From which of the conditions that are forgotten it is steered away, by name or number; by default from those
            of all images in the forget set. The paper erases a concept by its name alone: of "a seven" and "a seven beside a
            two", that is the first.

    Raises:
        ValueError: ``strength`` is negative, ``steps`` is not positive, or a condition is not there or not forgotten.
    """

    order: Order = "forget"
    needs_original = True
    kind: Kind = "diffusion"

    def __init__(
        self,
        strength: float = 1.0,
        start_guidance: float = 3.0,
        steps: int = 50,
        conditions: list[int | str] | int | str | None = None,
    ) -> None:
        if not strength >= 0:
            raise ValueError(f"strength must not be negative, got {strength}.")
        if steps < 1:
            raise ValueError(f"steps must be positive, got {steps}.")
        self.strength = strength
        self.start_guidance = start_guidance
        self.steps = steps
        self.conditions = conditions

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._named(pl_module)  # refused before anything is spent

    def _named(self, module: Any) -> list[int] | None:
        """The conditions that are named."""
        if self.conditions is None:
            return None
        data = module.datamodule
        chosen = ForgetClasses(self.conditions).classes(data.class_names)
        for number in chosen:
            if number not in data.forgotten_classes:
                raise ValueError(f"ESD is to steer away from '{data.class_names[number]}', which is not to be forgotten.")
        return chosen

    @override
    def loss(self, module: "UnlearningModule", batch: Mapping[str, Samples]) -> Tensor:
        model, targets = cast("Diffusion", module), part(batch, "forget", self).targets
        named = self._named(module)
        if named is not None:
            targets = torch.tensor(named, device=targets.device)[
                torch.randint(len(named), targets.shape, device=targets.device)
            ]
        with torch.no_grad():
            noisy, timesteps = model.partly_sampled(targets, self.start_guidance, self.steps)
            without = model.denoise(noisy, timesteps, original=True)
            toward = model.denoise(noisy, timesteps, targets, original=True) - without
        return functional.mse_loss(model.denoise(noisy, timesteps, targets), without - self.strength * toward)
