"""The split into what is trained on and what is for validation, and the digest that a checkpoint is told apart by."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from salun_lightning.data.forget import ForgetRequest
from salun_lightning.data.wrong_labels import WrongLabels


def validation_split(targets: Tensor, num_classes: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Positions for validation and for training, ascending: of each class its share is drawn for validation.

    Args:
        targets: The class of each image of the training data, int64 of shape (N,).
        num_classes: The number of classes.
        fraction: How much of each class is set aside.
        seed: Seed of the draw.
    """
    draw = np.random.RandomState(seed)  # its stream is frozen for good
    chosen = [np.empty(0, np.int64)]
    for number in range(num_classes):
        members = (targets == number).nonzero().flatten().numpy()
        chosen.append(draw.permutation(members)[: round(fraction * len(members))])
    val = torch.from_numpy(np.sort(np.concatenate(chosen)))
    everything = torch.arange(len(targets))
    return val, everything[~torch.isin(everything, val)]


def digest(*arrays: Tensor) -> str:
    """A short digest of integers."""
    hashed = hashlib.sha256()
    for array in arrays:
        hashed.update(array.to(torch.int64).numpy().astype("<i8").tobytes())
    return hashed.hexdigest()[:16]


class Split(NamedTuple):
    """What is trained on, what of it is forgotten, and what is for validation: positions in the training data, ascending."""

    targets: Tensor
    """The class that each image is trained with, int64 of shape (N,)."""
    val: Tensor
    forget: Tensor
    retain: Tensor


def check_split(forget: ForgetRequest | None, wrong_labels: WrongLabels | None, val_fraction: float, seed: int) -> None:
    """Refuse what no split can be made of.

    Raises:
        ValueError: It is not said what is to be forgotten, or a number is out of range.
    """
    if forget is None and wrong_labels is None:
        raise ValueError("It is not said what is to be forgotten. Give forget, or wrong_labels.")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be at least 0 and below 1, got {val_fraction}.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"split_seed must be a whole number from 0 to 2^32 - 1, got {seed}.")


def split_of(
    true: Tensor,
    class_names: Sequence[str],
    forget: ForgetRequest | None,
    wrong_labels: WrongLabels | None,
    val_fraction: float,
    seed: int,
) -> Split:
    """Divide the training data.

    Args:
        true: The class of each image, int64 of shape (N,).
        class_names: The name of each class.
        forget: What is to be forgotten; None for the images that are labelled wrong.
        wrong_labels: Which labels are replaced, after the images for validation were set aside.
        val_fraction: How much of each class is set aside.
        seed: Seed of that draw.

    Raises:
        ValueError: Nothing is left to forget, or to retain.
    """
    val, trained = validation_split(true, len(class_names), val_fraction, seed)
    targets = true if wrong_labels is None else wrong_labels.labels(true, class_names, trained)
    gone = (targets != true).nonzero().flatten() if forget is None else forget.indices(targets, class_names, trained)
    retain = trained[~torch.isin(trained, gone)]
    for name, positions in (("forget", gone), ("retain", retain)):
        if not len(positions):
            raise ValueError(f"The {name} set is empty: the request selects {len(gone)} of {len(trained)} training images.")
    return Split(targets, val, gone, retain)


def digests(targets: Tensor, forget: Tensor, retain: Tensor) -> dict[str, str]:
    """Digests of the training set and of the forget set, which a checkpoint carries.

    Args:
        targets: The class of each image of the training data, int64 of shape (N,).
        forget: Positions of the forget set, ascending.
        retain: Positions of the retain set.
    """
    trained = torch.cat([forget, retain]).sort().values
    return {"training_set": digest(targets, trained), "forget_set": digest(targets, forget)}


def check_made_with(there: Mapping[str, str], here: Mapping[str, str], resumed: bool) -> None:
    """Refuse a checkpoint that was made with another split.

    Args:
        there: Digests and the order of the batches that the checkpoint was made with.
        here: Those of this run.
        resumed: Whether the run of the checkpoint is to go on.

    Raises:
        MisconfigurationException: The training set differs or, unless the checkpoint was trained on all of it, the forget set;
            or a run is to go on in another order.
    """
    check_training_set(there, here)
    if resumed and there["order"] != here["order"]:
        raise MisconfigurationException(
            f"The checkpoint is of a run with the order '{there['order']}', but this one has '{here['order']}': they cannot be"
            " one run. Give the same order, or start a new run."
        )
    if there["order"] != "all" and there["forget_set"] != here["forget_set"]:
        raise MisconfigurationException(
            "The checkpoint was made with another forget set than this datamodule's. Give the forget request and seed that"
            " it was made with."
        )


def check_training_set(there: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Refuse an original model that was trained on another training set.

    Raises:
        MisconfigurationException: The training set differs.
    """
    if there["training_set"] != here["training_set"]:
        raise MisconfigurationException(
            "The checkpoint was made with another split: its training set is not this datamodule's, so part of what is to"
            " be forgotten may never have been trained on. Give the data, val_fraction and split_seed it was made with."
        )
