"""The split into what is trained on and what is for validation, and the digest that a checkpoint is told apart by."""

import hashlib

import numpy as np
import torch
from torch import Tensor


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
