"""Exact global selection, against a stable descending sort of everything."""

import pytest
import torch
from torch import Tensor

from salun_lightning.saliency import selection
from salun_lightning.saliency.selection import num_kept, top_k_masks

Scores = dict[str, Tensor]


def by_sorting(scores: Scores, k: int) -> Tensor:
    """The k largest, equal ones by lowest position: all tensors concatenated, one stable sort."""
    flat = torch.cat([score.reshape(-1).double() for score in scores.values()])
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[flat.sort(descending=True, stable=True).indices[:k]] = True
    return chosen


def by_counting(scores: Scores, k: int) -> Tensor:
    masks = dict(top_k_masks(scores, k))
    assert list(masks) == list(scores)
    assert all(masks[name].shape == scores[name].shape and masks[name].dtype == torch.bool for name in scores)
    return torch.cat([mask.reshape(-1) for mask in masks.values()])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=generator(seed))


KINDS = {
    "spread over many scales": lambda s: {"a": random(7, 5, seed=s).pow(8) * 1e6, "b": random(31, seed=s + 1) * 1e-6},
    "few distinct values": lambda s: {
        "a": torch.randint(0, 3, (5, 4), generator=generator(s)).float(),
        "b": torch.randint(0, 3, (9,), generator=generator(s + 1)).float(),
    },
    "mostly zero": lambda s: {"a": random(12, seed=s) * (random(12, seed=s + 1) > 0.8), "b": torch.zeros(3, 3)},
    "zeros of both signs": lambda s: {"a": torch.tensor([-0.0, 0.0, 1.0, -0.0, 0.0]), "b": torch.tensor([0.0, -0.0])},
    "all zero": lambda s: {"a": torch.zeros(6), "b": torch.zeros(2, 2)},
    "all equal": lambda s: {"a": torch.full((4, 3), 2.5), "b": torch.full((5,), 2.5)},
    "denormal": lambda s: {"a": torch.arange(8).flip(0) * 1.4e-45, "b": random(6, seed=s) * 1e-38},
    "largest floats": lambda s: {"a": torch.tensor([3.4e38, 1.0, 3.4028234e38]), "b": torch.tensor([3.4028235e38, 0.0])},
    "empty and 0-d": lambda s: {"a": torch.empty(0, 3), "b": torch.tensor(0.5), "c": random(4, seed=s), "d": torch.empty(0)},
    "one number": lambda s: {"a": random(seed=s)},
    "transposed": lambda s: {"a": random(4, 6, seed=s).round(decimals=1).t(), "b": random(3, 5, 2, seed=s)[:, ::2]},
    "channels last": lambda s: {
        "a": random(3, 4, 2, 2, seed=s).round(decimals=1).to(memory_format=torch.channels_last),
        "b": random(5, seed=s).round(decimals=1),
    },
    "float64": lambda s: {"a": 1 + random(9, seed=s).double() * 1e-12, "b": 1 + random(2, 3, seed=s).double() * 1e-12},
    "bfloat16": lambda s: {"a": random(20, seed=s).bfloat16(), "b": random(3, 4, seed=s + 1).bfloat16()},
    "float16": lambda s: {"a": random(20, seed=s).half(), "b": random(3, 4, seed=s + 1).half() * 6e-8},
    "mixed types": lambda s: {
        "a": random(9, seed=s).half(),
        "b": random(9, seed=s).half().double(),
        "c": random(9, seed=s),
        "d": random(9, seed=s).bfloat16(),
    },
    "with a gradient": lambda s: {"a": random(9, seed=s).requires_grad_(), "b": random(4, seed=s)},
}


def check(scores: Scores) -> None:
    total = sum(score.numel() for score in scores.values())
    for k in range(total + 1):
        assert torch.equal(by_counting(scores, k), by_sorting(scores, k)), k


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_equals_a_stable_sort(kind, seed):
    check(KINDS[kind](10 * seed))


@pytest.mark.parametrize("chunk", [1, 3, 7])
@pytest.mark.parametrize("kind", ["few distinct values", "empty and 0-d", "transposed", "float64", "all zero"])
def test_equals_a_stable_sort_across_chunks(kind, chunk, monkeypatch):
    monkeypatch.setattr(selection, "_CHUNK", chunk)
    check(KINDS[kind](5))


def test_of_nothing_nothing_is_selected():
    assert dict(top_k_masks({}, 0)) == {}
    masks = dict(top_k_masks({"a": torch.empty(0, 3)}, 0))
    assert masks["a"].shape == (0, 3)


def test_many_random_cases_of_every_size(monkeypatch):
    monkeypatch.setattr(selection, "_CHUNK", 16)
    for seed in range(150):
        draw = generator(seed)
        sizes = torch.randint(0, 40, (3,), generator=draw).tolist()
        scores = {str(i): torch.randn(size, generator=draw).abs().round(decimals=seed % 3) for i, size in enumerate(sizes)}
        k = int(torch.randint(0, sum(sizes) + 1, (), generator=draw))
        assert torch.equal(by_counting(scores, k), by_sorting(scores, k)), seed


def test_equals_a_stable_sort_of_a_million():
    scores = {"a": random(1000, 600), "b": random(500_001, seed=1).pow(4), "c": random(1000, seed=2).round(decimals=2)}
    for k in (1, 123_456, 1_000_000):
        assert torch.equal(by_counting(scores, k), by_sorting(scores, k))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("k", [0, 2, 4])
def test_a_score_that_is_not_finite_is_refused_with_its_name(bad, k):
    with pytest.raises(ValueError, match=r"saliency of 'head\.weight' contains NaN or infinity"):
        dict(top_k_masks({"stem": torch.ones(2), "head.weight": torch.tensor([1.0, bad])}, k))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_negative_score_is_refused_with_its_name(dtype):
    with pytest.raises(ValueError, match=r"saliency of 'head\.bias' contains negative numbers"):
        dict(top_k_masks({"head.bias": torch.tensor([1.0, -1e-4], dtype=dtype)}, 1))


def test_scores_that_are_not_floats_are_refused():
    with pytest.raises(ValueError, match=r"scores of 'a' are torch\.int64; scores are floating-point"):
        dict(top_k_masks({"a": torch.ones(2, dtype=torch.int64)}, 1))


@pytest.mark.parametrize("k", [-1, 4])
def test_more_than_there_are_cannot_be_selected(k):
    with pytest.raises(ValueError, match=f"{k} of 3 scores cannot be selected"):
        dict(top_k_masks({"a": torch.ones(3)}, k))


@pytest.mark.parametrize(
    ("ratio", "weights", "kept"),
    [
        (0.29, 100, 29),
        (0.57, 100, 57),
        (0.1, 30, 3),
        (0.5, 7, 3),
        (1 / 3, 3, 0),
        (1e-5, 100_000, 1),
        (0, 9, 0),
        (1, 9, 9),
        (0.7, 0, 0),
    ],
)
def test_the_number_kept_is_the_floor_of_the_decimal_number_that_was_written(ratio, weights, kept):
    assert num_kept(ratio, weights) == kept


@pytest.mark.parametrize("ratio", [1.2, -0.1, float("nan"), float("inf")])
def test_what_is_not_a_ratio_is_refused(ratio):
    with pytest.raises(ValueError, match=r"ratio must lie between 0 .* and 1"):
        num_kept(ratio, 10)
