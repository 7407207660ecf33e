"""l1-sparse: go on training on the retain set, while an L1 penalty draws all weights towards zero."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor
from typing_extensions import override

from salun_lightning.data import Order, Samples
from salun_lightning.methods.base import Method, number_of_epochs, part
from salun_lightning.weights import local_of, weights_of

if TYPE_CHECKING:
    from salun_lightning.modules.base import UnlearningModule


class L1Sparse(Method):
    r"""Minimises :math:`E_{D_r} \ell + \gamma_e \lVert \theta \rVert_1` (Jia et al., NeurIPS 2023).

    The penalty is on all weights that are trained, also those of BatchNorm and biases. It becomes weaker with each epoch
    :math:`e` of :math:`E`, :math:`\gamma_e = \gamma (1 - e / E)`. For a run that counts steps, :math:`E` is the number of its
    steps divided by those of an epoch. No weight is set to zero afterwards.

    Args:
        gamma: :math:`\gamma`, the strength of the penalty in the first epoch. The paper tries 1e-6 to 1e-4.

    Raises:
        ValueError: ``gamma`` is negative or not finite.
    """

    order: Order = "retain"

    def __init__(self, gamma: float = 1e-4) -> None:
        if not 0 <= gamma < math.inf:
            raise ValueError(f"gamma must be a finite number that is not negative, got {gamma}. Give one such as 1e-4.")
        self.gamma = gamma

    @override
    def loss(self, module: "UnlearningModule", batch: Mapping[str, Samples]) -> Tensor:
        epochs = number_of_epochs(self, module.trainer)
        # of a sharded weight each rank adds its own part: a sharded scalar could not be added to the loss
        penalty = sum(local_of(weight).abs().sum() for weight in weights_of(module).values())
        return module.task_loss(part(batch, "retain", self)) + self.gamma * (1 - module.current_epoch / epochs) * penalty
