"""Patches: what comes out is what was trained, and what was there comes back, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from salun_lightning.networks.loading import export_state_dict
from salun_lightning.saliency import Patch
from tests.modules.small_diffusion import diffusion, images
from tests.modules.small_runs import same, trainer

BASE = 0


def network(seed: int = BASE, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """With weights, and with buffers, of which one is a whole number."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5, 4)).to(dtype)


@torch.no_grad()
def moved(start: nn.Sequential, seed: int, ratio: float = 0.5, only: range = range(10**6)) -> nn.Sequential:
    """A network of which a part of each weight is another; the positions are among ``only``."""
    draw = torch.Generator().manual_seed(seed)
    after = network(dtype=start[0].weight.dtype)
    after.load_state_dict(start.state_dict())
    for weight in after.parameters():
        flat = weight.view(-1)
        chosen = (torch.rand(len(flat), generator=draw) < ratio) & torch.isin(torch.arange(len(flat)), torch.tensor(only))
        flat[chosen] += torch.randn(int(chosen.sum()), generator=draw).to(flat)
    after[1].num_batches_tracked += 3
    return after


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_applied_it_is_what_was_trained_and_taken_back_what_was_there(dtype: torch.dtype, tmp_path: Path) -> None:
    before, after = network(dtype=dtype), moved(network(dtype=dtype), 1)
    Patch.between(before, after, metadata={"request": "a church", "seed": 1}).save(tmp_path / "patch")
    patch = Patch.load(tmp_path / "patch")
    assert patch.metadata == {"request": "a church", "seed": "1"}
    changed = sum(int((a != b).sum()) for a, b in zip(state(before).values(), state(after).values(), strict=True))
    assert patch.num_changed == changed > 50
    was = state(before)
    undo = patch.apply(before)
    assert same(state(before), state(after))
    undo.apply(before)
    assert same(state(before), was)


