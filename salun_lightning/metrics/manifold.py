"""Precision and recall of generated samples."""

import torch
from torch import Tensor

_ROWS = 1024


def manifold_precision_recall(real: Tensor, generated: Tensor, neighbours: int = 3) -> tuple[Tensor, Tensor]:
    """Improved precision and recall (Kynkäänniemi et al., NeurIPS 2019, section 2).

    Precision is the fraction of generated samples that lie within the manifold of real ones, recall the fraction of real
    samples within that of generated ones. A manifold is the union of balls around its samples, each as large as the distance to
    the k-th nearest other sample.

    Args:
        real: Features of real samples, (N, D).
        generated: Features of generated samples, (M, D).
        neighbours: k.

    Returns:
        Precision and recall, between 0 and 1.

    Raises:
        ValueError: ``neighbours`` is not positive, or there are not more samples than that.

    Example:
        >>> real, generated = torch.tensor([[0.0], [1.0], [9.0], [10.0]]), torch.tensor([[0.4], [0.6]])
        >>> manifold_precision_recall(real, generated, neighbours=1)
        (tensor(1.), tensor(0.))
    """
    fewest = min(len(real), len(generated))
    if not 1 <= neighbours < fewest:
        raise ValueError(f"neighbours must be positive and below the number of samples, {fewest}; got {neighbours}.")
    return _share_within(generated, real, neighbours), _share_within(real, generated, neighbours)


def _share_within(samples: Tensor, manifold: Tensor, neighbours: int) -> Tensor:
    radii = [_distances(rows, manifold).kthvalue(neighbours + 1).values for rows in manifold.split(_ROWS)]  # the 1st is itself
    within = [(_distances(rows, manifold) <= torch.cat(radii)).any(1) for rows in samples.split(_ROWS)]
    return torch.cat(within).float().mean()


def _distances(rows: Tensor, others: Tensor) -> Tensor:
    return torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist")
