"""A user's own images, one folder a class."""

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from typing_extensions import override

from salun_lightning.data.datamodule import ForgetRetainDataModule, Sources
from salun_lightning.data.images import check_images, read_image
from salun_lightning.data.samples import ImageTensors


class ImageFolderDataModule(ForgetRetainDataModule):
    """Images in ``root/train/<class>/`` and ``root/test/<class>/``; the second folder may be missing.

    Without transforms of your own, training crops, scales and mirrors at random, and evaluation takes the centre. Every image
    becomes RGB with 8 bits a channel; hidden files and folders are left out.

    Args:
        root: The folder that holds ``train`` and ``test``.
        image_size: Height and width of the images that the network sees.
        in_memory: Decode the centre of every image once and hold all of them as one uint8 tensor of N x 3 x size x size bytes,
            on the accelerator if there is one. Transforms then take whole uint8 batches, such as ``RandomCropFlip``; by
            default there are none.
        check_images: Whether files that cannot be read are found before training, at 0.2 s for 1,000 images (a truncated JPEG
            is known by its end); else when their turn comes. Images in memory always are.
        per_class: Take only the first so many training images of each class, by name of the file. None for all.
        **kwargs: See ``ForgetRetainDataModule``.

    Raises:
        ValueError: ``image_size`` or ``per_class`` is not positive, ``root`` holds no ``train`` folder, the classes of the two
            folders differ, one is empty, or an image cannot be read.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int = 224,
        in_memory: bool = False,
        check_images: bool = True,
        per_class: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, number in {"image_size": image_size, "per_class": 1 if per_class is None else per_class}.items():
            if number < 1:
                raise ValueError(f"{name} must be positive, got {number}.")
        self.root = Path(root)
        self.image_size = image_size
        self.in_memory = in_memory
        self.check_images = check_images
        self.per_class = per_class
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
        train, test = self._folder(self.root / "train", self.per_class), self._folder(self.root / "test")
        if train is None:
            raise ValueError(
                f"There is no folder '{self.root / 'train'}'. Images are expected in train/<class>/ and test/<class>/."
            )
        if test is not None and train.classes != test.classes:
            different = sorted(set(train.classes) ^ set(test.classes))
            raise ValueError(f"Training and test images have different classes: {', '.join(different)}.")
        if self.in_memory:
            size = self.image_size
            return Sources(_in_memory(train, size), None if test is None else _in_memory(test, size), train.classes)
        return Sources(train, test, train.classes)

    def _folder(self, folder: Path, per_class: int | None = None) -> "_Images | None":
        if not folder.is_dir():
            return None
        images = _Images(folder)
        if per_class is not None:
            images.keep_first(per_class)
        if self.check_images and not self.in_memory:
            check_images([path for path, _ in images.samples])
        return images


class _Images(ImageFolder):  # type: ignore[misc]  # torchvision has no types
    """The folder as torchvision reads it, without what is hidden and with no class empty."""

    def __init__(self, folder: Path) -> None:
        def visible(path: str) -> bool:
            parts = Path(path).relative_to(folder).parts
            return path.lower().endswith(IMG_EXTENSIONS) and not any(part.startswith(".") for part in parts)

        super().__init__(str(folder), loader=read_image, is_valid_file=visible, allow_empty=True)
        for number in sorted(set(range(len(self.classes))) - set(self.targets)):
            raise ValueError(
                f"There is no image in '{folder / self.classes[number]}'. Put images there, or remove the folder. Files of"
                f" these types are read: {' '.join(IMG_EXTENSIONS)}."
            )

    def keep_first(self, per_class: int) -> None:
        """Leave out all but the first images of each class."""
        of_class: dict[int, list[tuple[str, int]]] = {}
        for path, target in vars(self)["samples"]:  # sorted by class and name
            of_class.setdefault(target, []).append((path, target))
        self.samples = self.imgs = [sample for samples in of_class.values() for sample in samples[:per_class]]
        self.targets = [target for _, target in self.samples]

    @override
    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        names = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir() and not entry.name.startswith("."))
        if not names:
            raise ValueError(f"There is no class folder in '{directory}'. Images are expected in '{directory}/<class>/'.")
        return names, {name: number for number, name in enumerate(names)}


def _in_memory(folder: _Images, image_size: int) -> ImageTensors:
    paths = [path for path, _ in folder.samples]
    states = [(state.st_size, state.st_mtime_ns) for state in map(os.stat, paths)]
    return ImageTensors(_decoded(tuple(paths), tuple(states), image_size), torch.tensor(folder.targets))


@lru_cache(maxsize=2)  # training and test set: the many runs of a comparison decode them once
def _decoded(paths: tuple[str, ...], states: tuple[tuple[int, int], ...], image_size: int) -> Tensor:
    """The centres of images, uint8 (N, 3, image_size, image_size).

    Args:
        paths: The files.
        states: Their sizes in bytes and times of change, which tell that a file is no longer the one that was decoded.
        image_size: Height and width.
    """
    check_images(paths)
    prepare = v2.Compose([v2.ToImage(), v2.Resize(image_size, antialias=True), v2.CenterCrop(image_size)])
    return torch.stack([prepare(read_image(path)).as_subclass(Tensor) for path in paths])
