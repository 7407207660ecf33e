"""What a comparison file says of its rows."""

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from jsonargparse.typing import register_type

from salun_lightning.cli import program
from salun_lightning.configurations import find


class ConfigFile(str):
    """A configuration of ``fit``: a path, relative to the file that names it, or the name of one that ships.

    Args:
        name: The path or name.

    Raises:
        ValueError: There is none.
    """

    __slots__ = ()

    def __new__(cls, name: str) -> Self:
        if not isinstance(name, str):  # a list or options, which the parser tries as a name first
            raise TypeError("Expected a path or a name.")
        found = find(name)
        if found is None:
            raise ValueError(f"There is no configuration '{name}'. '{program()} configs' lists those that ship.")
        return super().__new__(cls, found.absolute())


register_type(ConfigFile)


@dataclass
class Row:
    """One row of the table: configurations of ``fit``, later ones over earlier ones, and what is set on top.

    Args:
        config: One or several.
        options: Options of ``fit`` on top, such as ``saliency.ratio: 0.3``. Filled in are ``{seed}``, other seeds such as
            ``{seed+1000}``, and the checkpoint of each model that is trained first, as ``{name}``.
        grid: Lists of values of options: each combination makes a row of its own, which is named by its values.
        cases: Options on top of these in single cases, by the name of the case.
        only: The cases that it is for, if it is not for all.
    """

    config: ConfigFile | list[ConfigFile] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)
    only: list[str] = field(default_factory=list)

    @property
    def files(self) -> list[ConfigFile]:
        """The configurations."""
        return self.config if isinstance(self.config, list) else [self.config]


Source = ConfigFile | list[ConfigFile] | Row
"""What a comparison file may say of a row: a configuration, several, or these with options."""


def row_of(source: Source | dict[str, Any]) -> Row:
    """The row; a dictionary holds options alone."""
    if isinstance(source, dict):
        return Row(options=source)
    return source if isinstance(source, Row) else Row(source)


def row_called(name: str, names: Collection[str], what: str = "row") -> str:
    """The row of that name, in whatever case its letters are; or the case.

    Raises:
        ValueError: There is none.
    """
    for known in names:
        if known.lower() == name.lower():
            return known
    known = ", ".join(filter(None, names))
    raise ValueError(f"There is no {what} '{name}'. " + (f"The {what}s are: {known}." if known else f"There are no {what}s."))


def all_rows(
    sources: Mapping[str, Source], reference: str, again: int, options: Mapping[str, Any]
) -> tuple[dict[str, Row], str, list[str]]:
    """The rows that a comparison file comes to: those of a grid one by one, and the reference several times.

    Unless ``options`` say something else, each row has the seed of the comparison, and each retrained model one of its own:
    with the initial weights of the original it would be closer to that than a model that never saw the forget set.

    Args:
        sources: The rows of the file.
        reference: The row of the retrained model.
        again: How many more models are retrained.
        options: Options of every row.

    Returns:
        The rows, the name of the reference among them, and the names of those that repeat it.

    Raises:
        ValueError: There is no such reference, or a row is called like a repetition of it.
    """
    rows: dict[str, Row] = {}
    for name, row in ((name, row_of(source)) for name, source in sources.items()):
        for values in itertools.product(*row.grid.values()):
            own = {**row.options, **dict(zip(row.grid, values, strict=True))}
            rows[" ".join([name, *map(str, values)])] = replace(row, options=own)
    reference = row_called(reference, rows)
    floor = [" ".join([reference, "again", *([str(number)] if number > 1 else [])]) for number in range(1, again + 1)]
    seeded: dict[str, Row] = {}
    for name, row in rows.items():
        seed = {} if "seed_everything" in options else {"seed_everything": "{seed+1000}" if name == reference else "{seed}"}
        seeded[name] = replace(row, options={**seed, **row.options})
        if name == reference:
            for number, another in enumerate(floor, start=2):
                if another in rows:
                    raise ValueError(f"'noise_floor' makes a row called '{another}'. Give the other row another name.")
                seeded[another] = replace(row, options={**row.options, "seed_everything": f"{{seed+{number}000}}"})
    return seeded, reference, floor
