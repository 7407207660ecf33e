"""Remap: answer for a forgotten class as for another one. With a saliency mask, this is SalUn for diffusion models."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from salun_lightning.data import Order, Samples
from salun_lightning.methods.base import Kind, Method, part

if TYPE_CHECKING:
    from salun_lightning.modules.base import UnlearningModule
    from salun_lightning.modules.diffusion import Diffusion
    from salun_lightning.modules.text_to_image import TextToImage


class Remap(Method):
    r"""What SalUn trains a diffusion model with, the counterpart of random labels (Fan et al., ICLR 2024, section 4).

    .. math::
        \min_\theta E_{D_f, t, \epsilon} \| \epsilon_\theta(x_t | c) - \epsilon_{\theta_o}(x_t | c') \|^2
        + \alpha E_{D_r} \ell, \quad c' \neq c

    Both terms are means over all elements of the prediction, so ``alpha`` weighs like against like (unless ``min_snr`` of the
    module weighs the second one). (The released code sums the second one over an image: its alpha of 1e-3 is 1e-3 times the
    number of elements here, 3.07 for CIFAR-10.) The prediction for :math:`c'` is that of the original model, frozen, and the
    class is never dropped in the first term; the released code takes the model in training for both and drops either class
    independently.

    Args:
        alpha: Weight of the retain loss.
        to: Which retained class: ``next`` is the next one by number, as released; ``random`` draws one for each sample anew;
            a number is that class; ``anchor`` is what the forget request names in its place, for models of prompts.

    Raises:
        ValueError: ``alpha`` is negative, there is no such ``to``, or that class is to be forgotten itself.
    """

    order: Order = "paired"
    needs_original = True
    kind: Kind = "diffusion"

    def __init__(self, alpha: float = 1.0, to: Literal["next", "random", "anchor"] | int = "next") -> None:
        if not alpha >= 0:
            raise ValueError(f"alpha must not be negative, got {alpha}.")
        if not isinstance(to, int) and to not in ("next", "random", "anchor"):
            raise ValueError(f"to must be next, random, anchor or the number of a class, got {to}.")
        self.alpha = alpha
        self.to = to

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast("Diffusion", pl_module)
        retained = module.retained_classes.tolist()
        if isinstance(self.to, int) and self.to not in retained:
            raise ValueError(f"Class {self.to} cannot stand in for what is forgotten: the retained classes are {retained}.")
        if isinstance(self.to, int) and len(retained) == module.num_classes:
            raise ValueError(f"Class {self.to} cannot stand in for itself: no class is forgotten whole. Use next or random.")
        if self.to == "anchor" and not (hasattr(module, "anchors") and module.datamodule.anchors):
            raise ValueError("The forget request names no anchor. Give TextToImage and ForgetConcepts, or another class by to.")
        if module.num_classes < 2 or not retained:
            raise ValueError("No class is retained that a forgotten one could be remapped to.")

    @override
    def loss(self, module: "UnlearningModule", batch: Mapping[str, Samples]) -> Tensor:
        model, forget = cast("Diffusion", module), part(batch, "forget", self)
        noisy, timesteps, _ = model.noised(forget)
        if self.to == "anchor":
            to = cast("TextToImage", model).anchors(forget.targets)
        else:
            to = self.remapped(forget.targets, model.retained_classes)
        with torch.no_grad():
            other = model.denoise(noisy, timesteps, to, original=True)
        loss = functional.mse_loss(model.denoise(noisy, timesteps, forget.targets), other)
        return loss + self.alpha * model.task_loss(part(batch, "retain", self)) if self.alpha else loss

    def remapped(self, targets: Tensor, retained: Tensor) -> Tensor:
        """The class in the place of each class.

        Args:
            targets: Classes, int64 of shape (B,).
            retained: The classes to choose from, ascending, on the same device.
        """
        if isinstance(self.to, int):
            return torch.full_like(targets, self.to)
        behind = torch.searchsorted(retained, targets, right=True)  # where the classes that are greater begin
        if self.to == "random":  # any but the class itself, which is the last one from there on, if it is among them
            others = len(retained) - (retained[behind - 1] == targets).long()
            behind = behind + (torch.rand(len(targets), device=targets.device) * others).long()
        return retained[behind % len(retained)]
