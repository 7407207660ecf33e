"""Augmentation of whole batches, each image with its own draw, on the device where the images lie."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override


class RandomCropFlip(nn.Module):
    """Pad with zeros and crop back at a random place; mirror half of the images. The CIFAR recipe, a batch at a time.

    Args:
        padding: Pixels of zeros on each side.
        flip: Whether to mirror images left to right with probability one half.

    Example:
        >>> RandomCropFlip(padding=4)(torch.zeros(8, 3, 32, 32, dtype=torch.uint8)).shape
        torch.Size([8, 3, 32, 32])
    """

    def __init__(self, padding: int = 4, flip: bool = True) -> None:
        super().__init__()
        self.padding = padding
        self.flip = flip

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Augment images of shape (B, C, H, W) and any dtype."""
        size, _, height, width = images.shape
        device = images.device
        top, left = torch.randint(0, 2 * self.padding + 1, (2, size, 1), device=device)
        rows = top + torch.arange(height, device=device)  # (B, H)
        columns = left + torch.arange(width, device=device)  # (B, W)
        if self.flip:
            columns = torch.where(torch.rand(size, 1, device=device) < 0.5, columns.flip(1), columns)
        padded = functional.pad(images, [self.padding] * 4)
        batch = torch.arange(size, device=device)
        # advanced indices around the channel slice put the channels last: (B, H, W, C)
        return padded[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
