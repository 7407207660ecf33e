"""Where values are looked for: what a configuration may say, how they are spread, and when a range is widened."""

import math
from typing import Any

import pytest

from salun_lightning.search.space import Choices, Range, grid, read_space, size, spread

RATE = {"low": 1.0e-3, "high": 0.1, "log": True}
DEFAULTS: dict[str, Any] = {
    "net.sizes.0.0": 1,
    "net.sizes.0.1": 2,
    "net.depth": 3,
    "lr": 0.01,
    "alpha": 0.95,
    "epochs": 5,
    "order": "mixed",
    "name": "x",
    "clip": None,
}


def test_a_space_is_read() -> None:
    space = read_space({"lr": RATE, "order": ["mixed", "paired"], "epochs": {"low": 1, "high": 10}}, DEFAULTS)
    assert space == {
        "lr": Range(0.001, 0.1, log=True),
        "order": Choices(("mixed", "paired")),
        "epochs": Range(1, 10, whole=True),
    }
    assert size(space) == math.inf
    assert size({"order": space["order"], "epochs": space["epochs"]}) == 20


def test_the_default_belongs_to_it() -> None:
    space = read_space({"lr": {**RATE, "low": 0.05}, "epochs": [1, 2], "clip": [1.0]}, DEFAULTS)
    assert space == {"lr": Range(0.01, 0.1, log=True), "epochs": Choices((5, 1, 2)), "clip": Choices((None, 1.0))}


def test_values_that_are_lists() -> None:
    space = read_space({"betas": [[0.9, 0.99]]}, {"betas.0": 0.9, "betas.1": 0.999})
    assert space == {"betas": Choices(([0.9, 0.999], [0.9, 0.99]))}
    part = space["betas"]
    assert [part.sampled(choice) for choice in part.distribution().choices] == [[0.9, 0.999], [0.9, 0.99]]
    assert read_space({"milestones": [[1, 2]]}, {"milestones": "empty"}) == {"milestones": Choices(([], [1, 2]))}
    assert read_space({"name": ["full"]}, {"name": "empty"}) == {"name": Choices(("empty", "full"))}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, "It has no search space"),
        ({}, "It has no search space"),
        ([1], "It has no search space"),
        ({"clip.0": [1]}, "names 'clip.0', which is no option of this run"),
        ({"net": [1]}, "names 'net', which holds further options: net.sizes.0.0, net.sizes.0.1, net.depth. Name one."),
        ({"net.sizes": [[[1]]]}, "names 'net.sizes', which holds further options: net.sizes.0.0, net.sizes.0.1. Name one"),
        ({"rate": [1]}, "names 'rate', which is no option of this run"),
        ({"lr": []}, "Give a list of values, or low, high and log"),
        ({"lr": 0.1}, "Give a list of values, or low, high and log"),
        ({"lr": {"low": 1}}, "Give a list of values, or low, high and log"),
        ({"lr": {"low": 1, "high": 2, "step": 3}}, "Give a list of values, or low, high and log"),
        ({"lr": {"low": 2, "high": 1}}, "low below high"),
        ({"lr": {"low": 0, "high": 1, "log": True}}, "above 0 where log is true"),
        ({"lr": {"low": float("nan"), "high": 1}}, "Give numbers"),
        ({"lr": {"low": "a", "high": 1}}, "Give numbers"),
        ({"clip": {"low": 0.1, "high": 1}}, "The default of 'clip' is None, which no such range holds"),
    ],
)
def test_what_is_no_space(found: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_space(found, DEFAULTS)


@pytest.mark.parametrize("count", [3, 9, 40])
def test_settings_are_spread_evenly(count: int) -> None:
    """However many are taken: no part of the range is as long as three even steps and holds none."""
    space = {"lr": Range(1e-3, 0.1, log=True)}
    points = sorted(math.log10(spread(space, number)["lr"]) for number in range(count))
    gaps = [b - a for a, b in zip([-3, *points], [*points, -1], strict=True)]
    assert max(gaps) < 3 * 2 / (count + 1)
    assert points[0] >= -3
    assert points[-1] <= -1


def test_settings_of_several_options_meet_every_choice() -> None:
    space = {"lr": Range(1e-3, 0.1, log=True), "order": Choices(("a", "b", "c")), "epochs": Range(1, 4, whole=True)}
    points = [spread(space, number) for number in range(12)]
    assert {point["order"] for point in points} == {"a", "b", "c"}
    assert {point["epochs"] for point in points} == {1, 2, 3, 4}
    assert len({point["lr"] for point in points}) == 12
    assert len(list(grid({"order": space["order"], "epochs": space["epochs"]}))) == 12


def test_values_are_written_with_three_digits() -> None:
    assert Range(1e-5, 0.1, log=True).sampled(0.0012345) == 0.00123
    assert Range(0.99, 0.999).sampled(0.9912345) == 0.99123
    assert Range(1, 9, whole=True).sampled(3.0) == 3
    assert Range(1e-3, 0.1, log=True).sampled(0.09999) == 0.1


@pytest.mark.parametrize(
    ("before", "value", "after"),
    [
        (Range(1e-3, 0.1, log=True), 0.09, Range(1e-3, 1.0, log=True)),
        (Range(1e-3, 0.1, log=True), 0.001, Range(1e-4, 0.1, log=True)),
        (Range(1e-3, 0.1, log=True), 0.05, Range(1e-3, 0.1, log=True)),
        (Range(2.0, 4.0), 4.0, Range(2.0, 6.0)),
        (Range(2.0, 4.0), 2.05, Range(0.0, 4.0)),
        (Range(1.0, 4.0), 1.0, Range(0, 4.0)),  # not below 0
        (Range(-1.0, 1.0), -1.0, Range(-3.0, 1.0)),
        (Range(0.5, 0.9), 0.9, Range(0.5, 1)),  # a fraction
        (Range(0.0, 1.0), 1.0, Range(0.0, 1.0)),
        (Range(2, 10, whole=True), 10, Range(2, 18, whole=True)),
        (Range(2, 50, log=True, whole=True), 2, Range(1, 50, log=True, whole=True)),
    ],
)
def test_a_range_is_widened_where_the_best_value_lies_at_its_end(before: Range, value: float, after: Range) -> None:
    wider = before.widened(value)
    assert (wider.low, wider.high) == pytest.approx((after.low, after.high))
    assert (wider.log, wider.whole) == (after.log, after.whole)
