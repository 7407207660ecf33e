"""Datasets that hand out whole batches."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from salun_lightning.data import ImageTensors, Samples, joined
from salun_lightning.data.samples import SampleBatches
from tests.small import Pairs, numbered_images, numbers

PIXELS = torch.randint(0, 256, (5, 3, 4, 6), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
TARGETS = [0, 1, 2, 1, 0]


def pairs_of(kind: str) -> Pairs:
    if kind == "pil":
        return Pairs([Image.fromarray(image.permute(1, 2, 0).numpy()) for image in PIXELS], TARGETS)
    return Pairs(list(PIXELS.float() / 255 if kind == "float" else PIXELS), TARGETS)


@pytest.mark.parametrize(
    ("images", "targets"),
    [
        (PIXELS.float(), TARGETS),
        (PIXELS[0], TARGETS),
        (PIXELS, TARGETS[:4]),
    ],
    ids=["float", "one image", "too few targets"],
)
def test_image_tensors_refuse(images: Tensor, targets: list[int]) -> None:
    with pytest.raises(ValueError, match=r"Images must be uint8 of shape \(N, C, H, W\) with N targets, got torch"):
        ImageTensors(images, torch.tensor(targets))


@pytest.mark.parametrize("targets", [TARGETS, np.array(TARGETS, np.uint8), torch.tensor(TARGETS, dtype=torch.int32)])
def test_image_tensors_take_any_integers_for_targets(targets: Any) -> None:
    dataset = ImageTensors(PIXELS, targets)
    assert dataset.targets.dtype == torch.int64
    assert dataset.targets.tolist() == TARGETS
    assert len(dataset) == 5
    assert torch.equal(dataset[3][0], PIXELS[3])
    assert torch.equal(dataset[[3, 1]][0], PIXELS[[3, 1]])


@pytest.mark.parametrize("kind", ["tensors", "pil", "uint8", "float"])
def test_batches_are_floats_between_0_and_1(kind: str) -> None:
    source = ImageTensors(PIXELS, torch.tensor(TARGETS)) if kind == "tensors" else pairs_of(kind)
    samples = SampleBatches(source)[[4, 0, 2]]
    assert isinstance(samples, Samples)
    assert torch.equal(samples.inputs, PIXELS[[4, 0, 2]].float() / 255)
    assert samples.targets.tolist() == [0, 0, 2]
    assert samples.indices.tolist() == [4, 0, 2]
    assert {samples.targets.dtype, samples.indices.dtype} == {torch.int64}


def test_a_grey_picture_has_one_channel() -> None:
    grey = np.arange(24, dtype=np.uint8).reshape(4, 6)
    samples = SampleBatches(Pairs([Image.fromarray(grey)], [0]))[[0]]
    assert torch.equal(samples.inputs[0, 0], torch.from_numpy(grey).float() / 255)


def test_transform_of_tensors_takes_the_whole_uint8_batch() -> None:
    seen = []

    def transform(images: Tensor) -> Tensor:
        seen.append((images.shape, images.dtype))
        return 255 - images

    samples = SampleBatches(ImageTensors(PIXELS, torch.tensor(TARGETS)), transform)[[1, 2]]
    assert seen == [((2, 3, 4, 6), torch.uint8)]
    assert torch.equal(samples.inputs, (255 - PIXELS[[1, 2]]).float() / 255)


@pytest.mark.parametrize("kind", ["pil", "uint8"])
def test_transform_of_other_datasets_takes_one_image(kind: str) -> None:
    seen = []

    def transform(image: Any) -> Tensor:
        seen.append(type(image))
        return torch.full((1, 2, 2), 0.5)

    samples = SampleBatches(pairs_of(kind), transform)[[1, 2]]
    assert len(seen) == 2
    assert issubclass(seen[0], Image.Image if kind == "pil" else Tensor)
    assert torch.equal(samples.inputs, torch.full((2, 1, 2, 2), 0.5))


def test_floats_from_a_transform_are_left_as_they_are() -> None:
    samples = SampleBatches(ImageTensors(PIXELS, torch.tensor(TARGETS)), lambda images: images.double() - 300)[[0]]
    assert torch.equal(samples.inputs, PIXELS[:1].double() - 300)


@pytest.mark.parametrize(
    ("positions", "parts"),
    [
        ([5, 1, 6], {"forget": [5, 6], "retain": [1]}),
        ([6, 5], {"forget": [6, 5]}),
        ([0, 3], {"retain": [0, 3]}),
    ],
)
@pytest.mark.parametrize("tensors", [True, False])
def test_training_batches_have_parts(positions: list[int], parts: dict[str, list[int]], tensors: bool) -> None:
    images = numbered_images(8)
    source = images if tensors else Pairs(list(images.images), images.targets.tolist())
    forget = torch.zeros(8, dtype=torch.bool)
    forget[5:] = True
    batch = SampleBatches(source, forget=forget)[positions]
    assert isinstance(batch, dict)
    assert {name: part.indices.tolist() for name, part in batch.items()} == parts
    assert {name: numbers(part.inputs) for name, part in batch.items()} == parts
    assert {name: part.targets.tolist() for name, part in batch.items()} == {
        name: [i % 3 for i in part] for name, part in parts.items()
    }


def test_joined() -> None:
    images = numbered_images(8)
    first, second = SampleBatches(images)[[1, 2]], SampleBatches(images)[[5]]
    both = joined([first, second])
    assert numbers(both.inputs) == both.indices.tolist() == [1, 2, 5]
    assert both.targets.tolist() == [1, 2, 2]
    assert joined([first]) is first
