"""Precision and recall of generated samples, against a brute-force computation."""

import math

import pytest
import torch
from torch import Tensor

from salun_lightning.metrics import manifold, manifold_precision_recall


def cloud(count: int, seed: int, shift: float = 0.0, dimensions: int = 3) -> Tensor:
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed)) + shift


def brute_force(real: Tensor, generated: Tensor, neighbours: int) -> tuple[float, float]:
    """Section 2 of Kynkäänniemi et al., one pair of samples at a time."""

    def share_within(samples: Tensor, support: Tensor) -> float:
        radii = []
        for i, centre in enumerate(support.tolist()):
            others = sorted(math.dist(centre, other) for j, other in enumerate(support.tolist()) if j != i)
            radii.append(others[neighbours - 1])
        pairs = list(zip(support.tolist(), radii, strict=True))
        inside = [any(math.dist(sample, centre) <= radius for centre, radius in pairs) for sample in samples.tolist()]
        return sum(inside) / len(inside)

    return share_within(generated, real), share_within(real, generated)


@pytest.mark.parametrize("neighbours", [1, 3, 5])
@pytest.mark.parametrize("shift", [0.9, 1.5])
def test_like_brute_force(neighbours: int, shift: float) -> None:
    real, generated = cloud(40, 0), cloud(25, 1, shift)
    expected = brute_force(real, generated, neighbours)
    assert 0 < expected[0] < 1
    measured = manifold_precision_recall(real, generated, neighbours)
    assert [value.item() for value in measured] == pytest.approx(expected)


def test_more_samples_than_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    real, generated = cloud(40, 0), cloud(25, 1, 1.0)
    whole = manifold_precision_recall(real, generated)
    monkeypatch.setattr(manifold, "_ROWS", 7)
    assert manifold_precision_recall(real, generated) == whole


def test_what_is_the_same_or_far_apart() -> None:
    real = cloud(20, 0)
    assert manifold_precision_recall(real, real) == (1, 1)
    assert manifold_precision_recall(real, real + 100) == (0, 0)


def test_one_good_image_over_and_over_is_precise_and_recalls_nothing() -> None:
    real = cloud(20, 0)
    assert manifold_precision_recall(real, real[:1].repeat(6, 1) + 1e-3) == (1, 0)


def test_the_neighbours_of_a_sample_are_other_samples() -> None:
    real, generated = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.9], [2.5], [-1.0]])
    precision, _ = manifold_precision_recall(real, generated, neighbours=1)
    assert precision.item() == pytest.approx(2 / 3)  # the balls reach from -1 to 2


@pytest.mark.parametrize("neighbours", [-1, 0, 4, 9])
def test_bad_numbers_of_neighbours(neighbours: int) -> None:
    message = f"neighbours must be positive and below the number of samples, 4; got {neighbours}"
    with pytest.raises(ValueError, match=message):
        manifold_precision_recall(cloud(6, 0), cloud(4, 1), neighbours)
