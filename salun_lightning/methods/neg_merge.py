"""NegMerge: learn the forget set even better in several ways, and go the opposite way where all of them agree."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import override

from salun_lightning.data import Samples, epoch_seed, run_seed
from salun_lightning.methods.one_shot import OneShot, batches_at
from salun_lightning.saliency import gradient_sums
from salun_lightning.saliency.gradients import at_least_float32
from salun_lightning.weights import local_of, weights_of

if TYPE_CHECKING:
    from salun_lightning.modules.base import UnlearningModule

_MOMENTUM = 0.9


class NegMerge(OneShot):
    r"""NegMerge (Kim et al., ICML 2025).

    .. math::
        \theta_u = \theta_o - \lambda \tau, \quad \tau_i = \frac{1}{K} \sum_{k=1}^K (\theta_k - \theta_o)_i \;
        \text{if all } K \text{ have the same sign, else } 0

    The candidates :math:`\theta_k` are trained from :math:`\theta_o` on the forget set alone, with SGD of momentum 0.9: one for
    each rate and number of epochs. Those of one rate lie on one path, so they cost as much as the longest of them. They are
    trained in eval mode and without augmentation, because the edited network keeps the statistics of BatchNorm, too.

    Args:
        strength: :math:`\lambda`; the shorter the candidates are trained, the more it takes. The default is for the digits.
        lrs: Learning rates of the candidates.
        epochs: After how many epochs each is taken.

    Raises:
        ValueError: ``strength`` is negative or not finite, a rate or a number of epochs is not positive, there is none, or a
            candidate diverged.
    """

    def __init__(
        self, strength: float = 5.0, lrs: Sequence[float] = (0.001, 0.003, 0.01), epochs: Sequence[int] = (5, 10)
    ) -> None:
        if not 0 <= strength < math.inf:
            raise ValueError(f"strength must be a finite number that is not negative, got {strength}. Give one such as 5.")
        if not lrs or not all(0 < lr < math.inf for lr in lrs):
            raise ValueError(f"lrs must be finite numbers above 0, got {[*lrs]}. Give some such as [0.001, 0.01].")
        if not epochs or not all(epoch >= 1 for epoch in epochs):
            raise ValueError(f"epochs must be whole numbers from 1 on, got {[*epochs]}. Give some such as [5, 10].")
        self.strength = strength
        self.lrs = [*lrs]
        self.epochs = sorted({*epochs})

    @override
    def edit(self, module: "UnlearningModule") -> dict[str, Tensor]:
        weights = {name: weight.detach() for name, weight in weights_of(module).items()}
        merged = {name: torch.zeros_like(at_least_float32(weight)) for name, weight in weights.items()}
        signs: dict[str, Tensor] = {}
        weights = {name: local_of(weight) for name, weight in weights.items()}  # of sharded ones, this process has a part
        originals = {name: weight.clone() for name, weight in weights.items()}
        try:
            for candidate in self._candidates(module, weights, originals):
                for name, weight in candidate.items():
                    moved = weight - originals[name]
                    local_of(merged[name]).add_(moved)
                    signs[name] = torch.where(moved.sign() == signs.get(name, moved.sign()), moved.sign(), 0)
        finally:
            _put_back(weights, originals)
        for name, sign in signs.items():
            local_of(merged[name]).mul_(sign.abs() * (-self.strength / (len(self.lrs) * len(self.epochs))))
        return merged

    def _candidates(
        self, module: "UnlearningModule", weights: dict[str, Tensor], originals: dict[str, Tensor]
    ) -> Iterator[dict[str, Tensor]]:
        """One candidate after the other, at least in single precision. ``weights`` are those of the network."""
        for lr in self.lrs:
            trained = {name: at_least_float32(original.clone()) for name, original in originals.items()}
            speed = {name: torch.zeros_like(weight) for name, weight in trained.items()}
            _put_back(weights, originals)
            for epoch in range(1, self.epochs[-1] + 1):
                for gradients in _gradients(module, epoch):
                    for name, weight in weights.items():
                        speed[name].mul_(_MOMENTUM).add_(local_of(gradients[name]))
                        weight.copy_(trained[name].sub_(speed[name], alpha=lr))
                if epoch not in self.epochs:
                    continue
                finite = all(bool(weight.isfinite().all()) for weight in trained.values())
                if not module.trainer.strategy.reduce_boolean_decision(finite):
                    raise ValueError(f"The candidate that is trained with lr {lr} diverged. Give smaller lrs.")
                yield trained


def _put_back(weights: dict[str, Tensor], originals: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        weight.copy_(originals[name])


def _gradients(module: "UnlearningModule", epoch: int) -> Iterator[dict[str, Tensor]]:
    """That of each batch of an epoch, at the weights that the network has by then; the same on every process."""
    data, seed = module.datamodule, epoch_seed(run_seed(), epoch, 0)
    order = torch.randperm(len(data.forget_indices), generator=torch.Generator().manual_seed(seed))

    def loss(samples: Samples) -> Tensor:
        torch.manual_seed(seed + int(samples.indices[0]))  # of noise, where there is any; the run's own state is put back
        return module.task_loss(samples)

    for positions in data.forget_indices[order].split(data.batch_size * module.trainer.world_size):
        sums = gradient_sums(module, batches_at(data, positions), loss=loss, strategy=module.trainer.strategy)
        yield {name: total / len(positions) for name, total in sums.items()}
