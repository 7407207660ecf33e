"""SSD: dampen the weights that matter more to the forget set than to the rest."""

from typing import TYPE_CHECKING

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from salun_lightning.methods.one_shot import OneShot
from salun_lightning.saliency import gradient_sums
from salun_lightning.weights import weights_of

if TYPE_CHECKING:
    from salun_lightning.modules.base import UnlearningModule


class SSD(OneShot):
    r"""Selective synaptic dampening (Foster et al., AAAI 2024), without any training.

    .. math::
        \theta_i \leftarrow \min(\lambda F_i(D) / F_i(D_f), 1) \, \theta_i \quad \text{where} \quad F_i(D_f) > \alpha F_i(D)

    :math:`F` is the diagonal of the empirical Fisher information over a set: the square of the gradient of the loss of one
    sample, as a mean over the set, in eval mode and without augmentation; :math:`D` is the whole training set. It takes one
    backward pass for each training sample. (The released code squares the gradient of a batch. That depends on the batch size,
    and a forget set of less than a batch is then on another scale than the training set, so its alpha of 10 means something
    else.)

    Args:
        alpha: :math:`\alpha`, how many times more a weight must matter to the forget set to be dampened. As the forget set is a
            part of the training set, no weight can matter more than :math:`|D| / |D_f|` times as much to it.
        dampening: :math:`\lambda`; the smaller, the more is taken away.

    Raises:
        ValueError: ``alpha`` or ``dampening`` is negative.
        MisconfigurationException: ``alpha`` is so large that no weight can be dampened.
    """

    def __init__(self, alpha: float = 1.5, dampening: float = 1.0) -> None:
        if not (alpha >= 0 and dampening >= 0):
            raise ValueError(f"alpha and dampening must not be negative, got {alpha} and {dampening}.")
        self.alpha = alpha
        self.dampening = dampening

    @override
    def edit(self, module: "UnlearningModule") -> dict[str, Tensor]:
        data, strategy = module.datamodule, module.trainer.strategy
        forgotten, count = len(data.forget_indices), len(data.forget_indices) + len(data.retain_indices)
        if self.alpha * forgotten >= count:
            raise MisconfigurationException(
                f"alpha {self.alpha} would leave every weight as it is: {forgotten} of {count} training samples are to be"
                f" forgotten, and no weight can matter more than {count / forgotten:g} times as much to them. Give a smaller"
                " alpha, such as 1.5."
            )
        forget = gradient_sums(module, data.set_dataloader("forget"), squared=True, strategy=strategy)
        retain = gradient_sums(module, data.set_dataloader("retain"), squared=True, strategy=strategy)
        edit = {}
        for name, weight in weights_of(module).items():
            to_forget, to_all = forget[name] / forgotten, (forget[name] + retain.pop(name)) / count
            factor = (self.dampening * to_all / to_forget).clamp(max=1)
            edit[name] = weight.detach() * torch.where(to_forget > self.alpha * to_all, factor - 1, 0.0)
        return edit
