"""What goes wrong in training, said in a sentence."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR


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


def check_cycle(scheduler: Any, epochs: int | None) -> None:
    """Warn of a cycle of learning rates that counts epochs, if it has not as many of them as the run.

    Args:
        scheduler: A scheduler that steps each epoch.
        epochs: How many epochs the run has.
    """
    if isinstance(scheduler, OneCycleLR) and epochs is not None and 0 < epochs != scheduler.total_steps:
        rank_zero_warn(
            f"OneCycleLR has {scheduler.total_steps} steps and steps each epoch, of which the run has {epochs}. Give it as many"
            " steps, or count optimizer steps: lr_interval: step."
        )


class EpochLoss:
    """The mean loss of an epoch, without waiting for the device. Where it is not finite, this is said once."""

    def __init__(self) -> None:
        self._sum: Tensor | float = 0.0
        self._samples = 0
        self._said = self._new = False

    def add(self, loss: Tensor, samples: int) -> None:
        """Take the loss of a batch, a mean over so many samples."""
        self._new = True
        self._sum = self._sum + loss.detach().float() * samples
        self._samples += samples

    def none_new(self) -> bool:
        """Whether none was taken since this was asked last."""
        new, self._new = self._new, False
        return not new

    def report(self, module: LightningModule) -> None:
        """Log the mean over all processes, and warn, on the first, if it is not finite. All of them must call it."""
        if not isinstance(self._sum, Tensor):
            return
        mean, samples = self._sum / self._samples, self._samples
        self._sum, self._samples = 0.0, 0
        # once an epoch: to log each step takes longer than the step of a small optimizer
        module.log("train/loss", mean, prog_bar=True, batch_size=samples, sync_dist=True)
        if self._said:
            return
        lost: Tensor = module.trainer.strategy.reduce((~mean.isfinite()).float(), reduce_op="sum")
        if lost > 0:
            self._said = True
            rank_zero_warn(
                f"The loss was NaN or infinite in epoch {module.current_epoch}: the training has diverged. Lower the"
                " optimizer's learning rate, or set the trainer's gradient_clip_val."
            )
