"""What ``predict`` writes of a model that generates images."""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from typing_extensions import override

from salun_lightning.files import replace_folder, set_aside

_FIELDS = {"image", "target", "index"}
_LONGEST = 50  # characters, of up to 4 bytes; file systems take names of 255 bytes


class ImageWriter(Callback):
    """Writes generated images into the folder ``images`` of the run folder, and a grid of each class.

    ``images/3-cat/00007.png`` is image 7 of class 3, ``images/3-cat.png`` the grid. Of a long name, such as a prompt, the
    beginning is there. Images of an earlier run are replaced when all are written; a folder ``images`` that holds anything else
    is set aside. What a module of another kind predicts is left alone.

    Args:
        before: The folder ``images`` of another run, such as of the original model: a grid then has a row of its images above
            each row of those of this run, with the same numbers and from the same noise. The place of an image that is not
            there, or has another size, stays white.

    Raises:
        FileNotFoundError: There is no such folder.
    """

    def __init__(self, before: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        self.before = None if before is None else Path(before)
        self._names: list[str] = []

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.before is not None and not self.before.is_dir():
            raise FileNotFoundError(f"There is no folder '{self.before}' with images of another run: predict them first.")
        names: list[str] = getattr(trainer.datamodule, "class_names", [])  # type: ignore[attr-defined]
        self._names = [re.sub(r"[^\w.-]+", "_", name)[:_LONGEST] for name in names]
        if trainer.is_global_zero:
            shutil.rmtree(_unfinished(trainer), ignore_errors=True)
        trainer.strategy.barrier("images")

    @override
    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any, **__: Any) -> None:
        if not isinstance(outputs, Mapping) or not outputs.keys() >= _FIELDS:
            return
        folders = [_unfinished(trainer) / f"{number}-{self._name(number)}" for number in outputs["target"].tolist()]
        for image, folder, index in zip(outputs["image"].cpu(), folders, outputs["index"].tolist(), strict=True):
            folder.mkdir(parents=True, exist_ok=True)
            to_pil_image(image).save(folder / f"{index:05}.png")

    def _name(self, number: int) -> str:
        return self._names[number] if number < len(self._names) else str(number)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.barrier("images")  # all processes have written theirs
        unfinished, finished = _unfinished(trainer), _finished(trainer)
        if not trainer.is_global_zero or not unfinished.is_dir():
            return
        lacking: list[Path] = []
        for folder in sorted(unfinished.iterdir()):
            paths = sorted(folder.iterdir())
            before = [] if self.before is None else [self.before / folder.name / path.name for path in paths]
            size = _size(paths[0])
            lacking += [path for path in before if _size(path) != size]
            _grid(paths, before).save(folder.with_name(f"{folder.name}.png"))
        if lacking:
            rank_zero_warn(
                f"Of {len(lacking)} images there is none of the same size in '{self.before}', such as '{lacking[0]}': their"
                " places in the grids are white. Draw the same images there."
            )
        if finished.exists() and not _written_here(finished):
            set_aside(finished, "not all that it holds are images that were generated")
        replace_folder(unfinished, finished)
        rank_zero_info(f"Images: {finished}")


def _written_here(folder: Path) -> bool:
    """Whether a folder holds nothing but what an ``ImageWriter`` wrote."""
    places = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]
    return all(re.fullmatch(r"\d+-[^/]*(/\d{5,})?\.png", place) for place in places)


def _grid(paths: list[Path], before: list[Path]) -> Image.Image:
    """Images of one size, in rows of ten, a pixel apart; above each row those of before, if there are any."""
    parts = [before, paths] if before else [paths]
    rows = [part[start : start + 10] for start in range(0, len(paths), 10) for part in parts]
    first = _opened(paths[0])
    width, height = (side + 1 for side in first.size)
    grid = Image.new(first.mode, (len(rows[0]) * width - 1, len(rows) * height - 1), "white")
    for y, row in enumerate(rows):
        for x, path in enumerate(row):
            if _size(path) == first.size:
                grid.paste(_opened(path), (x * width, y * height))
    return grid


def _size(path: Path) -> tuple[int, int] | None:
    """Width and height of an image, if there is one; its pixels are not read."""
    if not path.is_file():
        return None
    with Image.open(path) as image:
        return image.size


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.copy()


def _finished(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / "images"


def _unfinished(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / "images.part"
