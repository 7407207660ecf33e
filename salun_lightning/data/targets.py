"""The class of every sample of a dataset, read without its images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset


def targets_of(dataset: Any, given: Sequence[int] | None = None, key: int | str = 1) -> Tensor:
    """The class of every sample of a dataset, int64 of shape (N,).

    They are looked for in what ``Subset``, ``ConcatDataset`` and ``TensorDataset`` hold, in the column ``key`` of a dataset of
    Hugging Face, and in an attribute ``targets`` or ``labels``.

    Args:
        dataset: Map-style dataset.
        given: The classes, where the dataset has none to be read; otherwise they must be the same.
        key: Where a sample holds its class.

    Raises:
        ValueError: There are no classes, too few or too many, or they are not one whole number a sample.
    """
    own = _own_targets(dataset, key)
    if own is None and given is None:
        raise ValueError(f"{type(dataset).__name__} has neither targets nor labels; give the datamodule its targets.")
    found = [class_numbers(values) for values in (own, given) if values is not None]
    for targets in found:
        if len(targets) != len(dataset) or not len(dataset):
            raise ValueError(f"There are {len(targets)} targets for {len(dataset)} samples.")
    if len(found) == 2 and not torch.equal(*found):
        first = int((found[0] != found[1]).nonzero()[0])
        raise ValueError(contradiction(first, int(found[0][first]), int(found[1][first])))
    return found[0]


def contradiction(sample: int, own: int, expected: int) -> str:
    """The sentence for a sample whose class is another than was said before."""
    return (
        f"Sample {sample} of the data is of class {own}, but its target says class {expected}. Leave targets out where the"
        " data has its own, or make them agree."
    )


def _own_targets(dataset: Any, key: int | str) -> Any:
    """What a dataset itself says of its classes; None if nothing."""
    if isinstance(dataset, Subset):
        whole = _own_targets(dataset.dataset, key)
        if whole is not None:
            return class_numbers(whole)[torch.as_tensor(dataset.indices, dtype=torch.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [_own_targets(part, key) for part in dataset.datasets]
        if all(part is not None for part in parts):
            return torch.cat([class_numbers(part) for part in parts])
    if isinstance(dataset, TensorDataset) and isinstance(key, int) and key < len(dataset.tensors):
        return dataset.tensors[key]
    columns = getattr(dataset, "column_names", None)
    if columns is not None:
        if key not in columns:
            raise ValueError(
                f"{type(dataset).__name__} has the columns {', '.join(columns)}: set input_key and target_key to those of the"
                f" image and of its class. There is no column {key!r}."
            )
        return dataset[key]
    targets = getattr(dataset, "targets", None)
    return getattr(dataset, "labels", None) if targets is None else targets


def names_of(given: Sequence[Any] | None, train: Tensor, test: Tensor) -> list[str]:
    """The names of all classes.

    Args:
        given: The names; by default the numbers of the classes of the training data.
        train: The classes of the training data, int64 of shape (N,).
        test: Those of the test data; may be empty.

    Raises:
        ValueError: A class is negative or beyond the names.
    """
    names = [str(name) for name in (range(int(train.max()) + 1) if given is None else given)]
    targets = torch.cat([train, test])
    for number in (int(targets.min()), int(targets.max())):
        if not 0 <= number < len(names):
            raise ValueError(
                f"There are samples of class {number}, but there are names for {len(names)} classes, numbered from 0."
            )
    return names


def class_numbers(values: Any) -> Tensor:
    """Classes as int64 of shape (N,), whatever holds them.

    Raises:
        ValueError: They are names, one-hot rows, several a sample, or numbers that are not whole.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    if not isinstance(values, np.ndarray):
        rows = [value.tolist() if isinstance(value, Tensor | np.ndarray) else value for value in values]
        if len({len(row) if isinstance(row, list | tuple) else None for row in rows}) > 1:
            raise ValueError(_SEVERAL)
        values = np.array(rows)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        ones = values.ndim == 2 and bool((np.isin(values, (0, 1)).all(1) & (values.sum(1) == 1)).all())
        raise ValueError(_ONE_HOT if ones else _SEVERAL)
    if values.dtype.kind not in "biuf":
        strange = next((value for value in values.tolist() if not isinstance(value, int | float)), values[0])
        raise ValueError(
            f"A target must be the number of a class, got {strange!r}. Number the classes from 0, and give their names to the"
            " datamodule as class_names."
        )
    whole = values.astype(np.int64) if values.dtype.kind != "f" else np.where(np.isfinite(values), values, 0).astype(np.int64)
    if (whole != values).any():
        raise ValueError(f"A target must be the number of a class, got {values[whole != values][0]}.")
    return torch.from_numpy(whole)


_ONE_HOT = "The targets are one-hot rows. Give the number of the class of each sample, as argmax(1) has it."
_SEVERAL = "There are several labels a sample. Only one class a sample can be trained; give one number each."


def retained_classes(data: Any, count: int) -> list[int]:
    """The classes that a datamodule trains on and does not forget whole, ascending.

    Args:
        data: The datamodule; one of another project may tell neither.
        count: The number of classes.
    """
    forgotten = getattr(data, "forgotten_classes", [])
    return [number for number in getattr(data, "trained_classes", range(count)) if number not in forgotten]
