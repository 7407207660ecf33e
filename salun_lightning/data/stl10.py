"""STL-10, through torchvision."""

from pathlib import Path
from typing import Any

import torch
from torchvision.datasets import STL10
from torchvision.transforms.v2.functional import resize
from typing_extensions import override

from salun_lightning.data.datamodule import ForgetRetainDataModule, Sources
from salun_lightning.data.samples import ImageTensors


class STL10DataModule(ForgetRetainDataModule):
    """STL-10: 5,000 training and 8,000 test images of 96 x 96 pixels in 10 classes; without those that have no label.

    Args:
        root: Folder of the data set.
        download: Whether torchvision may download it there.
        image_size: Height and width that images are scaled to.
        **kwargs: See ``ForgetRetainDataModule``.
    """

    def __init__(self, root: str | Path = "data", download: bool = True, image_size: int = 64, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = root
        self.download = download
        self.image_size = image_size

    @override
    def prepare_data(self) -> None:
        if self.download:
            STL10(str(self.root), split="train", download=True)  # one archive holds both

    @override
    def load(self) -> Sources:
        train, test = (STL10(str(self.root), split=split) for split in ("train", "test"))
        return Sources(self._in_memory(train), self._in_memory(test), train.classes)

    def _in_memory(self, dataset: STL10) -> ImageTensors:
        scaled = resize(torch.from_numpy(dataset.data), [self.image_size, self.image_size], antialias=True)
        return ImageTensors(scaled, torch.from_numpy(dataset.labels))
