"""Street View House Numbers, through torchvision."""

from pathlib import Path
from typing import Any

import torch
from torchvision.datasets import SVHN
from typing_extensions import override

from salun_lightning.data.datamodule import ForgetRetainDataModule, Sources
from salun_lightning.data.samples import ImageTensors


class SVHNDataModule(ForgetRetainDataModule):
    """SVHN: 73,257 training and 26,032 test images of 32 x 32 pixels in 10 classes, without augmentation.

    Args:
        root: Folder of the data set.
        download: Whether torchvision may download it there.
        **kwargs: See ``ForgetRetainDataModule``.
    """

    def __init__(self, root: str | Path = "data", download: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = root
        self.download = download

    @override
    def prepare_data(self) -> None:
        for split in ("train", "test") if self.download else ():
            SVHN(str(self.root), split=split, download=True)

    @override
    def load(self) -> Sources:
        train, test = (SVHN(str(self.root), split=split) for split in ("train", "test"))
        return Sources(_in_memory(train), _in_memory(test))


def _in_memory(dataset: SVHN) -> ImageTensors:
    return ImageTensors(torch.from_numpy(dataset.data), torch.from_numpy(dataset.labels))
