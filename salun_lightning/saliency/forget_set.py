"""Where the saliency pass finds the forget set."""

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from salun_lightning.saliency.twins import is_a

_WHOLE = (SequentialSampler, RandomSampler, WeightedRandomSampler, DistributedSampler)


def forget_batches(trainer: Trainer) -> Iterator[Any]:
    """The forget set, once, in order, all of it on every rank.

    Raises:
        MisconfigurationException: There are several training loaders and none is called ``forget``, or with several processes
            it cannot be told which samples a loader has.
    """
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if hasattr(datamodule, "forget_dataloader"):
        yield from _in_order(datamodule.forget_dataloader(), world_size=1)  # all of it on every rank: that is its contract
        return
    loaders = trainer.train_dataloader
    if isinstance(loaders, Mapping) and "forget" in loaders:
        yield from ({"forget": batch} for batch in _in_order(loaders["forget"], trainer.world_size))
        return
    if isinstance(loaders, Mapping | list | tuple):
        raise MisconfigurationException(
            "There are several training loaders and none is called 'forget', so it is not clear what is to be forgotten. Give"
            " the datamodule a forget_dataloader()."
        )
    yield from _in_order(loaders, trainer.world_size)


def _in_order(loader: Any, world_size: int) -> Iterable[Any]:
    """The loader without shuffling, dropping, padding or sharing out."""
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        batches = loader.batch_sampler
        if type(batches) is BatchSampler:  # not one that puts batches together by a rule of its own
            return DataLoader(
                loader.dataset,
                batch_size=batches.batch_size,
                sampler=_positions(batches.sampler),
                collate_fn=loader.collate_fn,
                num_workers=loader.num_workers,
                multiprocessing_context=loader.multiprocessing_context,
                worker_init_fn=loader.worker_init_fn,
            )
    if world_size > 1:
        raise MisconfigurationException(
            "With several processes the forget set must be a map-style dataset in a DataLoader with a batch_size, so that each"
            " sample counts exactly once. Give the datamodule such a forget_dataloader(), or compute the mask in one process"
            " and pass mask=<file>."
        )
    batches_as_they_come: Iterable[Any] = loader
    return batches_as_they_come


def _positions(sampler: Any) -> list[Any] | None:
    """The samples that a sampler picks, each once, in order; None for the whole dataset."""
    if is_a(sampler, DistributedSamplerWrapper):
        sampler = sampler.dataset._sampler  # Lightning put it around the user's
    if isinstance(sampler, _WHOLE) or not isinstance(sampler, Sized):
        return None
    return sorted(set(sampler))  # type: ignore[call-overload]
