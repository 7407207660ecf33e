"""What goes wrong in training, said in a sentence."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor


@contextmanager
def batch_norm_explained(sizes: Mapping[str, int]) -> Iterator[None]:
    """Explain the error of a BatchNorm that gets a single sample.

    Args:
        sizes: How many samples each part of the batch has.

    Raises:
        MisconfigurationException: There was such an error.
    """
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise MisconfigurationException(
            f"BatchNorm cannot be trained on a single sample, and a batch has {dict(sizes)}. Choose a batch_size that leaves no"
            " single sample over; to forget a single image, choose a method and order that put both sets into one batch"
            " (RandomLabel, mixed)."
        ) from error


class Divergence:
    """Notes losses that are not finite without waiting for the device, and says so once, at the end of the epoch."""

    def __init__(self) -> None:
        self._finite: Tensor | None = None
        self._said = False

    def note(self, loss: Tensor) -> None:
        """Take the loss of a step."""
        finite = loss.detach().isfinite()
        self._finite = finite if self._finite is None else self._finite & finite

    def report(self, module: LightningModule) -> None:
        """Warn, on the first process, if a loss of this epoch was not finite on any. All of them must call it."""
        finite, self._finite = self._finite, None
        if finite is None or self._said:
            return
        lost: Tensor = module.trainer.strategy.reduce((~finite).float(), reduce_op="sum")
        if lost > 0:
            self._said = True
            rank_zero_warn(
                f"The loss was NaN or infinite in epoch {module.current_epoch}: the training has diverged. Lower the"
                " optimizer's learning rate, or set the trainer's gradient_clip_val."
            )
