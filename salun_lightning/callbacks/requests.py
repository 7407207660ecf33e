"""What a generative model is asked for."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override


class Requested(NamedTuple):
    """A batch of images that a generative model is asked for."""

    targets: Tensor
    """Conditions, int64 of shape (B,)."""
    indices: Tensor
    """Numbers of the images within their condition, int64 of shape (B,)."""


class ImageRequests(Dataset[Requested]):
    """Asks for images of some conditions: index it with a list of positions.

    Args:
        conditions: The conditions.
        per_condition: How many images of each; one number, or one for each condition.
    """

    def __init__(self, conditions: Sequence[int], per_condition: int | Sequence[int]) -> None:
        counts = [per_condition] * len(conditions) if isinstance(per_condition, int) else list(per_condition)
        pairs = [(condition, n) for condition, count in zip(conditions, counts, strict=True) for n in range(count)]
        self.targets, self.indices = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)

    def __len__(self) -> int:
        return len(self.targets)

    @override
    def __getitem__(self, index: list[int]) -> Requested:
        return Requested(self.targets[index], self.indices[index])
