"""RL: train what is to be forgotten on wrong labels. With a saliency mask, this is SalUn."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, TypeVar

from torch import Tensor
from typing_extensions import override

from salun_lightning.data import Order, Samples, joined, run_seed
from salun_lightning.methods.base import Method

if TYPE_CHECKING:
    from salun_lightning.modules.base import UnlearningModule

_MASK_32 = 0xFFFFFFFF
_Numbers = TypeVar("_Numbers", int, Tensor)


class RandomLabel(Method):
    r"""RL: :math:`\min_\theta E_{D_f, y' \neq y} \ell(x, y') + E_{D_r} \ell(x, y)` (Fan et al., ICLR 2024, alpha = 1).

    A label is never the true one, and uniform over the others. It depends on the seed, the epoch and the sample alone, not on
    batches, processes or where a run was resumed.

    Args:
        redraw: Draw new labels each epoch, as released for CIFAR-10; else once.
        seed: Seed of the labels; by default that of the run.
        order: As released, each epoch goes through the forget set first and then through the retain set (``sequential``), which
            may undo what came before. With ``paired`` both are in one batch, and the smaller set is repeated. With ``mixed``
            each image counts once, so that the two terms count by the sizes of their sets.

    Raises:
        ValueError: There is only one class, so there is no wrong label.
    """

    def __init__(
        self, redraw: bool = True, seed: int | None = None, order: Literal["sequential", "paired", "mixed"] = "sequential"
    ) -> None:
        self.redraw = redraw
        self.seed = seed
        self.order: Order = order

    @override
    def loss(self, module: "UnlearningModule", batch: Mapping[str, Samples]) -> Tensor:
        parts = dict(batch)
        if "forget" in parts:
            epoch = module.current_epoch if self.redraw else 0
            parts["forget"] = self.relabelled(parts["forget"], module.num_classes, epoch)
        return module.task_loss(joined(list(parts.values())))

    def relabelled(self, samples: Samples, num_classes: int, epoch: int) -> Samples:
        """The same samples with wrong labels.

        Args:
            samples: Samples with their true classes.
            num_classes: The number of classes, at least 2.
            epoch: Labels of different epochs are drawn independently.
        """
        if num_classes < 2:
            raise ValueError("Random labels need at least two classes.")
        seed = run_seed() if self.seed is None else self.seed
        draws = hashed(samples.indices + hashed(seed * 1_000_003 + epoch))
        return samples._replace(targets=(samples.targets + 1 + draws % (num_classes - 1)) % num_classes)


def hashed(numbers: _Numbers) -> _Numbers:
    """Integers that look drawn at random, of 32 bits, from others: the random numbers that belong to a sample.

    Two rounds of multiply and xor-shift with odd constants.
    """
    numbers = numbers & _MASK_32
    for multiplier in (0x45D9F3B, 0x119DE1F3):
        numbers = ((numbers ^ (numbers >> 16)) * multiplier) & _MASK_32
    return numbers ^ (numbers >> 16)
