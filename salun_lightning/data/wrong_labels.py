"""Training data of which some labels are wrong."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from salun_lightning.data.forget import ForgetRandom
from salun_lightning.data.samples import ImageTensors
from salun_lightning.data.targets import contradiction


class WrongLabels:
    """Replaces the labels of randomly drawn training images by other classes, uniformly (label noise that is to be corrected).

    The validation and the test set keep their labels.

    Args:
        fraction: How much of the training set is labelled wrong, between 0 and 1.
        seed: The same seed, from 0 to 2^32 - 1, draws the same images, which are those of ``ForgetRandom``, and the same
            labels.

    Example:
        >>> WrongLabels(0.4).labels(torch.tensor([0, 1, 2, 0, 1]), ["cat", "dog", "owl"], torch.arange(5))
        tensor([2, 1, 0, 0, 1])
    """

    def __init__(self, fraction: float = 0.1, seed: int = 0) -> None:
        self.request = ForgetRandom(fraction, seed=seed)

    def labels(self, targets: Tensor, class_names: Sequence[str], trained: Tensor) -> Tensor:
        """The classes that are trained with, int64 of shape (N,).

        Args:
            targets: The true class of each image of the training data, int64 of shape (N,).
            class_names: The name of each class.
            trained: The positions that are trained on, ascending: all but the validation set.

        Raises:
            ValueError: There is only one class, so there is no wrong label.
        """
        if len(class_names) < 2:
            raise ValueError("Wrong labels need at least two classes.")
        wrong = self.request.indices(targets, class_names, trained)
        draw = np.random.RandomState([self.request.seed, 1])  # its stream is frozen for good, and is not that of the positions
        shift = torch.from_numpy(draw.randint(1, len(class_names), len(wrong), dtype=np.int64))
        return targets.index_put((wrong,), (targets[wrong] + shift) % len(class_names))


def relabelled(source: Any, targets: Tensor, labels: Tensor, key: int | str) -> Any:
    """The same dataset with other labels.

    Args:
        source: :class:`ImageTensors`, or a map-style dataset of tuples or mappings.
        targets: What its samples hold, int64 of shape (N,).
        labels: What they are to hold instead.
        key: Where a sample holds its class.
    """
    if isinstance(source, ImageTensors):
        return ImageTensors(source.images, labels)
    return _Relabelled(source, targets.tolist(), labels.tolist(), key)


class _Relabelled(Dataset[Any]):
    def __init__(self, source: Any, targets: list[int], labels: list[int], key: Any) -> None:
        self.source = source
        self.targets = targets
        self.labels = labels
        self.key = key

    def __len__(self) -> int:
        return len(self.source)

    @override
    def __getitem__(self, index: int) -> Any:
        sample = self.source[index]
        fields = dict(sample) if isinstance(sample, Mapping) else list(sample)
        if int(fields[self.key]) != self.targets[index]:
            raise ValueError(contradiction(index, int(fields[self.key]), self.targets[index]))
        fields[self.key] = self.labels[index]
        return fields
