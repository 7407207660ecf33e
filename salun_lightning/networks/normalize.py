"""Normalisation inside the network, so that every caller hands it images in [0, 1]."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override


class Normalize(nn.Module):
    """Subtract the mean and divide by the standard deviation of each channel.

    Args:
        mean: Mean of each channel of images in [0, 1].
        std: Standard deviation of each channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        # constants of the data set, not state of the network: a checkpoint holds plain weights only
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Normalise images of shape (B, C, H, W)."""
        return (images - self.mean) / self.std
