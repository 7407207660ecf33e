"""Images with prompts, for text-to-image models: from a table, from folders, or drawn by a pipeline."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from typing_extensions import override

from salun_lightning.data.datamodule import ForgetRetainDataModule, Sources
from salun_lightning.data.drawn import TABLE, DrawnImages
from salun_lightning.data.forget_concepts import named
from salun_lightning.data.images import check_images, read_image

IMAGENETTE = {  # the folders of Imagenette, what they show, and the class of ImageNet
    "n01440764": ("tench", 0),
    "n02102040": ("English springer", 217),
    "n02979186": ("cassette player", 482),
    "n03000684": ("chain saw", 491),
    "n03028079": ("church", 497),
    "n03394916": ("French horn", 566),
    "n03417042": ("garbage truck", 569),
    "n03425413": ("gas pump", 571),
    "n03445777": ("golf ball", 574),
    "n03888257": ("parachute", 701),
}


class ConceptDataModule(ForgetRetainDataModule):
    """Images with prompts, which are the classes: ``ForgetConcepts`` says which of them name what is to be forgotten.

    ``root/train`` (or else ``root`` itself) holds either a table ``metadata.csv`` with the columns ``file_name`` and ``text``,
    as the image folders of Hugging Face have it, or one folder for each thing that is shown. ``root/test`` or ``root/val``, if
    there is one, likewise. Images are scaled to ``image_size`` at their shorter side, and their centre is taken.

    With ``classes``, ``contents`` says which class of a classifier each prompt asks for, so that what a model draws can be
    judged: UA and acc, see ``evidence.measures.composition``.

    Args:
        root: The folder.
        prompt: Of images in folders, the prompt; ``{}`` stands for the name.
        names: What folders are called in prompts; those that are not named here are called as they are. The folders of
            Imagenette are known.
        image_size: Height and width of the images, of which the VAE makes latents.
        drawn: Images that are drawn first, by a pipeline, into ``root``.
        further: Prompts without images, which are evaluated alone: neighbours of a concept, say. No method is told of them, and
            no distance of distributions counts them.
        classes: By a word or words that a prompt may name, the class of a classifier. Those of Imagenette are known: the
            classes of ImageNet.
        check_images: Whether files that cannot be read are found before training.
        **kwargs: See ``ForgetRetainDataModule``.

    Raises:
        ValueError: There are no images, a file or a prompt is missing, or an image cannot be read.
    """

    parts = {"image": (0, 0, None, None)}  # noqa: RUF012  # as GenerationEvaluator reads it
    contents: Tensor

    def __init__(
        self,
        root: str | Path,
        prompt: str = "an image of a {}",
        names: Mapping[str, str] | None = None,
        image_size: int = 512,
        drawn: DrawnImages | None = None,
        further: Sequence[str] = (),
        classes: Mapping[str, int] | None = None,
        check_images: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if image_size < 1:
            raise ValueError(f"image_size must be positive, got {image_size}.")
        if "{}" not in prompt:
            raise ValueError(f"The prompt '{prompt}' names nothing: put {{}} where the name is to stand.")
        self.root = Path(root)
        self.prompt = prompt
        self.names = {**{folder: name for folder, (name, _) in IMAGENETTE.items()}, **(names or {})}
        self.image_size = image_size
        self.drawn = drawn
        self.further = further
        self.classes = classes
        self.check_images = check_images
        centre = [v2.Resize(image_size, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(image_size)]
        prepare = v2.Compose([*centre, v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
        self.train_transform = self.train_transform or prepare
        self.eval_transform = self.eval_transform or prepare

    @override
    def prepare_data(self) -> None:
        if self.drawn is not None:
            trainer: Any = self.trainer
            self.drawn.draw(self.root, None if trainer is None else trainer.strategy.root_device)

    @override
    def load(self) -> Sources:
        if self.drawn is not None and not (self.root / TABLE).is_file():
            raise ValueError(f"The images in '{self.root}' are not drawn yet. Call prepare_data, as the trainer does.")
        folder = self.root / "train" if self.drawn is None and (self.root / "train").is_dir() else self.root
        train = self._listed(folder)
        test = next((self._listed(folder) for name in ("test", "val") if (folder := self.root / name).is_dir()), [])
        prompts = list(dict.fromkeys([*(prompt for _, prompt in [*train, *test]), *self.further]))
        self.contents = self._contents(prompts)
        if self.check_images:
            check_images([str(path) for path, _ in [*train, *test]])
        return Sources(_Prompted(train, prompts), _Prompted(test, prompts) if test else None, prompts)

    def _listed(self, folder: Path) -> list[tuple[Path, str]]:
        """Image files and their prompts."""
        if not folder.is_dir():
            raise ValueError(f"There is no folder '{folder}'.")
        found = _of_table(folder / TABLE) if (folder / TABLE).is_file() else self._of_folders(folder)
        if not found:
            raise ValueError(
                f"There is no image in '{folder}'. Give it a table '{TABLE}' with the columns file_name and text, or one folder"
                " for each thing that is shown."
            )
        return found

    def _of_folders(self, folder: Path) -> list[tuple[Path, str]]:
        found = []
        others = {"test", "val"} if folder == self.root else set()
        folders = [part for part in folder.iterdir() if part.is_dir() and not part.name.startswith(".")]
        for shown in sorted(part for part in folders if part.name not in others):
            files = sorted(
                path for path in shown.iterdir() if path.suffix.lower() in IMG_EXTENSIONS and not path.name.startswith(".")
            )
            if not files:
                raise ValueError(f"There is no image in '{shown}'. Put images there, or remove the folder.")
            found += [(path, self.prompt.format(self.names.get(shown.name, shown.name))) for path in files]
        return found

    def _contents(self, prompts: Sequence[str]) -> Tensor:
        """The class that each prompt asks for, (prompts, 1); -1 where it names none, or more than one."""
        classes = dict(IMAGENETTE.values()) if self.classes is None else self.classes
        asked = [{classes[word] for word in named(prompt, classes)} for prompt in prompts]
        return torch.tensor([[next(iter(one)) if len(one) == 1 else -1] for one in asked]).view(-1, 1)


def _of_table(table: Path) -> list[tuple[Path, str]]:
    with table.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    found = []
    for number, row in enumerate(rows, start=2):
        name, prompt = ((row.get(column) or "").strip() for column in ("file_name", "text"))
        path = table.parent / name
        if not name or not prompt:
            raise ValueError(f"Line {number} of '{table}' needs a file_name and a text: these are the columns that are read.")
        if not path.is_file():
            raise ValueError(f"Line {number} of '{table}' names '{name}', which is no file there.")
        found.append((path, prompt))
    return found


class _Prompted(Dataset[tuple[Any, int]]):
    """Images with the numbers of their prompts."""

    def __init__(self, listed: Sequence[tuple[Path, str]], prompts: Sequence[str]) -> None:
        number = {prompt: n for n, prompt in enumerate(prompts)}
        self.paths = [path for path, _ in listed]
        self.targets = [number[prompt] for _, prompt in listed]

    def __len__(self) -> int:
        return len(self.paths)

    @override
    def __getitem__(self, index: int) -> tuple[Any, int]:
        return read_image(str(self.paths[index])), self.targets[index]
