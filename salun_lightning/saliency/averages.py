"""Averages of weights, as Lightning's ``WeightAveraging`` keeps them, held still like the weights themselves."""

from collections.abc import Callable, Iterator
from functools import partial

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn

from salun_lightning.saliency.held import HeldBuffer, HeldModule, buffers_of, put_back
from salun_lightning.saliency.twins import is_a


def hold_averages(trainer: Trainer, held: HeldModule) -> None:
    """Put averages back after each update. Averaging rounds: the mean of a number with itself can be off by one bit.

    Args:
        trainer: Its callbacks may keep averages.
        held: What is held still of the module that is averaged.
    """
    for average in _averages(trainer):
        averaged = average.module
        assert isinstance(averaged, nn.Module)
        means = dict(averaged.named_parameters())
        weights = {
            means[name]: held.weights[weight].on(means[name].device)
            for name, weight in held.module.named_parameters()
            if weight in held.weights and name in means
        }
        buffers = [
            HeldBuffer(child, own, held.buffers[name].original.to(child._buffers[own].device))  # type: ignore[union-attr]
            for name, (child, own) in buffers_of(averaged).items()
            if name in held.buffers
        ]
        put_back(weights, buffers)  # it may have been copied before the original model was loaded
        _after_each_update(average, partial(put_back, weights, buffers))


def _after_each_update(average: nn.Module, restore: Callable[[], None]) -> None:
    update = average.update_parameters

    def update_and_put_back(module: nn.Module) -> None:
        update(module)  # type: ignore[operator]
        restore()

    average.update_parameters = update_and_put_back  # type: ignore[assignment]


def release_averages(trainer: Trainer) -> None:
    """Let averages move again."""
    for average in _averages(trainer):
        vars(average).pop("update_parameters", None)


def _averages(trainer: Trainer) -> Iterator[nn.Module]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if is_a(callback, WeightAveraging) and callback._average_model is not None:
            yield callback._average_model
