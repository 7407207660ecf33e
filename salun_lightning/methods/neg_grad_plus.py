"""NegGrad+: descend on the retain set while climbing on the forget set."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor
from typing_extensions import override

from salun_lightning.data import Order, Samples
from salun_lightning.methods.base import Method, part

if TYPE_CHECKING:
    from salun_lightning.modules.base import UnlearningModule


class NegGradPlus(Method):
    r"""NegGrad+: :math:`\min_\theta \alpha E_{D_r} \ell - (1 - \alpha) E_{D_f} \ell` (Kurmanji et al., NeurIPS 2023).

    Args:
        alpha: Weight of the retain loss. Close to 1, or the unbounded forget loss takes over.
    """

    order: Order = "paired"

    def __init__(self, alpha: float = 0.999) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie between 0 and 1, got {alpha}.")
        self.alpha = alpha

    @override
    def loss(self, module: "UnlearningModule", batch: Mapping[str, Samples]) -> Tensor:
        retain, forget = module.task_loss(part(batch, "retain", self)), module.unlearned_loss(part(batch, "forget", self))
        return self.alpha * retain - (1 - self.alpha) * forget
