"""The mask in memory: counts, set algebra, names."""

import copy

import pytest
import torch
from torch import Tensor

from salun_lightning.saliency import SaliencyMask
from tests.saliency.helpers import small_network


def random_booleans(seed: int) -> dict[str, Tensor]:
    """13 + 1 + 0 + 30 booleans: three tensors of four end within a byte."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"a": (13,), "scalar": (), "empty": (0, 4), "b": (2, 5, 3)}
    return {name: torch.rand(shape, generator=draw) > 0.5 for name, shape in shapes.items()}


def assert_holds(mask: SaliencyMask, expected: dict[str, Tensor]) -> None:
    assert list(mask) == list(expected)
    for name, booleans in expected.items():
        assert mask[name].dtype == torch.bool
        assert torch.equal(mask[name], booleans)
    assert mask.num_weights == sum(booleans.numel() for booleans in expected.values())
    assert mask.num_kept == sum(int(booleans.sum()) for booleans in expected.values())


@pytest.mark.parametrize("seed", range(3))
def test_a_mask_holds_what_it_is_given(seed):
    given = random_booleans(seed)
    mask = SaliencyMask(given)
    assert_holds(mask, given)
    assert mask.ratio == mask.num_kept / mask.num_weights
    assert mask.shapes == {"a": (13,), "scalar": (), "empty": (0, 4), "b": (2, 5, 3)}
    assert len(mask) == 4
    assert repr(mask) == f"SaliencyMask({mask.num_kept} of 44 weights in 4 tensors may move)"


def test_what_is_taken_out_can_be_written_to():
    mask = SaliencyMask(random_booleans(0))
    mask["a"].fill_(True)
    assert_holds(mask, random_booleans(0))


def test_any_layout_and_integer_zeros_and_ones_are_taken():
    booleans = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) > 0.5
    for given in (booleans.to(memory_format=torch.channels_last), booleans.long(), booleans.bfloat16()):
        assert torch.equal(SaliencyMask({"a": given})["a"], booleans)


@pytest.mark.parametrize("ratio", [0, 0.1, 0.3, 0.5, 0.999, 1])
def test_exactly_the_floor_of_the_ratio_is_kept(ratio):
    scores = {name: weight.detach().abs() for name, weight in small_network().named_parameters()}
    mask = SaliencyMask.from_scores(scores, ratio, {"score": "magnitude"})
    assert mask.num_weights == 300
    assert mask.num_kept == sum(int(mask[name].sum()) for name in mask) == int(ratio * 300)
    assert (mask.ratio, mask.metadata) == (ratio, {"score": "magnitude"})
    if 0 < ratio < 1:
        lowest_kept = min(scores[name][mask[name]].min() for name in mask if mask[name].any())
        assert all((scores[name][~mask[name]] <= lowest_kept).all() for name in mask)


@pytest.mark.parametrize("seed", range(3))
def test_set_algebra(seed):
    first, second = random_booleans(seed), random_booleans(seed + 10)
    one, other = SaliencyMask(first), SaliencyMask(second)
    assert_holds(one | other, {name: first[name] | second[name] for name in first})
    assert_holds(one & other, {name: first[name] & second[name] for name in first})
    assert_holds(~one, {name: ~first[name] for name in first})
    assert_holds(~~one, first)
    assert (one | ~one).num_kept == 44
    assert (one & ~one).num_kept == 0
    both, either = (one & other).num_kept, (one | other).num_kept
    assert one.iou(other) == both / either
    assert one.iou(one) == 1
    assert one.iou(~one) == 0


def test_two_masks_that_keep_nothing_overlap_fully():
    nothing = SaliencyMask({"a": torch.zeros(5, dtype=torch.bool)})
    assert nothing.iou(nothing) == 1


def test_density_is_that_of_each_tensor():
    mask = SaliencyMask({"a": torch.tensor([True, False, False, False]), "b": torch.ones(3), "c": torch.empty(0)})
    assert mask.density() == {"a": 0.25, "b": 1, "c": 0}


def test_equality_is_of_names_shapes_and_bits():
    given = random_booleans(0)
    assert SaliencyMask(given) == SaliencyMask(given, ratio=0.3)
    assert SaliencyMask(given) != ~SaliencyMask(given)
    assert SaliencyMask({"a": given["a"]}) != SaliencyMask({"b": given["a"]})
    assert SaliencyMask({"b": given["b"]}) != SaliencyMask({"b": given["b"].flatten()})
    assert SaliencyMask(given) != given
    assert copy.deepcopy(SaliencyMask(given)) == SaliencyMask(given)
    with pytest.raises(TypeError, match="unhashable"):
        hash(SaliencyMask(given))


def test_names_are_found_with_and_without_wrappers():
    booleans = torch.tensor([True, False])
    for stored in ("fc.weight", "network.fc.weight", "module._orig_mod.fc.weight"):
        mask = SaliencyMask({stored: booleans})
        assert list(mask) == ["fc.weight"]
        for asked in ("fc.weight", "network.fc.weight", "network._orig_mod.fc.weight", "module.fc.weight", "model.fc.weight"):
            assert torch.equal(mask[asked], booleans)
            assert asked in mask
    assert "other.fc.weight" not in mask
    with pytest.raises(KeyError, match=r"other\.fc\.weight"):
        mask["other.fc.weight"]


def test_names_that_differ_in_the_wrapper_alone_are_kept_apart():
    mask = SaliencyMask({"network.w": torch.tensor([True]), "model.w": torch.tensor([False])})
    assert list(mask) == ["network.w", "model.w"]
    assert mask["network.w"].item()
    assert not mask["model.w"].item()


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"a": (3,)}, r"another network: 'b' is \(2, 2\) in the mask and is not there among the trainable weights"),
        ({"a": (3,), "b": (2, 2), "c": (1,)}, r"another network: 'c' is not there in the mask and is \(1,\) among"),
        ({"a": (4,), "b": (4,)}, r"another network: 'a' is \(3,\) in the mask and is \(4,\) among"),
    ],
)
def test_another_network_is_refused(shapes, message):
    mask = SaliencyMask({"a": torch.ones(3), "b": torch.ones(2, 2)})
    with pytest.raises(ValueError, match=message):
        mask.check_shapes({name: torch.Size(shape) for name, shape in shapes.items()})


def test_masks_of_different_networks_do_not_combine():
    one, other = SaliencyMask({"a": torch.ones(3)}), SaliencyMask({"a": torch.ones(4)})
    for combine in (one.__or__, one.__and__, one.iou):
        with pytest.raises(ValueError, match="belongs to another network"):
            combine(other)
