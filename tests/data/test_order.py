"""In which order training and evaluation meet the samples."""

from collections import Counter
from itertools import chain
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from salun_lightning.data.order import FixedOrder, Order, TrainingOrder

FORGET = torch.arange(100, 113)
RETAIN = torch.arange(41)
ORDERS = get_args(Order)
Batches = list[list[int]]


def training_order(
    order: Order, epoch: int = 0, forget: Tensor = FORGET, retain: Tensor = RETAIN, **kwargs: int
) -> TrainingOrder:
    sampler = TrainingOrder(forget, retain, order, batch_size=5, **kwargs)
    sampler.set_epoch(epoch)
    return sampler


def sides(batch: list[int]) -> tuple[list[int], list[int]]:
    return [i for i in batch if i >= 100], [i for i in batch if i < 100]


def flat(batches: Batches) -> list[int]:
    return list(chain.from_iterable(batches))


@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize(
    ("order", "content"),
    [
        ("sequential", [*FORGET.tolist(), *RETAIN.tolist()]),
        ("mixed", [*FORGET.tolist(), *RETAIN.tolist()]),
        ("all", [*FORGET.tolist(), *RETAIN.tolist()]),
        ("forget", FORGET.tolist()),
        ("retain", RETAIN.tolist()),
    ],
)
def test_an_epoch_meets_every_sample_once(order: Order, content: list[int], epoch: int) -> None:
    batches = list(training_order(order, epoch))
    assert sorted(flat(batches)) == sorted(content)
    assert all(0 < len(batch) <= 5 for batch in batches)


def test_sequential_meets_the_forget_set_first() -> None:
    batches = list(training_order("sequential"))
    assert [len(batch) for batch in batches] == [5, 5, 3] + 8 * [5] + [1]
    assert [bool(sides(batch)[0]) for batch in batches] == 3 * [True] + 9 * [False]


def test_mixed_has_both_sets_in_its_batches() -> None:
    batches = list(training_order("mixed"))
    assert [len(batch) for batch in batches] == 10 * [5] + [4]
    assert sum(all(sides(batch)) for batch in batches) > 3


@pytest.mark.parametrize(("forget", "retain"), [(FORGET, RETAIN), (torch.arange(100, 141), torch.arange(13))])
def test_paired_goes_through_the_smaller_set_as_often_as_needed(forget: Tensor, retain: Tensor) -> None:
    batches = [sides(batch) for batch in training_order("paired", forget=forget, retain=retain)]
    small, large = (forget, retain) if len(forget) < len(retain) else (retain, forget)
    of_small, of_large = ([pair[side] for pair in batches] for side in ((0, 1) if small is forget else (1, 0)))
    assert [len(part) for part in of_large] == 8 * [5] + [1]
    assert sorted(flat(of_large)) == large.tolist()
    assert [len(part) for part in of_small] == 3 * [5, 5, 3]
    passes = [flat(of_small[i : i + 3]) for i in (0, 3, 6)]
    assert all(sorted(once) == small.tolist() for once in passes)
    assert passes[0] != passes[1] != passes[2]


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("order", ORDERS)
def test_length_is_the_number_of_batches(order: Order, replicas: int) -> None:
    for rank in range(replicas):
        sampler = training_order(order, num_replicas=replicas, rank=rank)
        assert len(sampler) == len(list(sampler)) > 0


@pytest.mark.parametrize("order", ORDERS)
def test_order_follows_from_seed_and_epoch(order: Order) -> None:
    first = list(training_order(order))
    assert first == list(training_order(order))
    assert first != list(training_order(order, epoch=1))
    assert first != list(training_order(order, seed=1))
    assert list(training_order(order, epoch=1)) != list(training_order(order, seed=1))


@pytest.mark.parametrize("order", ORDERS)
def test_a_sampler_that_starts_in_a_later_epoch_goes_on_alike(order: Order) -> None:
    whole = training_order(order)
    for epoch in range(3):
        whole.set_epoch(epoch)
        last = list(whole)
    assert last == list(training_order(order, epoch=2))


