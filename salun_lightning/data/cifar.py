"""CIFAR-10 and CIFAR-100, through torchvision."""

from pathlib import Path
from typing import Any

import torch
from torchvision.datasets import CIFAR10, CIFAR100
from typing_extensions import override

from salun_lightning.data.augment import RandomCropFlip
from salun_lightning.data.datamodule import ForgetRetainDataModule, Sources
from salun_lightning.data.samples import ImageTensors, Transform


class CIFAR10DataModule(ForgetRetainDataModule):
    """CIFAR-10: 50,000 training and 10,000 test images of 32 x 32 pixels in 10 classes.

    The paper's protocol sets a tenth of each class aside (``val_fraction=0.1``).

    Args:
        root: Folder of the data set.
        download: Whether torchvision may download it there.
        augment: Whether training images are cropped and mirrored at random, where no ``train_transform`` is given.
        train_transform: Augments training images in another way.
        **kwargs: See ``ForgetRetainDataModule``.
    """

    dataset = CIFAR10

    def __init__(
        self,
        root: str | Path = "data",
        download: bool = True,
        augment: bool = True,
        train_transform: Transform | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(train_transform=RandomCropFlip() if augment and train_transform is None else train_transform, **kwargs)
        self.root = root
        self.download = download

    @override
    def prepare_data(self) -> None:
        for train in (True, False) if self.download else ():
            self.dataset(self.root, train=train, download=True)

    @override
    def load(self) -> Sources:
        train, test = (self.dataset(self.root, train=train) for train in (True, False))
        return Sources(_in_memory(train), _in_memory(test), train.classes)


class CIFAR100DataModule(CIFAR10DataModule):
    """CIFAR-100: 50,000 training and 10,000 test images of 32 x 32 pixels in 100 classes.

    Args:
        **kwargs: See ``CIFAR10DataModule``.
    """

    dataset = CIFAR100


def _in_memory(dataset: CIFAR10) -> ImageTensors:
    return ImageTensors(torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(dataset.targets))
