"""A user's own images, one folder a class."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from typing_extensions import override

from salun_lightning.data.datamodule import ForgetRetainDataModule, Sources
from salun_lightning.data.samples import ImageTensors


class ImageFolderDataModule(ForgetRetainDataModule):
    """Images in ``root/train/<class>/`` and ``root/test/<class>/``.

    Without transforms of your own, training crops, scales and mirrors at random, and evaluation takes the centre.

    Args:
        root: The folder that holds ``train`` and ``test``.
        image_size: Height and width of the images that the network sees.
        in_memory: Decode the centre of every image once and hold all of them as one uint8 tensor of N x 3 x size x size bytes,
            on the accelerator if there is one. Transforms then take whole uint8 batches, such as ``RandomCropFlip``; by
            default there are none.
        **kwargs: See ``ForgetRetainDataModule``.

    Raises:
        ValueError: ``root`` holds no ``train`` or ``test`` folder, or their classes differ.
    """

    def __init__(self, root: str | Path, image_size: int = 224, in_memory: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = Path(root)
        self.image_size = image_size
        self.in_memory = in_memory
        if not in_memory:
            to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
            crop = [v2.RandomResizedCrop(image_size, antialias=True), v2.RandomHorizontalFlip()]
            centre = [v2.Resize(image_size, antialias=True), v2.CenterCrop(image_size)]
            if self.train_transform is None:
                self.train_transform = v2.Compose([*crop, *to_tensor])
            if self.eval_transform is None:
                self.eval_transform = v2.Compose([*centre, *to_tensor])

    @override
    def load(self) -> Sources:
        for folder in (self.root / "train", self.root / "test"):
            if not folder.is_dir():
                raise ValueError(f"There is no folder '{folder}'. Images are expected in train/<class>/ and test/<class>/.")
        train, test = ImageFolder(str(self.root / "train")), ImageFolder(str(self.root / "test"))
        if train.classes != test.classes:
            different = sorted(set(train.classes) ^ set(test.classes))
            raise ValueError(f"Training and test images have different classes: {', '.join(different)}.")
        if self.in_memory:
            return Sources(self._decoded(train), self._decoded(test), train.classes)
        return Sources(train, test, train.classes)

    def _decoded(self, dataset: ImageFolder) -> ImageTensors:
        prepare = v2.Compose([v2.ToImage(), v2.Resize(self.image_size, antialias=True), v2.CenterCrop(self.image_size)])
        images: list[Tensor] = [prepare(image).as_subclass(Tensor) for image, _ in dataset]
        return ImageTensors(torch.stack(images), torch.tensor(dataset.targets))