@pytest.mark.parametrize("replicas", [2, 3, 4])
@pytest.mark.parametrize("order", ["sequential", "mixed", "all", "forget", "retain"])
def test_replicas_share_the_samples(order: Order, replicas: int) -> None:
    whole = Counter(flat(list(training_order(order))))
    shares = [list(training_order(order, num_replicas=replicas, rank=rank)) for rank in range(replicas)]
    counts = Counter(flat(flat_share) for flat_share in ()) + Counter(flat([flat(share) for share in shares]))
    assert counts.keys() == whole.keys()
    padding = counts - whole
    streams = 2 if order == "sequential" else 1
    assert padding.total() < streams * replicas
    assert all(counts[sample] <= 2 for sample in counts)
    assert len({tuple(len(batch) for batch in share) for share in shares}) == 1


def test_replicas_take_turns_when_nothing_is_padded() -> None:
    shares = [list(training_order("retain", retain=torch.arange(40), num_replicas=2, rank=rank)) for rank in (0, 1)]
    assert not set(flat(shares[0])) & set(flat(shares[1]))


@pytest.mark.parametrize("order", ["sequential", "mixed", "forget", "paired"])
def test_fewer_samples_than_replicas(order: Order) -> None:
    shares = [list(training_order(order, forget=torch.tensor([100]), num_replicas=4, rank=rank)) for rank in range(4)]
    assert len({len(share) for share in shares}) == 1
    if order != "mixed":
        assert all(100 in flat(share) for share in shares)


def test_unknown_order() -> None:
    with pytest.raises(ValueError, match="order must be one of paired, sequential, mixed, forget, retain, all; got 'random'"):
        training_order("random")


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("count", [3, 8, 25])
def test_fixed_order_shares_out_exactly(count: int, replicas: int, batch_size: int) -> None:
    positions = torch.arange(50, 50 + 2 * count, 2)
    shares = [list(FixedOrder(positions, batch_size, replicas, rank)) for rank in range(replicas)]
    assert sorted(flat([flat(share) for share in shares])) == positions.tolist()
    assert len({len(share) for share in shares}) == 1
    sizes = [len(batch) for share in shares for batch in share]
    assert min(sizes) >= 1
    # when there are too few samples for equally many batches on each replica, a batch of 1 becomes one of 2
    assert max(sizes) <= max(batch_size, 2 if replicas > 1 else 1)
    assert max(sizes) - min(sizes) <= 1
    assert [len(FixedOrder(positions, batch_size, replicas, rank)) for rank in range(replicas)] == [len(s) for s in shares]


def test_fixed_order_of_one_process_is_in_order() -> None:
    assert flat(list(FixedOrder(RETAIN, 7))) == RETAIN.tolist()


def test_fixed_order_does_not_change_with_the_epoch() -> None:
    sampler = FixedOrder(RETAIN, 7, 2, 1)
    first = list(sampler)
    sampler.set_epoch(3)
    assert first == list(sampler)


def test_fixed_order_of_nothing() -> None:
    assert list(FixedOrder(torch.arange(0), 7)) == []


def test_fewer_samples_to_evaluate_than_processes() -> None:
    with pytest.raises(ValueError, match="2 samples cannot be evaluated by 3 processes; use at most 2 processes"):
        FixedOrder(torch.arange(2), 8, 3, 0)


def test_workers_draw_anew_each_epoch_and_alike_on_resuming() -> None:
    """Loader processes take their random numbers from the sampler's generator, which follows the epoch."""

    def first_draw(epoch: int, **kwargs: int) -> int:
        loader: DataLoader[int] = DataLoader(range(8), generator=training_order("all", epoch, **kwargs).generator)
        return iter(loader)._base_seed  # type: ignore[attr-defined]

    assert first_draw(2) == first_draw(2)
    assert len({first_draw(0), first_draw(1), first_draw(0, seed=1), first_draw(0, num_replicas=2, rank=1)}) == 4
