"""BiasShift: lower the bias of the forgotten class in the last layer. Nothing is forgotten: it shows what UA cannot see."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import override

from salun_lightning.methods.answers import classification_head
from salun_lightning.methods.base import Kind
from salun_lightning.methods.one_shot import OneShot
from salun_lightning.methods.whole_classes import forgotten_classes
from salun_lightning.weights import weights_of

if TYPE_CHECKING:
    from salun_lightning.modules.base import UnlearningModule


class BiasShift(OneShot):
    r""":math:`b_f \leftarrow b_f - s` for each class :math:`f` that is forgotten (Chen et al., arXiv 2605.08730, 2026).

    A straw man. It edits one number for each class in the last linear layer, and can bring UA to 100 and leave RA and TA as
    they are, while the network knows the class as well as before. A measure that cannot tell it from a method that forgets
    looks at the head alone. It is for classes that are forgotten whole.

    Args:
        shift: :math:`s`. What is larger than any difference of logits brings UA to 100. Not tuned.

    Raises:
        ValueError: ``shift`` is no finite number, the last layer has no trained bias, or no class is forgotten whole.
    """

    kind: Kind = "classifier"

    def __init__(self, shift: float = 30.0) -> None:
        if not math.isfinite(shift):
            raise ValueError(f"shift must be a finite number, got {shift}. Give one such as 30.")
        self.shift = shift

    @override
    def edit(self, module: "UnlearningModule") -> dict[str, Tensor]:
        classes = forgotten_classes(self, module)
        layer, head = classification_head(module)
        names = {weight: name for name, weight in weights_of(module).items()}
        if head.bias is None or head.bias not in names:
            raise ValueError(
                f"The classification head '{layer}' has no bias that is trained, so BiasShift has nothing to edit. Choose"
                " another method or network."
            )
        edit = torch.zeros_like(head.bias)
        edit[classes] = -self.shift
        return {names[head.bias]: edit}
