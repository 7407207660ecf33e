"""Random labels."""

from collections.abc import Callable

import pytest
import torch
from scipy.stats import chi2, chisquare
from torch import Tensor

from salun_lightning.data import Samples
from salun_lightning.methods import RandomLabel


def samples(indices: Tensor, classes: int) -> Samples:
    return Samples(torch.zeros(len(indices), 0), (indices * 7) % classes, indices)


def labels(indices: Tensor, classes: int = 10, epoch: int = 0, seed: int = 0) -> Tensor:
    return RandomLabel(seed=seed).relabelled(samples(indices, classes), classes, epoch).targets


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_never_the_true_label(classes: int) -> None:
    indices = torch.arange(20_000)
    wrong = labels(indices, classes)
    assert (wrong != (indices * 7) % classes).all()
    assert wrong.min() >= 0
    assert wrong.max() < classes
    assert wrong.dtype == torch.int64


# A chance of 1e-6 for each of the tests below to fail if the labels were drawn by a perfect generator; the draws are fixed.
RARE = 1e-6


@pytest.mark.parametrize("pick", [lambda n: n, lambda n: n * 9, lambda n: n * 1024], ids=["all", "each ninth", "powers of 2"])
@pytest.mark.parametrize("classes", [3, 10, 17, 100])
def test_uniform_over_the_other_labels(classes: int, pick: Callable[[Tensor], Tensor]) -> None:
    indices = pick(torch.arange(50_000))
    shift = (labels(indices, classes) - (indices * 7) % classes) % classes
    counts = shift.bincount(minlength=classes)
    assert counts[0] == 0
    assert chisquare(counts[1:]).pvalue > RARE


def independent(first: Tensor, second: Tensor, classes: int) -> bool:
    """A chi-square test of independence of two series of labels, both uniform."""
    counts = (first * classes + second).bincount(minlength=classes**2).double()
    expected = len(first) / classes**2
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return chi2.sf(statistic, classes**2 - 1) > RARE


@pytest.mark.parametrize("lag", [1, 2, 9, 64])
def test_neighbours_are_independent(lag: int) -> None:
    indices = torch.arange(100_000)
    shift = (labels(indices) - (indices * 7) % 10) % 10 - 1
    assert independent(shift[:-lag], shift[lag:], 9)


@pytest.mark.parametrize(("other", "seed"), [(1, 0), (2, 0), (9, 0), (0, 1), (1, 1)])
def test_epochs_and_seeds_are_independent(other: int, seed: int) -> None:
    indices = torch.arange(100_000)
    true = (indices * 7) % 10
    first, second = ((drawn - true) % 10 - 1 for drawn in (labels(indices), labels(indices, epoch=other, seed=seed)))
    assert independent(first, second, 9)


def test_labels_belong_to_the_sample_not_to_the_batch() -> None:
    indices = torch.tensor([5, 900, 17, 3, 44])
    whole = labels(indices)
    assert torch.equal(whole.flip(0), labels(indices.flip(0)))
    assert torch.equal(whole, torch.cat([labels(part) for part in indices.split(2)]))


def test_labels_are_pinned() -> None:
    """A run that is resumed with a later version must go on with the same labels."""
    assert labels(torch.arange(12), epoch=2, seed=5).tolist() == [5, 3, 5, 6, 9, 2, 5, 1, 2, 2, 2, 0]


class Module:
    num_classes = 10

    def __init__(self, epoch: int) -> None:
        self.current_epoch = epoch

    def task_loss(self, batch: Samples) -> Tensor:
        return batch.targets


@pytest.mark.parametrize("redraw", [True, False])
def test_redrawn_each_epoch_or_once(redraw: bool) -> None:
    method, batch = RandomLabel(redraw=redraw, seed=0), {"forget": samples(torch.arange(100), 10)}
    first, second = (method.loss(Module(epoch), batch) for epoch in (0, 1))
    assert torch.equal(first, second) != redraw
    assert torch.equal(first, labels(torch.arange(100)))


def test_the_retain_set_keeps_its_labels() -> None:
    retain = samples(torch.arange(100), 10)
    assert torch.equal(RandomLabel().loss(Module(0), {"retain": retain}), retain.targets)


def test_the_seed_is_that_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = samples(torch.arange(100), 10)
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert torch.equal(RandomLabel().relabelled(batch, 10, 0).targets, labels(batch.indices, seed=7))
    assert torch.equal(RandomLabel(seed=1).relabelled(batch, 10, 0).targets, labels(batch.indices, seed=1))
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert torch.equal(RandomLabel().relabelled(batch, 10, 0).targets, labels(batch.indices, seed=0))


def test_the_largest_seed() -> None:
    assert (labels(torch.arange(100), seed=2**32 - 1) != (torch.arange(100) * 7) % 10).all()


@pytest.mark.parametrize("classes", [0, 1])
def test_one_class_has_no_wrong_label(classes: int) -> None:
    with pytest.raises(ValueError, match="Random labels need at least two classes"):
        RandomLabel().relabelled(samples(torch.arange(3), 2), classes, 0)
