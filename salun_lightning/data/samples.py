"""Batches of samples, and the datasets that hand them out a whole batch at a time."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.transforms.functional import pil_to_tensor
from typing_extensions import override

from salun_lightning.data.images import eight_bits
from salun_lightning.data.targets import class_numbers, contradiction

Transform = Callable[[Any], Any]


class Samples(NamedTuple):
    """A batch of samples of one set."""

    inputs: Tensor
    """What the network sees: float images of shape (B, C, H, W) in [0, 1]."""
    targets: Tensor
    """Classes, int64 of shape (B,)."""
    indices: Tensor
    """Positions in the set that the samples come from, int64 of shape (B,)."""


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
        self.targets = class_numbers(targets).to(images.device)

    def __len__(self) -> int:
        return len(self.targets)

    @override
    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        """One image or, with a list or tensor of positions, a batch of them: uint8 images and classes."""
        return self.images[index], self.targets[index]


class SampleBatches(Dataset[Any]):
    """Hands out whole batches of a dataset: index it with a list of positions.

    Args:
        source: Map-style dataset of (image, class) pairs, longer tuples or mappings.
        transform: For :class:`ImageTensors`, applied to a whole uint8 batch (B, C, H, W) where the images lie; for other
            datasets, applied to each image. What is uint8 after it, or still a PIL image, is scaled to floats in [0, 1].
        forget: For a training set, a bool tensor (N,) that is true for what is to be forgotten. Batches then are
            dictionaries with the parts ``forget`` and ``retain``, of which either may be absent.
        targets: The classes that the split was made with, int64 of shape (N,): those of the samples must be the same.
        keys: Where a sample holds its image and its class.
    """

    def __init__(
        self,
        source: Any,
        transform: Transform | None = None,
        forget: Tensor | None = None,
        targets: Tensor | None = None,
        keys: tuple[int | str, int | str] = (0, 1),
    ) -> None:
        self.source = source
        self.transform = transform
        self.forget = forget
        self.targets = targets
        self.keys = keys

    def __len__(self) -> int:
        return len(self.source)

    @override
    def __getitem__(self, index: list[int]) -> Samples | dict[str, Samples]:
        positions = torch.tensor(index)
        samples = self.samples(positions)
        if self.forget is None:
            return samples
        forget = self.forget[positions]
        parts = {"forget": forget.nonzero().flatten(), "retain": (~forget).nonzero().flatten()}
        return {
            name: samples if len(rows) == len(positions) else Samples(*(field[rows.to(field.device)] for field in samples))
            for name, rows in parts.items()
            if len(rows)
        }

    def samples(self, positions: Tensor) -> Samples:
        """One batch that is not divided into parts.

        Raises:
            ValueError: The images differ in size, are of a type without a scale, or the targets are not those of the split.
        """
        samples = self._of_tensors(positions) if isinstance(self.source, ImageTensors) else self._one_by_one(positions)
        kind = samples.inputs.dtype
        if kind.is_floating_point:
            return samples
        if kind not in _SCALES:
            raise ValueError(f"Images of {kind} have no known scale. Make them uint8, uint16 or floats in [0, 1].")
        return samples._replace(inputs=samples.inputs.float().div_(_SCALES[kind]))

    def _of_tensors(self, positions: Tensor) -> Samples:
        positions = positions.to(self.source.images.device, non_blocking=True)
        images, targets = self.source[positions]
        if self.transform is not None:
            images = self.transform(images)
        return Samples(images, targets, positions)

    def _one_by_one(self, positions: Tensor) -> Samples:
        samples = [self.source[int(position)] for position in positions]
        images, targets = ([_part(sample, key) for sample in samples] for key in self.keys)
        if self.transform is not None:
            images = [self.transform(image) for image in images]
        images = [pil_to_tensor(eight_bits(image)) if isinstance(image, Image) else image for image in images]
        for position, image in zip(positions.tolist(), images, strict=True):
            if image.shape != images[0].shape:
                raise ValueError(
                    f"Images must be equal in size, but number {int(positions[0])} of the data is {tuple(images[0].shape)} and"
                    f" number {position} is {tuple(image.shape)}. Give transforms that make them so, such as Resize and"
                    " CenterCrop of torchvision, as train_transform and eval_transform."
                )
        return Samples(default_collate(images), self._checked(class_numbers(targets), positions), positions)

    def _checked(self, targets: Tensor, positions: Tensor) -> Tensor:
        if self.targets is not None:
            expected = self.targets[positions]
            for row in (targets != expected).nonzero().flatten()[:1].tolist():
                raise ValueError(contradiction(int(positions[row]), int(targets[row]), int(expected[row])))
        return targets


def loader_of(batches: SampleBatches, sampler: Sampler[Any], num_workers: int, device: torch.device | None) -> DataLoader[Any]:
    """A loader of whole batches.

    Args:
        batches: The samples.
        sampler: Yields the positions of one batch after the other; its ``generator``, if it has one, seeds the workers.
        num_workers: Loader processes, for datasets that are not held in memory.
        device: Where images that are held in memory are moved, and stay; None leaves them where they are.
    """
    if isinstance(batches.source, ImageTensors):
        num_workers = 0  # a batch is one indexing operation where the images lie: a worker could only be slower
        if device is not None:
            batches.source.images = batches.source.images.to(device)
            batches.source.targets = batches.source.targets.to(device)
    generator = getattr(sampler, "generator", None)
    return DataLoader(batches, sampler=sampler, batch_size=None, num_workers=num_workers, generator=generator)


_SCALES = {torch.uint8: 255, torch.uint16: 65535}


def _part(sample: Any, key: int | str) -> Any:
    """What a sample holds under a key or at a position."""
    try:
        return sample[key]
    except (KeyError, IndexError, TypeError):
        has = f"the keys {', '.join(map(str, sample))}" if isinstance(sample, Mapping) else f"the type {type(sample).__name__}"
        raise ValueError(
            f"A sample of the data has {has}, and nothing under {key!r}. Set input_key and target_key to where it holds its"
            " image and its class."
        ) from None
