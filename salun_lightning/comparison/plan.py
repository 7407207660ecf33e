"""What a comparison consists of: rows x seeds, each cell one ``fit`` command."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from salun_lightning.cli import program
from salun_lightning.comparison.rows import ConfigFile, Row, Source, row_of
from salun_lightning.comparison.settings import SettingsReader
from salun_lightning.comparison.tuned import check_seed
from salun_lightning.configurations import beside, shown
from salun_lightning.files import read_json, tensors_fault

QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.limit_val_batches=0")
"""What a cell is spared, unless its configuration asks for it: a comparison has many, and tests each at its end."""


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
        first: The cells that train what every cell may use, such as the classifier that judges images.
        training: Of an original model: digest of its settings without the forget request, which it is trained regardless of.
        settings: What the arguments come to.
    """

    row: str
    seed: int
    case: str
    folder: Path
    arguments: tuple[str, ...]
    key: str
    original: "Cell | None" = None
    trained: "Cell | None" = None
    first: "tuple[Cell, ...]" = ()
    training: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def needed(self) -> "list[Cell]":
        """The cells whose checkpoints this one reads."""
        return [cell for cell in (self.original, self.trained, *self.first) if cell is not None]

    @property
    def name(self) -> str:
        """How the cell is called in messages."""
        return f"{self.row}, seed {self.seed}" + (f", {self.case}" if self.case else "")

    @property
    def run(self) -> tuple[int, str]:
        """Seed and case: what is compared with each other."""
        return self.seed, self.case

    @property
    def command(self) -> str:
        """The command that repeats this cell."""
        if self.trained is None:
            return f"{program()} {shlex.join(['fit', *self.arguments])}"
        return f"{program()} {shlex.join(['test', *self.arguments, '--ckpt_path', str(self.trained.checkpoint)])}"

    @property
    def checkpoint(self) -> Path:
        """The last checkpoint of the run."""
        return self.folder / "checkpoints" / "last.ckpt"

    @property
    def predictions(self) -> Path:
        """What the model says of every sample."""
        return self.folder / "predictions.safetensors"

    @property
    def thumbnails(self) -> Path:
        """The images that were forgotten most and least."""
        return self.folder / "thumbnails.json"

    @property
    def samples(self) -> Path:
        """A picture of images that the model generated, a row for each class."""
        return self.folder / "samples.png"

    @property
    def result(self) -> dict[str, Any] | None:
        """What was recorded, if the cell has been run to the end with these settings and nothing of it is lost."""
        result = read_json(self.folder / "result.json")
        lost = result.get("predictions") and tensors_fault(self.predictions) is not None
        return result if result.get("key") == self.key and not lost else None


