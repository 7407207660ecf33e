"""DELETE: on the forget set, answer as the original model would if the true class did not exist."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from salun_lightning.data import Order, Samples
from salun_lightning.methods.answers import divergence
from salun_lightning.methods.base import Kind, Method, part

if TYPE_CHECKING:
    from salun_lightning.modules.base import UnlearningModule
    from salun_lightning.modules.classifier import ImageClassifier


class DELETE(Method):
    r"""DELETE, distillation without the true class, from the forget set alone (Zhou et al., CVPR 2025).

    .. math::
        \min_\theta E_{D_f} KL(q \| p_\theta), \quad q_y = 0, \quad q_c = p_{\theta_o, c} / (1 - p_{\theta_o, y})

    No sample of the retain set is seen: what the original model makes of the other classes is to keep them as they are.

    Args:
        eval_batch_norm: Let BatchNorm normalise with the statistics of the original model, and leave them as they are, as the
            released code can. By default its statistics become those of the forget set.

    Raises:
        ValueError: There is only one class, so nothing is left without it.
    """

    order: Order = "forget"
    needs_original = True
    kind: Kind = "classifier"

    def __init__(self, eval_batch_norm: bool = False) -> None:
        self.eval_batch_norm = eval_batch_norm
        self._in_eval: list[_BatchNorm] = []

    @override
    def loss(self, module: "UnlearningModule", batch: Mapping[str, Samples]) -> Tensor:
        model, samples = cast("ImageClassifier", module), part(batch, "forget", self)
        original = model.logits(samples.inputs, original=True)
        if original.shape[1] < 2:
            raise ValueError("DELETE leaves out the true class, so it needs at least two classes.")
        others = original.scatter(1, samples.targets[:, None], -torch.inf)
        return divergence(model.logits(samples.inputs), others).mean()

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.eval_batch_norm:
            self._in_eval = [norm for norm in pl_module.modules() if isinstance(norm, _BatchNorm) and norm.training]
            for norm in self._in_eval:
                norm.eval()

    def _release(self, *_: Any, **__: Any) -> None:
        for norm in self._in_eval:
            norm.train()
        self._in_eval = []

    on_train_epoch_end = on_exception = _release
