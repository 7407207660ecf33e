"""Forget requests: which images of the training set are to be forgotten."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from jsonargparse.typing import Path_fr, register_type
from torch import Tensor
from typing_extensions import override


class ForgetRequest(ABC):
    """What is to be forgotten, as positions in the training data.

    The same request gives the same positions in every run, in every process and with every version of this library.
    """

    @abstractmethod
    def indices(self, targets: Tensor, class_names: Sequence[str], trained: Tensor) -> Tensor:
        """The positions to forget.

        Args:
            targets: The class of each image of the training data, int64 of shape (N,).
            class_names: The name of each class.
            trained: The positions that are trained on, ascending: all but the validation set.

        Returns:
            Distinct positions out of ``trained``, ascending, int64.

        Raises:
            ValueError: The request cannot be met by this training data.
        """

    def classes(self, class_names: Sequence[str]) -> list[int]:
        """The classes that are forgotten whole, and therefore leave the test set; none unless stated."""
        return []

    def anchors(self, class_names: Sequence[str]) -> dict[int, str]:
        """What stands in the place of each class that is forgotten whole, where the request says so: a prompt, by class."""
        return {}


class ForgetClasses(ForgetRequest):
    """Forget every training image of some classes (class-wise forgetting).

    Args:
        names: One class or several, by name or by number; where a number is also a name, the name counts.

    Example:
        >>> ForgetClasses(["cat"]).indices(torch.tensor([0, 1, 0]), ["cat", "dog"], torch.arange(3))
        tensor([0, 2])
    """

    def __init__(self, names: list[int | str] | int | str) -> None:
        self.names = list(names) if isinstance(names, Iterable) and not isinstance(names, str) else [names]

    @override
    def classes(self, class_names: Sequence[str]) -> list[int]:
        numbers = []
        for name in self.names:
            known = (isinstance(name, str) or _is_whole(name)) and str(name) in class_names
            number = list(class_names).index(str(name)) if known else name
            if not _is_whole(number) or not 0 <= number < len(class_names):
                raise ValueError(f"There is no class '{name}'. The classes are: {', '.join(class_names)}.")
            numbers.append(int(number))
        return sorted(set(numbers))

    @override
    def indices(self, targets: Tensor, class_names: Sequence[str], trained: Tensor) -> Tensor:
        return of_classes(self.classes(class_names), targets, trained)


def of_classes(classes: list[int], targets: Tensor, trained: Tensor) -> Tensor:
    """The positions that are trained on of all images of some classes."""
    return trained[torch.isin(targets[trained], torch.tensor(classes))]


class ForgetRandom(ForgetRequest):
    """Forget randomly drawn training images (random data forgetting; Fan et al., ICLR 2024).

    Args:
        fraction: How much of the training set (or of the class) is forgotten, between 0 and 1.
        count: In place of ``fraction``, how many images are forgotten.
        seed: The same seed, from 0 to 2^32 - 1, draws the same images. NumPy's legacy generator, whose stream is frozen for
            good, draws them.
        within_class: Draw from this class only, by name or by number.

    Example:
        >>> ForgetRandom(count=3, seed=1).indices(torch.zeros(10, dtype=torch.int64), ["cat"], torch.arange(10))
        tensor([2, 6, 9])
    """

    def __init__(
        self,
        fraction: float | None = None,
        count: int | None = None,
        seed: int = 0,
        within_class: int | str | None = None,
    ) -> None:
        if (fraction is None) == (count is None):
            raise ValueError("ForgetRandom takes either fraction or count.")
        if fraction is not None and not (isinstance(fraction, Real) and 0 < fraction < 1):
            raise ValueError(f"The fraction to forget must lie between 0 and 1, got {fraction!r}.")
        if count is not None and not _is_whole(count):
            raise ValueError(f"The count to forget must be a whole number, got {count!r}.")
        if count is not None and count < 1:
            raise ValueError(f"The count to forget must be positive, got {count}.")
        if not _is_whole(seed) or not 0 <= seed < 2**32:
            raise ValueError(f"The seed of a request must be a whole number from 0 to 2^32 - 1, got {seed!r}.")
        self.fraction = fraction
        self.count = count
        self.seed = seed
        self.within_class = within_class

    @override
    def indices(self, targets: Tensor, class_names: Sequence[str], trained: Tensor) -> Tensor:
        pool = trained
        if self.within_class is not None:
            pool = ForgetClasses([self.within_class]).indices(targets, class_names, trained)
        count = self.count if self.count is not None else round(self.fraction * len(pool))  # type: ignore[operator]
        if count > len(pool):
            raise ValueError(f"{count} images are to be forgotten, but there are only {len(pool)}.")
        drawn = np.random.RandomState(self.seed).permutation(len(pool))[:count]
        return pool[torch.from_numpy(np.sort(drawn))]


class BesideConfig(str):
    """The absolute path of a file that a configuration names relative to itself."""


# so that a saved configuration, which lies in another folder, means the same file (without a key, the class would be looked for
# by its name in a package that is not imported to its end)
register_type(BesideConfig, deserializer=lambda path: BesideConfig(Path_fr(path).absolute), uniqueness_key=(BesideConfig,))


class ForgetIndices(ForgetRequest):
    """Forget these training images, as a deletion request names them.

    Args:
        positions: Positions in the training data, counted from 0 and before a validation set is split off; or a mask, one
            boolean for each image of the training data; or a text file with one position a line, where a line that begins with
            ``#`` is a comment. A configuration may name the file relative to itself.

    Raises:
        ValueError: A position is not a whole number, or the file cannot be read.

    Example:
        >>> ForgetIndices([5, 2]).indices(torch.zeros(10, dtype=torch.int64), ["cat"], torch.arange(10))
        tensor([2, 5])
    """

    def __init__(self, positions: list[Any] | BesideConfig | str | Path) -> None:  # list[Any] stays as it was written
        self.positions = positions if isinstance(positions, str | Path) else _whole_or_mask(positions)

    @override
    def indices(self, targets: Tensor, class_names: Sequence[str], trained: Tensor) -> Tensor:
        positions = self.positions if isinstance(self.positions, list) else _read_positions(Path(self.positions))
        if positions and isinstance(positions[0], bool):
            if len(positions) != len(targets):
                raise ValueError(
                    f"The positions to forget are a mask of {len(positions)} images, but the training data has {len(targets)}."
                    " Give one boolean for each image, or the numbers of the images."
                )
            positions = [number for number, forgotten in enumerate(positions) if forgotten]
        for position in positions:
            if not 0 <= position < len(targets):
                raise ValueError(
                    f"Index {position} is out of range: the training data has {len(targets)} images, numbered from 0."
                )
        forget = torch.tensor(sorted(set(positions)), dtype=torch.int64)
        untrained = forget[~torch.isin(forget, trained)]
        if len(untrained):
            raise ValueError(
                f"Image {int(untrained[0])} is in the validation set: the model was never trained on it. Leave it out."
            )
        return forget


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _whole_or_mask(given: Any) -> list[Any]:
    """The positions as whole numbers, or the mask as booleans."""
    if not isinstance(given, Iterable) or (isinstance(given, Tensor | np.ndarray) and not given.ndim):
        raise ValueError(f"The positions to forget must be a list of them, a mask or the name of a text file, got {given!r}.")
    values = [value.tolist() if isinstance(value, Tensor | np.ndarray | np.generic) else value for value in given]
    if all(isinstance(value, bool) for value in values):
        return values
    for value in values:
        if not _is_whole(value):
            raise ValueError(f"Positions to forget must be whole numbers, got {value!r}. (A mask has booleans alone.)")
    return values


def _read_positions(path: Path) -> list[int]:
    if not path.is_file():
        raise ValueError(f"There is no file of positions to forget at '{path}'.")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # which skips a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is not a text file with one position a line in UTF-8. Save it as such.") from error
    positions = []
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            if not re.fullmatch("[0-9]{1,100}", line.strip()):  # int() also reads signs, underscores and other scripts
                raise ValueError(f"Line {number} of '{path}' is not a position: '{line.strip()[:100]}'.")
            positions.append(int(line))
    return positions
