"""TS-BGRM: make the head forget a class without pushing the biases of classes apart, then repair it on the retain set."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from salun_lightning.data import Order, Samples
from salun_lightning.methods.answers import classification_head
from salun_lightning.methods.base import Kind, Method, number_of_epochs
from salun_lightning.methods.whole_classes import forgotten_classes

if TYPE_CHECKING:
    from salun_lightning.modules.base import UnlearningModule


class TSBGRM(Method):
    r"""Two-stage bias gradient reversal (Chen et al., arXiv 2605.08730, 2026). It trains the last linear layer alone.

    The first epochs minimise :math:`-E_{D_f} \ell`, where the gradient of the biases of retained classes is multiplied by
    ``bias_scale``: their biases do not rise while that of the forgotten class falls. The last ones minimise
    :math:`E_{D_r} \ell`. Features are taken in eval mode, so BatchNorm's statistics stay as they are; the released code lets
    them move, and by default multiplies by 1, which reverses nothing. All other weights keep their bits, as if they were
    outside a mask. It is for classes that are forgotten whole.

    Args:
        bias_scale: What the gradient of the biases of retained classes is multiplied by in the first stage; -1 reverses it.
        repair_epochs: How many of the last epochs are on the retain set. A run of fewer epochs than two only forgets.

    Raises:
        ValueError: A number is out of range, there is no linear layer, or no class is forgotten whole.
    """

    order: Order = "sequential"
    kind: Kind = "classifier"

    def __init__(self, bias_scale: float = -1.0, repair_epochs: int = 1) -> None:
        if not math.isfinite(bias_scale) or repair_epochs < 0:
            raise ValueError(
                f"bias_scale must be finite and repair_epochs not negative, got {bias_scale} and {repair_epochs}. Give numbers"
                " such as -1 and 1."
            )
        self.bias_scale = bias_scale
        self.repair_epochs = repair_epochs
        self._modes: list[tuple[nn.Module, bool]] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast("UnlearningModule", pl_module)
        self._forgotten = forgotten_classes(self, module)
        self._head = classification_head(module)[1]
        self._repair_from = max(1, math.ceil(number_of_epochs(self, trainer)) - self.repair_epochs)
        self._modes = [(child, child.training) for child in module.network.modules()]
        module.network.eval()

    def repairs(self, module: "UnlearningModule") -> bool:
        """Whether this epoch is one of the second stage."""
        return module.current_epoch >= self._repair_from

    @override
    def loss(self, module: "UnlearningModule", batch: Mapping[str, Samples]) -> Tensor | None:
        wanted = "retain" if self.repairs(module) else "forget"
        if wanted not in batch:
            return None
        loss = module.task_loss(batch[wanted])
        return loss if wanted == "retain" else -loss

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        module, head = cast("UnlearningModule", pl_module), self._head
        for weight in module.network.parameters():
            if weight is not head.weight and weight is not head.bias:
                weight.grad = None  # an optimizer leaves alone what has no gradient, weight decay included
        if head.bias is not None and head.bias.grad is not None and not self.repairs(module):
            scale = torch.full_like(head.bias, self.bias_scale)
            scale[self._forgotten] = 1
            head.bias.grad *= scale

    def _release(self, *_: Any, **__: Any) -> None:
        for child, mode in self._modes:
            child.training = mode
        self._modes = []

    on_train_end = on_exception = _release
