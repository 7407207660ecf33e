"""What a comparison consists of: rows x seeds, each cell one ``fit`` command."""

import hashlib
import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jsonargparse.typing import Path_fr

import salun_lightning
from salun_lightning.comparison.files import read_json


@dataclass
class Row:
    """One row of the table: a ``fit`` configuration, and what it overrides.

    Args:
        config: Configuration file of ``fit``, relative to the file that names it.
        options: Options of ``fit`` on top, such as ``saliency.ratio: 0.3``; ``{seed}`` and ``{other_seed}`` are filled in.
    """

    config: Path_fr
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One row and one seed.

    Attributes:
        row: Name of the row.
        seed: The seed.
        folder: Where everything of this cell lies.
        arguments: What ``fit`` is called with.
        key: Digest of all that determines the outcome; a finished cell with the same key is not run again.
        original: The cell that trains the original model this one starts from.
    """

    row: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]
    key: str
    original: "Cell | None" = None

    @property
    def command(self) -> str:
        """The ``fit`` command that repeats this cell."""
        return shlex.join(["python", "train.py", "fit", *self.arguments])

    @property
    def checkpoint(self) -> Path:
        """The last checkpoint of the run."""
        return self.folder / "checkpoints" / "last.ckpt"

    @property
    def result(self) -> dict[str, Any] | None:
        """What was measured, if the cell has been run to the end with these settings."""
        result = read_json(self.folder / "result.json")
        return result if result.get("key") == self.key else None


def plan(
    rows: dict[str, Row], seeds: list[int], options: dict[str, Any], out: Path, arguments: Sequence[str] = ()
) -> dict[tuple[str, int], Cell]:
    """All cells of a comparison, those that train an original model first.

    A row whose configuration starts from an original model starts from that of its seed: from the cell of the row ``original``.

    Args:
        rows: The rows by name.
        seeds: The seeds.
        options: Options of ``fit`` for every row.
        out: The folder of the comparison.
        arguments: Further arguments of ``fit`` for every row.

    Raises:
        ValueError: A row starts from an original model, and there is no row called ``original``.
    """
    cells: dict[tuple[str, int], Cell] = {}
    for name in sorted(rows, key=lambda name: name != "original"):
        row = rows[name]
        for seed in seeds:
            original = None
            if name != "original" and _starts_from_original(row):
                if "original" not in rows:
                    raise ValueError(f"The row '{name}' starts from an original model, but there is no row 'original'.")
                original = cells["original", seed]
            settings = [*_arguments({**options, **row.options}, seed), *arguments]
            cells[name, seed] = _cell(name, seed, row.config, settings, out, original)
    return cells


def _cell(name: str, seed: int, config_file: Path_fr, settings: list[str], out: Path, original: Cell | None) -> Cell:
    folder = out / slug(name) / f"seed-{seed}"
    config = Path(os.path.relpath(config_file.absolute))
    places = {"trainer.default_root_dir": str(folder)}
    if original is not None:
        places["model.original"] = str(original.checkpoint)
    outcome = [salun_lightning.__version__, settings, _contents(config), original.key if original else None]
    key = hashlib.sha256(json.dumps(outcome).encode()).hexdigest()[:16]
    return Cell(name, seed, folder, ("--config", str(config), *settings, *_arguments(places, seed)), key, original)


def _arguments(options: dict[str, Any], seed: int) -> list[str]:
    arguments = []
    for option, value in options.items():
        text = value if isinstance(value, str) else json.dumps(value)
        arguments += [f"--{option}", text.replace("{seed}", str(seed)).replace("{other_seed}", str(seed + 1000))]
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
