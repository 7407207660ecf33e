"""Images that the original model draws, for methods that look at no others."""

from typing import TYPE_CHECKING

import torch

from salun_lightning.data import Samples

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from salun_lightning.modules.diffusion import Diffusion


def drawn_by_original(model: "Diffusion", conditions: "Sequence[int]", images: int) -> Samples:
    """Images of some conditions by the original model: the same in every process, and after a run was resumed.

    Args:
        model: The model, which is trained.
        conditions: The conditions.
        images: How many of each, one behind the other.
    """
    numbers = torch.arange(len(conditions) * images)
    wanted = Samples(numbers, torch.tensor(conditions)[numbers // images], numbers)
    with torch.no_grad():
        size = model.datamodule.batch_size
        parts = [model.sample(part.targets, part.indices, original=True) for part in in_batches(wanted, size)]
    drawn = torch.cat(parts)
    return Samples(drawn, wanted.targets.to(drawn.device), wanted.indices.to(drawn.device))


def in_batches(samples: Samples, size: int) -> "Iterator[Samples]":
    """The samples, so many at a time."""
    for fields in zip(*(field.split(size) for field in samples), strict=True):
        yield Samples(*fields)
