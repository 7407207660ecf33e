"""Augmentation of whole batches."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from salun_lightning.data import RandomCropFlip

IMAGES = torch.randint(1, 256, (6, 3, 8, 7), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def one_by_one(images: Tensor, padding: int, flip: bool) -> Tensor:
    """The same draws, applied to one image after the other."""
    size, _, height, width = images.shape
    top, left = torch.randint(0, 2 * padding + 1, (2, size, 1)).squeeze(2).tolist()
    mirror = (torch.rand(size, 1) < 0.5).flatten().tolist() if flip else [False] * size
    results = []
    for image, row, column, mirrored in zip(images, top, left, mirror, strict=True):
        crop = functional.pad(image, [padding] * 4)[:, row : row + height, column : column + width]
        results.append(crop.flip(2) if mirrored else crop)
    return torch.stack(results)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("padding", "flip"), [(2, True), (4, False), (0, True)])
def test_like_one_image_at_a_time(padding: int, flip: bool, dtype: torch.dtype) -> None:
    images = IMAGES.to(dtype)
    torch.manual_seed(0)
    augmented = RandomCropFlip(padding, flip)(images)
    torch.manual_seed(0)
    assert augmented.dtype == dtype
    assert torch.equal(augmented, one_by_one(images, padding, flip))


def test_no_padding_and_no_flip_change_nothing() -> None:
    assert torch.equal(RandomCropFlip(0, flip=False)(IMAGES), IMAGES)


def test_each_image_has_its_own_draw() -> None:
    torch.manual_seed(0)
    same = IMAGES[:1].expand(400, -1, -1, -1)
    augmented = RandomCropFlip(padding=2)(same)
    kinds, counts = augmented.flatten(1).unique(dim=0, return_counts=True)
    assert len(kinds) == 5 * 5 * 2
    # each of the 50 outcomes is binomial(400, 1/50): 8 +- 2.8; 30 is eight standard deviations away
    assert counts.max() < 30


def test_does_not_write_to_its_input() -> None:
    before = IMAGES.clone()
    RandomCropFlip()(IMAGES)
    assert torch.equal(IMAGES, before)
