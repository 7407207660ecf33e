"""BiasShift edits a single number, and wins at UA with it."""

from pathlib import Path

import pytest
import torch
from torch import nn

from salun_lightning.methods import BiasShift
from tests.methods.whole_class import CLASSES, FORGOTTEN, NOT_WHOLE, data, network, trained
from tests.modules.small_runs import same, weights


def test_the_bias_of_the_forgotten_class_is_lowered_and_nothing_else(tmp_path: Path) -> None:
    before, after = weights(network()), weights(trained(tmp_path, BiasShift(shift=7.5)).network)
    expected = before.pop("6.bias") - 7.5 * (torch.arange(CLASSES) == FORGOTTEN)
    assert torch.equal(after.pop("6.bias"), expected)
    assert same(before, after)


def test_a_large_shift_is_a_perfect_ua_and_changes_no_other_answer(tmp_path: Path) -> None:
    module = trained(tmp_path, BiasShift(shift=1e4)).eval()
    inputs = torch.rand(50, 1, 6, 6)
    with torch.no_grad():
        before, after = network().eval()(inputs), module.network(inputs)
    others = torch.arange(CLASSES) != FORGOTTEN
    assert not (after.argmax(1) == FORGOTTEN).any()
    assert torch.equal(before[:, others].argmax(1), after[:, others].argmax(1))


def test_a_mask_of_ratio_0_keeps_all_bits(tmp_path: Path) -> None:
    assert same(weights(network()), weights(trained(tmp_path, BiasShift(), 0.0).network))


def test_a_request_of_single_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^BiasShift makes a model forget whole classes, but this request leaves .* Ask for"):
        trained(tmp_path, BiasShift(), data=data(NOT_WHOLE))


def test_networks_without_a_bias_or_a_head_are_refused(tmp_path: Path) -> None:
    without = nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES, bias=False))
    with pytest.raises(ValueError, match=r"^The classification head '1' has no bias that is trained, .* Choose another"):
        trained(tmp_path, BiasShift(), network=without)
    headless = nn.Sequential(nn.Conv2d(1, CLASSES, 6), nn.Flatten())
    with pytest.raises(
        ValueError, match=r"^The logits of Sequential are the answer of no linear layer, .* Choose a method that"
    ):
        trained(tmp_path, BiasShift(), network=headless)


@pytest.mark.parametrize("shift", [float("nan"), float("inf")])
def test_a_shift_that_is_none_is_refused(shift: float) -> None:
    with pytest.raises(ValueError, match=r"^shift must be a finite number, got .* Give one such as"):
        BiasShift(shift=shift)
