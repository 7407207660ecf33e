"""The configurations that come with the package: found by name from anywhere, listed, and copied to start from."""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

SHIPPED = Path(__file__).with_name("configs").resolve()
_OPTIONS = ("-c", "--config")
_COPIED = {"photos.yaml": "photos.yaml", "photos/compare.yaml": "photos_compare.yaml"} | {
    name: name for name in ("photos/original.yaml", "photos/retrain.yaml")
}


def find(name: str, folder: str = "") -> Path | None:
    """The configuration that a name means: a file of that name, else one that ships, with or without ``.yaml``.

    Args:
        name: A path or a name, such as ``method/salun``.
        folder: The folder of the shipped configurations in which it is looked for first.

    Example:
        >>> find("digits/tuned/salun").name
        'salun.yaml'
        >>> find("digits", "compare").parent.name
        'compare'
    """
    if Path(name).is_file():
        return Path(name)
    places = [SHIPPED / folder / name, SHIPPED / name] if name else []
    files = [place.with_name(place.name + suffix) for place in places for suffix in ("", ".yaml")]
    return next((file for file in files if file.is_file()), None)


def located(words: Sequence[str], folder: str = "") -> tuple[list[str], list[Path]]:
    """A command line in which each configuration is given by its path, and these paths.

    What is not found stays as it is: the parser says so.

    Args:
        words: The arguments of a command.
        folder: See :func:`find`.
    """
    located, files = [], []
    for before, word in zip(["", *words], words, strict=False):
        option, sign, value = word.partition("=")
        start, name = ("", word) if before in _OPTIONS else (option + sign, value)
        if before in _OPTIONS or (sign and option in _OPTIONS):
            files.append(find(name, folder) or Path(name))
            located.append(start + str(files[-1]))
        else:
            located.append(word)
    return located, files


def beside(files: Sequence[str | os.PathLike[str]], name: str) -> Path | None:
    """What the last of some configurations that has it holds under a name, in the folder that is called like the configuration.

    Args:
        files: Configurations, such as a task and a request.
        name: A name, such as ``tuned/salun``.

    Example:
        >>> beside([SHIPPED / "digits.yaml", SHIPPED / "digits" / "one_class.yaml"], "original").parent.name
        'digits'
    """
    found = (find(str(_folder(file) / f"{name}.yaml")) for file in reversed(files))
    return next((path for path in found if path is not None), None)


def tuned_folder(file: str | os.PathLike[str]) -> Path:
    """Where what is found for a configuration is written: beside it if that is yours, else in the working directory.

    There :func:`beside` finds it.
    """
    path = Path(file).absolute()
    own = path.is_relative_to(Path.cwd()) and not path.is_relative_to(sys.prefix) and os.access(path.parent, os.W_OK)
    folder = path.with_suffix("") if own else _folder(path)
    return folder / "tuned"


def _folder(file: str | os.PathLike[str]) -> Path:
    """The folder that is called like a configuration, by its name if that ships."""
    folder = Path(file).with_suffix("")
    return folder.relative_to(SHIPPED) if folder.is_relative_to(SHIPPED) else folder


def shown(path: str | os.PathLike[str]) -> str:
    """How a configuration is named in a command: by a path within the working directory, else by the name it ships under."""
    near = os.path.relpath(path)
    if near.startswith("..") and Path(path).is_relative_to(SHIPPED):
        name = str(Path(path).relative_to(SHIPPED).with_suffix(""))
        return name if find(name) == Path(path) else near
    return near


def run_folder(files: Sequence[str | os.PathLike[str]]) -> Path:
    """Where a run of these configurations lies: their names, each once.

    Example:
        >>> print(run_folder(["digits.yaml", "method/salun.yaml", "digits/tuned/salun.yaml"]))
        runs/digits/salun
    """
    return Path("runs", *dict.fromkeys(Path(file).stem for file in files))


def listing() -> str:
    """Each shipped configuration with the first line of its comment."""
    paths = sorted(SHIPPED.rglob("*.yaml"), key=lambda path: (len(path.relative_to(SHIPPED).parts) > 1, path))
    names = {str(path.relative_to(SHIPPED).with_suffix("")): path for path in paths}
    width = max(map(len, names))
    return "\n".join(f"{name:<{width}}  {_first_line(path)}" for name, path in names.items())


def _first_line(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def init(folder: Path, images: Path | None = None) -> None:
    """Copy a task to start from: images of your own.

    Args:
        folder: Where ``photos.yaml``, the files beside it and ``photos_compare.yaml`` are written.
        images: A folder with ``train/<class>/`` and, if there are test images, ``test/<class>/``. Its number of classes, and
            the mean and standard deviation of each colour, are written into ``photos.yaml``.

    Raises:
        FileExistsError: One of the files is there already.
    """
    from salun_lightning.files import write_text

    for name in _COPIED.values():
        if (folder / name).exists():
            raise FileExistsError(f"'{folder / name}' is there already, and stays as it is. Give another folder.")
    texts = {name: (SHIPPED / source).read_text(encoding="utf-8") for source, name in _COPIED.items()}
    if images is not None:
        texts["photos.yaml"] = _filled(texts["photos.yaml"], images)
    for name, text in texts.items():
        write_text(folder / name, text)


def command(words: Sequence[str]) -> None:
    """Run ``configs`` or ``init``."""
    from jsonargparse import ArgumentParser

    from salun_lightning.cli import program

    parser = ArgumentParser(prog=f"{program()} {words[0]}", exit_on_error=False)  # whoever called says what is wrong
    if words[0] == "configs":
        parser.parse_args(list(words[1:]))
        print(listing())
        return
    parser.add_function_arguments(init, as_positional=True)
    options = parser.parse_args(list(words[1:]))
    init(options.folder, options.images)
    compared = shlex.quote(str(options.folder / "photos_compare.yaml"))
    print(f"Change what you like in '{options.folder}', then: {program()} compare -c {compared}")


def _filled(text: str, images: Path) -> str:
    import torch
    import yaml

    from salun_lightning.data import ForgetRandom, ImageFolderDataModule

    size = yaml.safe_load(text)["data"]["init_args"]["image_size"]
    data = ImageFolderDataModule(root=images, image_size=size, in_memory=True, forget=ForgetRandom(count=1)).load()
    std, mean = torch.std_mean(data.train.images / 255, (0, 2, 3))
    numbers = {name: [round(number, 4) for number in values.tolist()] for name, values in {"mean": mean, "std": std}.items()}
    for name, value in {"root": images.absolute(), "num_classes": len(data.class_names or []), **numbers}.items():
        before, _, behind = re.split(rf"\b({name}: )(?:\[.*?\]|[^,\n]+)", text, maxsplit=1)
        text = f"{before}{name}: {value}{behind}"
    return text
