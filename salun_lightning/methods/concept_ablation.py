"""Concept Ablation: let the model see in its own images of the anchor what the concept's prompt asks for."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from salun_lightning.data import Order, Samples
from salun_lightning.methods.base import Kind, Method, part
from salun_lightning.methods.drawn import drawn_by_original

if TYPE_CHECKING:
    from salun_lightning.modules.base import UnlearningModule
    from salun_lightning.modules.text_to_image import TextToImage


class ConceptAblation(Method):
    r"""Concept Ablation (Kumari et al., ICCV 2023), for models of prompts.

    .. math::
        \min_\theta E_{x \sim p_{\theta_o}(\cdot | c'), t, \epsilon} \| \epsilon_\theta(x_t | c) - g \|^2
        + \lambda \| \epsilon_\theta(x_t | c') - \epsilon \|^2

    where :math:`c` is a prompt that is forgotten and :math:`c'` the one with the anchor. The goal :math:`g` is what the network
    in training itself says for the anchor, :math:`\epsilon_\theta(x_t | c')` without a gradient (``model``), or the noise
    :math:`\epsilon` (``noise``). No image of the data is looked at: the original model draws those of the anchors. (The
    released code trains cross-attention's keys and values, ``trainable: xattn-strict``, and scales and pads the images at
    random.)

    Args:
        goal: ``model`` or ``noise``.
        prior_weight: :math:`\lambda`.
        images: How many images the original model draws of each anchor.

    Raises:
        ValueError: There is no such goal, a number is not positive, or the request names no anchors.
    """

    order: Order = "forget"
    needs_original = True
    kind: Kind = "text-to-image"

    def __init__(self, goal: Literal["model", "noise"] = "model", prior_weight: float = 1.0, images: int = 20) -> None:
        if goal not in ("model", "noise"):
            raise ValueError(f"goal must be model or noise, got {goal}.")
        if not prior_weight >= 0:
            raise ValueError(f"prior_weight must not be negative, got {prior_weight}.")
        if images < 1:
            raise ValueError(f"images must be positive, got {images}.")
        self.goal = goal
        self.prior_weight = prior_weight
        self.images = images
        self._anchors: Tensor
        self._drawn: Samples

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = cast("TextToImage", pl_module)
        if not model.datamodule.anchors:
            raise ValueError("The forget request names no anchor, which ConceptAblation needs. Give ForgetConcepts.")
        self._anchors = model.anchors(torch.tensor(sorted(model.datamodule.anchors))).unique()
        self._drawn = drawn_by_original(model, self._anchors.tolist(), self.images)

    @override
    def loss(self, module: "UnlearningModule", batch: Mapping[str, Samples]) -> Tensor:
        model, concepts = cast("TextToImage", module), part(batch, "forget", self).targets
        anchors = model.anchors(concepts)
        rows = torch.searchsorted(self._anchors.to(anchors.device), anchors) * self.images
        rows = rows + torch.randint(self.images, rows.shape, device=rows.device)
        noisy, timesteps, noise = model.noised(Samples(*(field[rows] for field in self._drawn)))
        with torch.set_grad_enabled(self.prior_weight > 0):
            said = model.denoise(noisy, timesteps, anchors)
        goal = said.detach() if self.goal == "model" else noise
        loss = functional.mse_loss(model.denoise(noisy, timesteps, concepts), goal)
        return loss + self.prior_weight * functional.mse_loss(said, noise) if self.prior_weight else loss
