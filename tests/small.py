"""Small data that the tests share. Every pixel of image number i is i, so that an image tells where it comes from."""

import socket
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from salun_lightning.data import ForgetRandom, ForgetRequest, ForgetRetainDataModule, ImageTensors

CLASSIFIER_OF_DIGITS = (  # a command line without a method
    "--model=ImageClassifier",
    "--model.network=SmallResNet",
    "--model.network.num_classes=10",
    "--data=DigitsDataModule",
    "--data.forget=ForgetRandom",
    "--data.forget.count=9",
)


def numbered_images(count: int, classes: int = 3, size: int = 4) -> ImageTensors:
    """Images whose pixels are their number, of classes 0, 1, 2, 0, 1, 2, ..."""
    pixels = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(count, 1, size, size).clone()
    return ImageTensors(pixels, torch.arange(count) % classes)


def numbers(inputs: Tensor) -> list[int]:
    """Which images a batch of untouched images holds."""
    assert torch.equal(inputs, inputs[:, :1, :1, :1].expand_as(inputs))
    return (inputs[:, 0, 0, 0] * 255).round().long().tolist()


def free_port() -> int:
    """Where processes can meet."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


class Pairs(Dataset[Any]):
    """A map-style dataset of (image, class) pairs, as anybody would write it."""

    def __init__(self, images: list[Any], targets: list[int]) -> None:
        self.images = images
        self.targets = targets

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if not isinstance(index, int):
            raise TypeError(f"a map-style dataset is asked for one sample at a time, got {index!r}")
        return self.images[index], self.targets[index]


def small_datamodule(forget: ForgetRequest | None = None, train: int = 60, **kwargs: Any) -> ForgetRetainDataModule:
    """A datamodule over numbered images, 12 of them for testing, that is set up."""
    datamodule = ForgetRetainDataModule(
        forget or ForgetRandom(count=12), numbered_images(train), numbered_images(12), **{"batch_size": 8, **kwargs}
    )
    datamodule.setup()
    return datamodule


class Numbered(Pairs):
    """Numbered images as a dataset that a configuration can name."""

    def __init__(self, count: int) -> None:
        images = numbered_images(count)
        super().__init__(list(images.images), images.targets.tolist())
