"""Plain training: of the original model, of the retrained model, and FT."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from torch import Tensor
from typing_extensions import override

from salun_lightning.data import Order, Samples, joined
from salun_lightning.methods.base import Method

if TYPE_CHECKING:
    from salun_lightning.modules.base import UnlearningModule


class FineTune(Method):
    r"""FT: :math:`\min_\theta E_{D_r} \ell` (a baseline of Fan et al., ICLR 2024).

    From a random start the same loss trains the retrained model and, with the order ``all``, the original one. From the
    original model on, it forgets only as far as training on the retain set overwrites.

    Args:
        order: ``retain`` trains on the retain set, ``all`` on the whole training set.
    """

    def __init__(self, order: Literal["retain", "all"] = "retain") -> None:
        self.order: Order = order

    @override
    def loss(self, module: "UnlearningModule", batch: Mapping[str, Samples]) -> Tensor:
        return module.task_loss(joined(list(batch.values())))
