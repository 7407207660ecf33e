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
    """Asks for equally many images of each of some conditions: index it with a list of positions.

    Args:
        conditions: The conditions.
        per_condition: How many images of each.
    """

    def __init__(self, conditions: Sequence[int], per_condition: int) -> None:
        self.targets = torch.tensor(list(conditions)).repeat_interleave(per_condition)
        self.indices = torch.arange(per_condition).repeat(len(conditions))

    def __len__(self) -> int:
        return len(self.targets)

    @override
    def __getitem__(self, index: list[int]) -> Requested:
        return Requested(self.targets[index], self.indices[index])
