"""Batches of samples, and the datasets that hand them out a whole batch at a time."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision.transforms.functional import pil_to_tensor
from typing_extensions import override

Transform = Callable[[Any], Any]


class Samples(NamedTuple):
    """A batch of samples of one set."""

    inputs: Tensor
    """What the network sees: float images of shape (B, C, H, W) in [0, 1]."""
    targets: Tensor
    """Classes, int64 of shape (B,)."""
    indices: Tensor
    """Positions in the set that the samples come from, int64 of shape (B,)."""


class Requested(NamedTuple):
    """A batch of images that a generative model is asked for."""

    targets: Tensor
    """Classes, int64 of shape (B,)."""
    indices: Tensor
    """Numbers of the images within their class, int64 of shape (B,)."""


class ImageRequests(Dataset[Requested]):
    """Asks for equally many images of each of some classes: index it with a list of positions.

    Args:
        classes: The classes.
        per_class: How many images of each.
    """

    def __init__(self, classes: Sequence[int], per_class: int) -> None:
        self.targets = torch.tensor(list(classes)).repeat_interleave(per_class)
        self.indices = torch.arange(per_class).repeat(len(classes))

    def __len__(self) -> int:
        return len(self.targets)

    @override
    def __getitem__(self, index: list[int]) -> Requested:
        return Requested(self.targets[index], self.indices[index])


def joined(parts: Sequence[Samples]) -> Samples:
    """One batch of several."""
    return parts[0] if len(parts) == 1 else Samples(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


class ImageTensors(Dataset[tuple[Tensor, Tensor]]):
    """Images that fit in memory, as one uint8 tensor. A batch is one indexing operation, on the device they lie on.

    The datamodule moves them to the accelerator that trains, where they stay.

    Args:
        images: uint8 of shape (N, C, H, W).
        targets: Classes, integers of shape (N,).
    """

    def __init__(self, images: Tensor, targets: Tensor | Sequence[int]) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) != len(targets):
            raise ValueError(
                f"Images must be uint8 of shape (N, C, H, W) with N targets, got {images.dtype} of shape"
                f" {tuple(images.shape)} and {len(targets)} targets."
            )
        self.images = images
        self.targets = torch.as_tensor(targets).long()

    def __len__(self) -> int:
        return len(self.targets)

    @override
    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        """One image or, with a list or tensor of positions, a batch of them: uint8 images and classes."""
        return self.images[index], self.targets[index]


class SampleBatches(Dataset[Any]):
    """Hands out whole batches of a dataset: index it with a list of positions.

    Args:
        source: Map-style dataset of (image, class) pairs.
        transform: For :class:`ImageTensors`, applied to a whole uint8 batch (B, C, H, W) where the images lie; for other
            datasets, applied to each image. What is uint8 after it, or still a PIL image, is scaled to floats in [0, 1].
        forget: For a training set, a bool tensor (N,) that is true for what is to be forgotten. Batches then are
            dictionaries with the parts ``forget`` and ``retain``, of which either may be absent.
    """

    def __init__(self, source: Any, transform: Transform | None = None, forget: Tensor | None = None) -> None:
        self.source = source
        self.transform = transform
        self.forget = forget

    def __len__(self) -> int:
        return len(self.source)

    @override
    def __getitem__(self, index: list[int]) -> Samples | dict[str, Samples]:
        positions = torch.tensor(index)
        samples = self._of_tensors(positions) if isinstance(self.source, ImageTensors) else self._one_by_one(positions)
        if not samples.inputs.is_floating_point():
            samples = samples._replace(inputs=samples.inputs.float().div_(255))
        if self.forget is None:
            return samples
        forget = self.forget[positions]
        parts = {"forget": forget.nonzero().flatten(), "retain": (~forget).nonzero().flatten()}
        return {
            name: samples if len(rows) == len(positions) else Samples(*(field[rows.to(field.device)] for field in samples))
            for name, rows in parts.items()
            if len(rows)
        }

    def _of_tensors(self, positions: Tensor) -> Samples:
        positions = positions.to(self.source.images.device, non_blocking=True)
        images, targets = self.source[positions]
        if self.transform is not None:
            images = self.transform(images)
        return Samples(images, targets, positions)

    def _one_by_one(self, positions: Tensor) -> Samples:
        pairs = [self.source[int(position)] for position in positions]
        images = [image if self.transform is None else self.transform(image) for image, _ in pairs]
        images = [pil_to_tensor(image) if isinstance(image, Image) else image for image in images]
        return Samples(default_collate(images), torch.tensor([int(target) for _, target in pairs]), positions)