@dataclass
class Plan:
    """All cells of a comparison.

    Args:
        out: The folder of the comparison.
        options: Options of ``fit`` for every row.
        arguments: Further arguments of ``fit``, for every row and all that is trained first.
        task: The configurations that every row begins with.
        tuned: Whether a row also takes what a search has found for its method: ``<task>/tuned/<method>`` or, where the request
            of a case has one of its own, that.
    """

    out: Path
    options: dict[str, Any]
    arguments: Sequence[str] = ()
    task: Sequence[ConfigFile] = ()
    tuned: bool = False
    first: list[Cell] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    originals: dict[tuple[int, str], Cell] = field(default_factory=dict)
    """The cells that train original models, by seed and case."""

    def __post_init__(self) -> None:
        self.reader = SettingsReader(self.out)

    def add_first(self, models: Mapping[str, Row]) -> None:
        """Plan what is trained once, before all else.

        Raises:
            ValueError: ``fit`` does not accept the settings of one.
        """
        for name, row in models.items():
            self.first.append(self._cell(name, 0, "", row, self.out / slug(name)))

    def add(self, rows: Mapping[str, Row], seeds: Sequence[int], cases: Mapping[str, Source | dict[str, Any]]) -> None:
        """Plan rows x seeds x cases, those that train an original model first.

        A row whose settings name an original model starts from that of its seed and case: from the cell of the row
        ``original``. That one is trained in the first of the cases that differ in nothing but what is to be forgotten, and
        tested in all of them, because it is trained on everything.

        Raises:
            ValueError: ``fit`` does not accept the settings of a row; a row starts from an original model, and there is no row
                called ``original``; a row has options for a case that is not there; a seed is one that options were searched
                with; or two cells would share a folder.
        """
        for name, row in rows.items():
            unknown = sorted({*row.cases, *row.only} - set(map(str, cases)))
            if unknown:
                raise ValueError(f"Row '{name}' names the case '{unknown[0]}', which is not among 'cases'.")
        for name in sorted(rows, key=lambda name: name != "original"):
            for seed in seeds:
                for name_of_case, source in (cases or {"": Row()}).items():
                    case = str(name_of_case)  # YAML reads names of digits as numbers
                    if rows[name].only and case not in rows[name].only:
                        continue
                    cell = self.cell(name, rows[name], seed, case, source, self.out / slug(name))
                    self.cells.append(cell)
                    if name == "original":
                        self.originals[seed, case] = cell.trained or cell
        self._check_folders(rows)

    def cell(self, name: str, row: Row, seed: int, case: str, source: Source | dict[str, Any], folder: Path) -> Cell:
        """One cell of a row, which :meth:`add` plans for each seed and case.

        Args:
            name: The name of the row.
            row: The row.
            seed: The seed.
            case: The name of the case; empty if there are none.
            source: What the case consists of.
            folder: Where the cells of the row lie.
        """
        own = row_of(source)
        files = [*self.task, *own.files, *row.files]
        if self.tuned:
            found = [beside([*self.task, *own.files], f"tuned/{Path(file).stem}") for file in row.files]
            tuned = [file for file in dict.fromkeys(found) if file is not None and str(file) not in files]
            check_seed(seed, tuned)
            files += [ConfigFile(str(file)) for file in tuned]
        options = {**self.options, **own.options, **row.options, **row.cases.get(case, {})}
        place = folder / "-".join(["seed", str(seed), *([slug(case)] if case else [])])
        return self._cell(name, seed, case, Row(files, options), place, self.originals)

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
        folder: Path,
        originals: Mapping[tuple[int, str], Cell] | None = None,
    ) -> Cell:
        words = [*QUIET, *(word for file in row.files for word in ("--config", shown(file)))]
        words += [*_arguments(row.options), *self.arguments]
        words = [_with_seed(word, seed) for word in words]
        names = {cell.row: f"<{cell.row}>" for cell in self.first}  # what the comparison trains itself counts by its key
        try:
            settings = self.reader.read([_with_models(word, names) for word in words])
        except ValueError as error:
            raise ValueError(f"Row '{name}': {error}") from error
        original = trained = None
        training = ""
        if originals is not None and name == "original":
            training = self.reader.key({option: settings[option] for option in settings if not option.startswith(_REQUEST)}, [])
            trained = next((cell for cell in originals.values() if (cell.seed, cell.training) == (seed, training)), None)
        elif originals is not None and settings.get(_ORIGINAL) is not None:
            original = originals.get((seed, case))
            if original is None:
                raise ValueError(f"The row '{name}' starts from an original model, but there is no row 'original'.")
            settings[_ORIGINAL] = "<original>"
        cell = Cell(name, seed, case, folder, (), "", original, trained, tuple(self.first), training, settings)
        arguments = [_with_models(word, {cell.row: str(cell.checkpoint) for cell in self.first}) for word in words]
        arguments += ["--trainer.default_root_dir", str(folder)]
        arguments += ["--model.original", str(original.checkpoint)] if original is not None else []
        key = self.reader.key(settings, [needed.key for needed in cell.needed])
        return replace(cell, arguments=tuple(arguments), key=key)


_ORIGINAL, _REQUEST = "model.init_args.original", "data.init_args.forget"


def _arguments(options: Mapping[str, Any]) -> list[str]:
    values = {option: value if isinstance(value, str) else json.dumps(value) for option, value in options.items()}
    return [word for option, value in values.items() for word in (f"--{option}", value)]


def _with_seed(word: str, seed: int) -> str:
    return re.sub(r"\{seed([+-]\d+)?\}", lambda found: str(seed + int(found[1] or 0)), word)


def _with_models(word: str, models: Mapping[str, str]) -> str:
    for name, model in models.items():
        word = word.replace("{" + name + "}", model)
    return word


def slug(name: str) -> str:
    """A name as part of a path.

    Example:
        >>> slug("SalUn, random mask")
        'salun-random-mask'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
