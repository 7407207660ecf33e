"""What a comparison consists of: rows x seeds, each cell one ``fit`` command."""

import hashlib
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jsonargparse.typing import Path_fr

import salun_lightning
from salun_lightning.files import read_json


@dataclass
class Row:
    """One row of the table: a ``fit`` configuration, and what it overrides.

    Args:
        config: Configuration file of ``fit``, relative to the file that names it.
        options: Options of ``fit`` on top, such as ``saliency.ratio: 0.3``. Filled in are ``{seed}``, ``{other_seed}``, and the
            checkpoint of each model that is trained first, as ``{name}``.
    """

    config: Path_fr
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One row, one seed and one case.

    Attributes:
        row: Name of the row.
        seed: The seed.
        case: Name of the case; empty if there are none.
        folder: Where everything of this cell lies.
        arguments: What ``fit`` is called with.
        key: Digest of all that determines the outcome; a finished cell with the same key is not run again.
        original: The cell that trains the original model this one starts from.
        trained: The cell whose model this one only tests.
    """

    row: str
    seed: int
    case: str
    folder: Path
    arguments: tuple[str, ...]
    key: str
    original: "Cell | None" = None
    trained: "Cell | None" = None

    @property
    def run(self) -> tuple[int, str]:
        """Seed and case: what is compared with each other."""
        return self.seed, self.case

    @property
    def command(self) -> str:
        """The command that repeats this cell."""
        if self.trained is None:
            return shlex.join(["python", "train.py", "fit", *self.arguments])
        return shlex.join(["python", "train.py", "test", *self.arguments, "--ckpt_path", str(self.trained.checkpoint)])

    @property
    def checkpoint(self) -> Path:
        """The last checkpoint of the run."""
        return self.folder / "checkpoints" / "last.ckpt"

    @property
    def samples(self) -> Path:
        """A picture of images that the model generated, a row for each class."""
        return self.folder / "samples.png"

    @property
    def result(self) -> dict[str, Any] | None:
        """What was measured, if the cell has been run to the end with these settings."""
        result = read_json(self.folder / "result.json")
        return result if result.get("key") == self.key else None


@dataclass
class Plan:
    """All cells of a comparison.

    Args:
        out: The folder of the comparison.
        options: Options of ``fit`` for every row.
        arguments: Further arguments of ``fit``, for every row and all that is trained first.
    """

    out: Path
    options: dict[str, Any]
    arguments: Sequence[str] = ()
    first: list[Cell] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)

    def add_first(self, models: Mapping[str, Row]) -> None:
        """Plan what is trained once, before all else."""
        for name, row in models.items():
            self.first.append(self._cell(name, 0, "", row, {}, self.out / slug(name)))

    def add(self, rows: Mapping[str, Row], seeds: Sequence[int], cases: Mapping[str, dict[str, Any]]) -> None:
        """Plan rows x seeds x cases, those that train an original model first.

        A row whose configuration starts from an original model starts from that of its seed: from the cell of the row
        ``original``. That one is trained in the first case and tested in all, because it is trained on everything.

        Raises:
            ValueError: A row starts from an original model, and there is no row called ``original``; or two cells would share a
                folder.
        """
        originals: dict[int, Cell] = {}
        for name in sorted(rows, key=lambda name: name != "original"):
            starts = name != "original" and _starts_from_original(rows[name])
            if starts and "original" not in rows:
                raise ValueError(f"The row '{name}' starts from an original model, but there is no row 'original'.")
            for seed in seeds:
                for name_of_case, own in (cases or {"": {}}).items():
                    case = str(name_of_case)  # YAML reads names of digits as numbers
                    folder = self.out / slug(name) / "-".join(["seed", str(seed), *([slug(case)] if case else [])])
                    options = {**self.options, **own}
                    original = originals.get(seed) if starts else None
                    trained = originals.get(seed) if name == "original" else None
                    cell = self._cell(name, seed, case, rows[name], options, folder, original, trained)
                    self.cells.append(cell)
                    if name == "original":
                        originals.setdefault(seed, cell)
        self._check_folders(rows)

    def _check_folders(self, rows: Mapping[str, Row]) -> None:
        seen: set[Path] = set()
        for folder in (cell.folder for cell in (*self.first, *self.cells)):
            if folder in seen:
                raise ValueError(f"Two cells would share the folder '{folder}'. Give rows, cases or first models other names.")
            seen.add(folder)
        for name in rows:
            if self.out / slug(name) in seen:
                raise ValueError(f"A model that is trained first is called like the row '{name}'. Give it another name.")

    def _cell(
        self,
        name: str,
        seed: int,
        case: str,
        row: Row,
        options: dict[str, Any],
        folder: Path,
        original: Cell | None = None,
        trained: Cell | None = None,
    ) -> Cell:
        config = Path(os.path.relpath(row.config.absolute))
        words = {"seed": str(seed), "other_seed": str(seed + 1000), **{cell.row: str(cell.checkpoint) for cell in self.first}}
        settings = [*_arguments({**options, **row.options}, words), *self.arguments]
        places = {"trainer.default_root_dir": str(folder)}
        if original is not None:
            places["model.original"] = str(original.checkpoint)
        needed = [cell.key for cell in (original, trained, *self.first) if cell is not None]
        values = (Path(setting.rpartition("=")[2]) for setting in settings if setting.endswith(".yaml"))
        contents = [_contents(path) for path in (config, *values) if path.is_file()]
        outcome = [salun_lightning.__version__, settings, contents, needed]
        key = hashlib.sha256(json.dumps(outcome).encode()).hexdigest()[:16]
        arguments = ("--config", str(config), *settings, *_arguments(places, {}))
        return Cell(name, seed, case, folder, arguments, key, original, trained)


def _arguments(options: Mapping[str, Any], words: Mapping[str, str]) -> list[str]:
    arguments = []
    for option, value in options.items():
        text = value if isinstance(value, str) else json.dumps(value)
        for word, filling in words.items():
            text = text.replace("{" + word + "}", filling)
        arguments += [f"--{option}", text]
    return arguments


def slug(name: str) -> str:
    """A name as part of a path.

    Example:
        >>> slug("SalUn, random mask")
        'salun-random-mask'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _starts_from_original(row: Row) -> bool:
    model = yaml.safe_load(Path(row.config.absolute).read_text(encoding="utf-8"))["model"]
    return bool(model.get("init_args", {}).get("original")) or "model.original" in row.options


def _contents(config: Path) -> list[str]:
    """The text of a configuration file and of the files it names."""
    text = config.read_text(encoding="utf-8")
    named = [config.parent / name for name in re.findall(r"[\w./-]+\.yaml", text)]
    return [text, *(content for path in named if path.is_file() for content in _contents(path))]
