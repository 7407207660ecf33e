"""Fisher forgetting: noise on all weights, and most of it where the retain set does not need them."""

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from salun_lightning.data import Samples, epoch_seed, run_seed
from salun_lightning.methods.base import Kind
from salun_lightning.methods.one_shot import OneShot, batches_at, spread
from salun_lightning.saliency import gradient_sums
from salun_lightning.weights import laid_like

if TYPE_CHECKING:
    from salun_lightning.modules.base import UnlearningModule
    from salun_lightning.modules.classifier import ImageClassifier


class FisherForgetting(OneShot):
    r"""Fisher forgetting (Golatkar et al., CVPR 2020).

    .. math::
        \theta_u = \theta_o + \alpha (F + \varepsilon)^{-1/4} \odot n, \quad n \sim N(0, I), \quad
        F_i = E_{x \in D_r} \sum_y p(y | x) \left( \frac{\partial \log p(y | x)}{\partial \theta_i} \right)^2

    Such noise has the covariance :math:`\Sigma` that minimises
    :math:`\operatorname{tr}(F \Sigma) + \alpha^4 \operatorname{tr}(\Sigma^{-1})`: what it costs on the retain set, and what it
    leaves visible of any difference of the weights. (The released code takes -1/2, and has rules of its own for the last layer
    and for a forgotten class.) The noise depends on the seed of the run alone. The cost is as many backward passes for each
    retained sample as there are classes.

    Args:
        alpha: :math:`\alpha`, the strength of the noise. The default is for the digits.
        power: The power of :math:`F`, without its sign.
        floor: :math:`\varepsilon`, which keeps the noise on weights finite that the retain set does not use at all.
        samples: How many retained samples :math:`F` is made of, spread evenly over the set; None for all of them.

    Raises:
        ValueError: ``alpha`` or ``power`` is negative or not finite, or ``floor`` or ``samples`` is not positive.
    """

    kind: Kind = "classifier"

    def __init__(self, alpha: float = 4e-3, power: float = 0.25, floor: float = 1e-8, samples: int | None = None) -> None:
        if not (0 <= alpha < math.inf and 0 <= power < math.inf):
            raise ValueError(
                f"alpha and power must be finite and not negative, got {alpha} and {power}. Give some such as 0.004 and 0.25."
            )
        if not 0 < floor < math.inf:
            raise ValueError(f"floor must be a finite number above 0, got {floor}. Give one such as 1e-8.")
        if samples is not None and samples < 1:
            raise ValueError(f"samples must be positive, got {samples}. Give a number such as 1000, or null for all.")
        self.alpha = alpha
        self.power = power
        self.floor = floor
        self.samples = samples

    @override
    def edit(self, module: "UnlearningModule") -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(epoch_seed(run_seed(), -1, 0))  # no epoch draws from it
        edit = {}
        for name, fisher in self.fisher(cast("ImageClassifier", module)).items():
            noise = laid_like(torch.randn(fisher.shape, generator=generator), fisher)  # the same on any device
            edit[name] = noise * (fisher + self.floor).pow(-self.power) * self.alpha
        return edit

    def fisher(self, module: "ImageClassifier") -> dict[str, Tensor]:
        """The diagonal of the Fisher information of each weight over the retain set, by plain name."""
        data, positions = module.datamodule, module.datamodule.retain_indices
        batches: Iterable[Samples] = data.set_dataloader("retain")
        if self.samples is not None:
            positions = spread(positions, self.samples)
            batches = batches_at(data, positions)

        def loss(sample: Samples) -> Tensor:  # whose gradient, squared, has the weight p(y|x)
            likely = functional.log_softmax(module.logits(sample.inputs).float(), 1).gather(1, sample.targets[:, None])
            return -(likely * (likely.detach() / 2).exp()).mean()

        labelled = _with_every_label(batches, module.num_classes)
        sums = gradient_sums(module, labelled, squared=True, loss=loss, strategy=module.trainer.strategy)
        return {name: total / len(positions) for name, total in sums.items()}


def _with_every_label(batches: Iterable[Samples], num_classes: int) -> Iterator[Samples]:
    for batch in batches:
        for label in range(num_classes):
            yield batch._replace(targets=torch.full_like(batch.targets, label))
