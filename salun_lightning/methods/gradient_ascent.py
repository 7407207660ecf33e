"""GA: climb the loss of the forget set."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor
from typing_extensions import override

from salun_lightning.data import Order, Samples
from salun_lightning.methods.base import Method, part

if TYPE_CHECKING:
    from salun_lightning.modules.base import UnlearningModule


class GradientAscent(Method):
    r"""GA: :math:`\max_\theta E_{D_f} \ell` (a baseline of Fan et al., ICLR 2024).

    The loss has no upper bound, and nothing holds the retain set: the learning rate decides everything.
    """

    order: Order = "forget"

    @override
    def loss(self, module: "UnlearningModule", batch: Mapping[str, Samples]) -> Tensor:
        return -module.unlearned_loss(part(batch, "forget", self))