def test_channels_last_and_a_wrapper_do_not_matter() -> None:
    patch = Patch.between(network(), moved(network(), 1))
    wrapped = nn.ModuleDict({"network": network().to(memory_format=torch.channels_last)})
    patch.apply(wrapped)
    assert same({name.removeprefix("network."): tensor for name, tensor in state(wrapped).items()}, state(moved(network(), 1)))
    assert wrapped["network"][0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_half_of_the_way(dtype: torch.dtype | None) -> None:
    before, after, half, none = network(), moved(network(), 1), network(), network()
    patch = Patch.between(before, after, dtype)
    patch.apply(half, scale=0.5)
    undo = patch.apply(none, scale=0.0)
    for name, weight in half.named_parameters():
        start, end = before.get_parameter(name), after.get_parameter(name)
        torch.testing.assert_close(weight, (start + end) / 2, rtol=0, atol=2e-7 if dtype is None else 3e-2)
    assert same(state(none), state(before))
    undo.apply(none)
    assert same(state(none), state(before))


def test_rounded_differences_are_close_and_taken_back_bit_for_bit(tmp_path: Path) -> None:
    before, after = network(), moved(network(), 1)
    Patch.between(before, after, torch.bfloat16).save(tmp_path / "patch")
    undo = Patch.load(tmp_path / "patch").apply(before)
    for name, weight in before.named_parameters():
        step = (after.get_parameter(name) - network().get_parameter(name)).abs()
        assert ((weight - after.get_parameter(name)).abs() <= step / 256 + 1e-6).all()
    assert before[1].num_batches_tracked == 3
    undo.apply(before)
    assert same(state(before), state(network()))


def test_size_of_a_half_mask_in_bfloat16(tmp_path: Path) -> None:
    before, after = nn.Linear(400, 500, bias=False), nn.Linear(400, 500, bias=False)
    with torch.no_grad():
        chosen = torch.rand(500, 400, generator=torch.Generator().manual_seed(0)) < 0.5
        after.weight.copy_(torch.where(chosen, before.weight + 0.1, before.weight))
    Patch.between(before, after, torch.bfloat16).save(tmp_path / "patch")
    Patch.between(before, after).save(tmp_path / "exact")
    whole = 4 * before.weight.numel()
    assert 0.27 * whole < (tmp_path / "patch").stat().st_size < 0.3 * whole
    assert (tmp_path / "exact").stat().st_size < 0.54 * whole


def test_runs_one_after_the_other_even_where_both_changed_a_weight() -> None:
    first, second = moved(network(), 1), moved(moved(network(), 1), 2)
    patch = Patch.between(network(), first).then(Patch.between(first, second))
    at_once = network()
    undo = patch.apply(at_once)
    assert same(state(at_once), state(second))
    undo.apply(at_once)
    assert same(state(at_once), state(network()))


def test_rounded_runs_one_after_the_other() -> None:
    first, second = network(), network()
    one = Patch.between(network(), moved(network(), 1), torch.bfloat16)
    one.apply(first)
    two = Patch.between(first, moved(first, 2), torch.bfloat16)
    undo = one.then(two).apply(second)
    two.apply(first)
    for name, weight in second.named_parameters():
        torch.testing.assert_close(weight, first.get_parameter(name), rtol=0.01, atol=0.01)
    undo.apply(second)
    assert same(state(second), state(network()))


def test_three_patches_of_differences_are_composed_from_the_end() -> None:
    now, patches = network(), []
    for seed in (1, 2, 3):
        patches.append(Patch.between(now, moved(now, seed), torch.bfloat16))
        patches[-1].apply(now)
    first, second, third = patches
    with pytest.raises(ValueError, match=r"is not known, .* 'first\.then\(second\.then\(third\)\)'"):
        first.then(second).then(third)
    together, start = first.then(second.then(third)), network()
    together.apply(start)
    for name, tensor in state(start).items():
        torch.testing.assert_close(tensor, state(now)[name], atol=0.02, rtol=0)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_tied_weights_are_changed_once(dtype: torch.dtype | None) -> None:
    def tied(change: float = 0.0) -> nn.ModuleDict:
        torch.manual_seed(0)
        layer = nn.Linear(3, 3)
        with torch.no_grad():
            layer.weight[0] += change
        return nn.ModuleDict({"one": layer, "other": layer})

    start = tied()
    undo = Patch.between(tied(), tied(0.5), dtype).apply(start)
    torch.testing.assert_close(start["one"].weight, tied(0.5)["other"].weight)
    undo.apply(start)
    assert same(state(start), state(tied()))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_two_runs_from_one_network_that_changed_different_weights(dtype: torch.dtype | None) -> None:
    lower, upper = moved(network(), 1, only=range(2)), moved(network(), 2, only=range(2, 10**6))
    upper[1].num_batches_tracked -= 3  # it would be changed by both
    patches = [Patch.between(network(), part, dtype) for part in (lower, upper)]
    both, other_way, expected = network(), network(), network()
    patches[0].then(patches[1]).apply(both)
    patches[1].then(patches[0]).apply(other_way)
    with torch.no_grad():
        for name, weight in expected.state_dict().items():
            for patch in patches:
                weight.copy_(patch._changed(name, weight))
    assert same(state(both), state(expected))
    assert same(state(other_way), state(expected))


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    first, second = (Patch.between(network(), moved(network(), seed)) for seed in (1, 2))
    with pytest.raises(ValueError, match=r"Both patches change \d+ weights of '0\.weight', and neither was made on"):
        first.then(second)
    with pytest.raises(ValueError, match="neither from what the first one leaves, nor from what it begins with"):
        first.then(Patch.between(network(5), moved(network(5), 1)))
    with pytest.raises(ValueError, match="One patch holds values, and the other differences"):
        first.then(Patch.between(network(), moved(network(), 2), torch.bfloat16))
    other = network(5)
    was = state(other)
    with pytest.raises(ValueError, match="The patch was made from another network, or from other weights of it"):
        first.apply(other)
    assert same(state(other), was)
    with pytest.raises(ValueError, match=r"states of one network: '0\.bias' is \(\(5,\), torch.float32\) and not there"):
        Patch.between(network(), nn.Linear(2, 2))
    applied = network()
    undo = first.apply(applied)
    with torch.no_grad():
        applied[0].bias += 1
    with pytest.raises(ValueError, match="from other weights"):
        undo.apply(applied)


def test_a_damaged_patch_changes_nothing(tmp_path: Path) -> None:
    patch = Patch.between(network(), moved(network(), 1))
    patch.changes["3.weight"].values[0] += 1
    start = network()
    with pytest.raises(ValueError, match=r"The patch is damaged.*The network is as it was"):
        patch.apply(start)
    assert same(state(start), state(network()))


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def of_another_kind(path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, path)


@pytest.mark.parametrize("make", [damaged, of_another_kind])
def test_a_file_that_is_no_patch(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "patch"
    Patch.between(network(), moved(network(), 1)).save(path)
    make(path)
    with pytest.raises(ValueError, match="cannot be read as a patch, so it is damaged or of another kind"):
        Patch.load(path)
    with pytest.raises(FileNotFoundError, match="There is no patch at"):
        Patch.load(tmp_path / "nothing")


def test_from_the_checkpoints_of_a_run(tmp_path: Path) -> None:
    module = diffusion()
    start = {f"network.{name}": tensor.clone() for name, tensor in module.network.state_dict().items()}
    torch.save(start, tmp_path / "before.pt")
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, datamodule=images())
    run.save_checkpoint(tmp_path / "after.ckpt", weights_only=True)
    patch = Patch.between(*(export_state_dict(tmp_path / name) for name in ("before.pt", "after.ckpt")))
    fresh = diffusion().network
    patch.apply(fresh)
    assert same(state(fresh), state(module.network))
