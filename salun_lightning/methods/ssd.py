"""SSD: dampen the weights that matter more to the forget set than to the rest."""

from typing import TYPE_CHECKING, Literal, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from salun_lightning.data import Samples
from salun_lightning.methods.base import Kind
from salun_lightning.methods.one_shot import OneShot
from salun_lightning.saliency import gradient_sums
from salun_lightning.weights import weights_of

if TYPE_CHECKING:
    from salun_lightning.modules.base import UnlearningModule
    from salun_lightning.modules.classifier import ImageClassifier


class SSD(OneShot):
    r"""Selective synaptic dampening (Foster et al., AAAI 2024), without any training.

    .. math::
        \theta_i \leftarrow \min(\lambda F_i(D) / F_i(D_f), 1) \, \theta_i \quad \text{where} \quad F_i(D_f) > \alpha F_i(D)

    :math:`F` is the diagonal of the empirical Fisher information over a set: the square of the gradient of the loss of one
    sample, as a mean over the set, in eval mode and without augmentation; :math:`D` is the whole training set. It takes one
    backward pass for each training sample. (The released code squares the gradient of a batch. That depends on the batch size,
    and a forget set of less than a batch is then on another scale than the training set, so its alpha of 10 means something
    else.)

    LFSSD (Foster et al., 2024, arXiv 2402.19308) needs no labels: its :math:`F_i` is the mean of
    :math:`|\partial \lVert f(x) \rVert_2^2 / \partial \theta_i|`, where :math:`f(x)` are the logits of one sample.

    Args:
        alpha: :math:`\alpha`, how many times more a weight must matter to the forget set to be dampened. As the forget set is a
            part of the training set, no weight can matter more than :math:`|D| / |D_f|` times as much to it.
        dampening: :math:`\lambda`; the smaller, the more is taken away.
        importance: What a weight matters to: the ``loss`` (SSD), or the ``output`` of a classifier (LFSSD).

    Raises:
        ValueError: ``alpha`` or ``dampening`` is negative, or there is no such ``importance``.
        MisconfigurationException: ``alpha`` is so large that no weight can be dampened.
    """

    def __init__(self, alpha: float = 1.5, dampening: float = 1.0, importance: Literal["loss", "output"] = "loss") -> None:
        if not (alpha >= 0 and dampening >= 0):
            raise ValueError(f"alpha and dampening must not be negative, got {alpha} and {dampening}.")
        if importance not in ("loss", "output"):
            raise ValueError(f"importance must be loss or output, got '{importance}'.")
        self.alpha = alpha
        self.dampening = dampening
        self.importance = importance
        self.kind: Kind = "any" if importance == "loss" else "classifier"

    @override
    def edit(self, module: "UnlearningModule") -> dict[str, Tensor]:
        data = module.datamodule
        forgotten, count = len(data.forget_indices), len(data.forget_indices) + len(data.retain_indices)
        if self.alpha * forgotten >= count:
            raise MisconfigurationException(
                f"alpha {self.alpha} would leave every weight as it is: {forgotten} of {count} training samples are to be"
                f" forgotten, and no weight can matter more than {count / forgotten:g} times as much to them. Give a smaller"
                " alpha, such as 1.5."
            )
        forget, retain = self._sums(module, "forget"), self._sums(module, "retain")
        edit = {}
        for name, weight in weights_of(module).items():
            to_forget, to_all = forget[name] / forgotten, (forget[name] + retain.pop(name)) / count
            factor = (self.dampening * to_all / to_forget).clamp(max=1)
            edit[name] = weight.detach() * torch.where(to_forget > self.alpha * to_all, factor - 1, 0.0)
        return edit

    def _sums(self, module: "UnlearningModule", name: str) -> dict[str, Tensor]:
        """How much each weight matters to the samples of a set together."""
        samples, strategy = module.datamodule.set_dataloader(name), module.trainer.strategy
        if self.importance == "loss":
            return gradient_sums(module, samples, squared=True, strategy=strategy)
        classifier = cast("ImageClassifier", module)

        def squared_norm(batch: Samples) -> Tensor:
            return classifier.logits(batch.inputs).square().sum(1).mean()

        return gradient_sums(module, samples, absolute=True, loss=squared_norm, strategy=strategy)
