"""Normalisation inside the network, so that every caller hands it images in [0, 1]."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override


class Normalize(nn.Module):
    """Subtract the mean and divide by the standard deviation of each channel.

    Args:
        mean: Mean of each channel of images in [0, 1].
        std: Standard deviation of each channel.

    Raises:
        ValueError: They are not of equally many channels, or a standard deviation is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(math.isfinite(number) for number in (*mean, *std)) or min(std, default=0) <= 0:
            raise ValueError(
                f"mean and std are one finite number for each channel, and std is positive; got {list(mean)} and {list(std)}."
            )
        # constants of the data set, not state of the network: a checkpoint holds plain weights only
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Normalise images of shape (B, C, H, W).

        Raises:
            ValueError: The images have other channels than the mean.
        """
        if len(self.mean) not in (1, images.shape[1]):
            raise ValueError(f"mean and std are of {len(self.mean)} channels, but the images have {images.shape[1]}")
        return (images - self.mean) / self.std
