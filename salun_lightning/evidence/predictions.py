"""What a model says of every sample of every set: the record from which all figures are computed."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from salun_lightning.files import whole

FILE = "predictions.safetensors"
"""Its name in a run folder."""

_FIELDS = {"logits": torch.float32, "targets": torch.int64, "indices": torch.int64}


@dataclass(frozen=True, eq=False)
class PredictedSet:
    """What a model says of the samples of one set, sorted by index (and by target, where an index is not unique).

    Attributes:
        logits: float32 of shape (N, C).
        targets: True classes, int64 of shape (N,); of generated images the conditions they were asked for.
        indices: Positions of the samples in the data that the set is part of, int64 of shape (N,); of generated images their
            numbers.
    """

    logits: Tensor
    targets: Tensor
    indices: Tensor

    def __post_init__(self) -> None:
        if self.logits.ndim != 2 or {self.targets.shape, self.indices.shape} != {self.logits.shape[:1]}:
            raise ValueError(
                f"Predictions need logits (N, C), targets (N,) and indices (N,), got {tuple(self.logits.shape)},"
                f" {tuple(self.targets.shape)} and {tuple(self.indices.shape)}."
            )
        order = np.lexsort((self.targets.cpu().numpy(), self.indices.cpu().numpy()))
        for name, kind in _FIELDS.items():
            object.__setattr__(self, name, getattr(self, name).detach().to("cpu", kind)[torch.from_numpy(order)])

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def probabilities(self) -> Tensor:
        """The probability of each class, (N, C)."""
        return self.logits.softmax(1)

    @property
    def confidences(self) -> Tensor:
        """The probability of the true class, (N,); NaN where a logit is none or is infinite."""
        return self.probabilities.gather(1, self.targets.unsqueeze(1)).squeeze(1)

    def of(self, others: "PredictedSet") -> "PredictedSet":
        """What was said of the samples that another set holds.

        Args:
            others: The other set, such as what another model says of some of these samples.

        Raises:
            ValueError: One of its samples is not in this set, or is of another class there.
        """
        places = torch.searchsorted(self.indices, others.indices).clamp(max=max(len(self) - 1, 0))
        rows = [tensor[places] if len(self) else tensor for tensor in (self.logits, self.targets, self.indices)]
        if not (torch.equal(rows[1], others.targets) and torch.equal(rows[2], others.indices)):
            raise ValueError(
                f"The two models cannot be compared: of the {len(others)} samples that the one was tested on, the other was not"
                f" tested on all, or has other classes for them ({len(self)} samples). Test both with the same data."
            )
        return PredictedSet(*rows)


@dataclass(frozen=True)
class Predictions:
    """What one model says of every set.

    Args:
        sets: By name: ``forget``, ``retain``, ``val``, ``test``, ``test_forget``; of a diffusion model ``generated``, where a
            classifier judges the images that it made.

    Example:
        >>> path = getfixture("tmp_path") / FILE
        >>> said = PredictedSet(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([1, 0]), torch.tensor([7, 3]))
        >>> Predictions({"forget": said}).save(path)
        >>> Predictions.load(path).sets["forget"].indices
        tensor([3, 7])
    """

    sets: dict[str, PredictedSet]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file of safetensors that appears whole or not at all."""
        tensors = {f"{name}/{field}": getattr(part, field) for name, part in self.sets.items() for field in _FIELDS}
        with whole(path) as unfinished:
            save_file(tensors, unfinished)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is damaged, or holds something else.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"There are no predictions at '{path}'. Test the model to make them.")
        try:
            tensors = load_file(path)
            names = sorted({name.rpartition("/")[0] for name in tensors})
            return cls({name: PredictedSet(**{field: tensors.pop(f"{name}/{field}") for field in _FIELDS}) for name in names})
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(
                f"'{path}' does not hold predictions, or is damaged ({error}). Test the model again to make it anew."
            ) from error

    @property
    def training(self) -> PredictedSet:
        """The training set: the forget and the retain set together, however a request divides them."""
        parts = [self.sets[name] for name in ("forget", "retain") if name in self.sets]
        if not parts:
            raise ValueError(f"There are no predictions of training samples, only of: {', '.join(self.sets)}. Test with them.")
        return PredictedSet(*(torch.cat([getattr(part, field) for part in parts]) for field in _FIELDS))


class Recorder:
    """Collects what a model says while it is tested, a batch at a time."""

    def __init__(self) -> None:
        self._batches: dict[str, list[tuple[Tensor, ...]]] = {}

    def add(self, output: Mapping[str, Any]) -> None:
        """Take a batch.

        Args:
            output: ``set`` (its name), ``logits`` (B, C), ``target`` (B,) and ``index`` (B,).
        """
        tensors = (output[field].detach().cpu() for field in ("logits", "target", "index"))  # they may not fit a device
        self._batches.setdefault(output["set"], []).append(tuple(tensors))

    def predictions(self) -> Predictions:
        """What was collected in all processes; each of them must ask, and gets the same."""
        shares: list[Any] = [self._batches]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            shares = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(shares, self._batches)
        batches: dict[str, list[tuple[Tensor, ...]]] = {}
        for share in shares:
            for name, own in share.items():
                batches.setdefault(name, []).extend(own)
        return Predictions({name: PredictedSet(*map(torch.cat, zip(*own, strict=True))) for name, own in batches.items()})
