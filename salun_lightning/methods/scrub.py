"""SCRUB: part from the original model on the forget set, and stay with it on the retain set."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from salun_lightning.data import Order, Samples
from salun_lightning.methods.answers import divergence
from salun_lightning.methods.base import Kind, Method

if TYPE_CHECKING:
    from salun_lightning.modules.base import UnlearningModule
    from salun_lightning.modules.classifier import ImageClassifier


class SCRUB(Method):
    r"""SCRUB, a student that does not obey its teacher, the original model (Kurmanji et al., NeurIPS 2023).

    .. math::
        \min_\theta -E_{D_f} KL_T(\theta_o \| \theta) \quad \text{and then} \quad
        \min_\theta \gamma E_{D_r} \ell + \alpha E_{D_r} KL_T(\theta_o \| \theta)

    Each epoch goes through the forget set first, as long as ``ascent_epochs`` lasts, and then through the retain set.
    :math:`KL_T` is that of probabilities at temperature :math:`T`, times :math:`T^2`. It is smallest where both agree, so a
    network without BatchNorm or dropout leaves the original model only with the steps on the retain set. Both sets come in
    batches of one size here, in the released code those of the forget set are smaller: the fewer samples a batch has, the more
    steps there are. The defaults are those of the released notebook for large networks.

    Args:
        gamma: :math:`\gamma`, weight of the loss on the retain set.
        alpha: :math:`\alpha`, weight of the divergence from the original model on the retain set.
        temperature: :math:`T`.
        ascent_epochs: In how many epochs, the first ones, the forget set is met.

    Raises:
        ValueError: A number is out of range.
    """

    order: Order = "sequential"
    needs_original = True
    kind: Kind = "classifier"

    def __init__(self, gamma: float = 0.99, alpha: float = 0.001, temperature: float = 4.0, ascent_epochs: int = 2) -> None:
        if not (0 <= gamma < math.inf and 0 <= alpha < math.inf):
            raise ValueError(
                f"gamma and alpha must not be negative or infinite, got {gamma} and {alpha}. Give such as 0.99, 0.1."
            )
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {temperature}. Give one such as 4.")
        if ascent_epochs < 0:
            raise ValueError(f"ascent_epochs must not be negative, got {ascent_epochs}. Give a number such as 2.")
        self.gamma = gamma
        self.alpha = alpha
        self.temperature = temperature
        self.ascent_epochs = ascent_epochs

    @override
    def loss(self, module: "UnlearningModule", batch: Mapping[str, Samples]) -> Tensor | None:
        losses = []
        if "forget" in batch and module.current_epoch < self.ascent_epochs:
            losses.append(-self._divergence(module, batch["forget"])[0])
        if "retain" in batch:
            apart, logits = self._divergence(module, batch["retain"])
            losses.append(self.gamma * functional.cross_entropy(logits, batch["retain"].targets) + self.alpha * apart)
        return torch.stack(losses).sum() if losses else None

    def _divergence(self, module: "UnlearningModule", samples: Samples) -> tuple[Tensor, Tensor]:
        """The mean divergence from the original model, and the logits."""
        model = cast("ImageClassifier", module)
        logits = model.logits(samples.inputs)
        apart = divergence(logits, model.logits(samples.inputs, original=True), self.temperature)
        return self.temperature**2 * apart.mean(), logits
