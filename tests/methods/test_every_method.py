"""What holds for every method that ships for classifiers. A new configuration needs no new test."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from salun_lightning.modules import ImageClassifier
from salun_lightning.saliency import SaliencyMask, SaliencyMasking
from salun_lightning.weights import weights_of
from tests.methods.every_method import (
    CONFIGURED,
    EPOCHS,
    NETWORKS,
    exact,
    module_of,
    on_each_process,
    original,
    parameters,
    run,
)
from tests.modules.small_runs import same, weights
from tests.saliency.processes import in_two_processes


def every_second(name: str) -> SaliencyMask:
    """Of each tensor the first, the third, ...: so of what belongs to the forgotten class, the first one, some may move."""
    trained = weights_of(module_of(name)).items()
    return SaliencyMask({name: (torch.arange(weight.numel()) % 2 == 0).view_as(weight) for name, weight in trained})


class Halved(NamedTuple):
    """A run under a mask, with a checkpoint of its first epoch."""

    name: str
    folder: Path
    weights: dict[str, Tensor]
    steps: int


def under_half_a_mask(name: str, folder: Path, **settings: Any) -> tuple[ImageClassifier, Trainer]:
    keep = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    return run(name, folder, SaliencyMasking(mask=every_second(name)), keep, enable_checkpointing=True, **settings)


@pytest.fixture(scope="module", params=CONFIGURED)
def halved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Halved:
    folder = tmp_path_factory.mktemp("halved")
    module, runner = under_half_a_mask(request.param, folder)
    return Halved(request.param, folder, weights(module), runner.global_step)


def test_nothing_outside_the_mask_moves_and_something_inside_does(halved: Halved) -> None:
    mask, moved = every_second(halved.name), 0
    for name, before in parameters(original()).items():
        changed = halved.weights[f"network.{name}"] != before
        assert not changed[~mask[name] if name in mask else ...].any(), name
        moved += int(changed.sum())
    assert moved > 0
    assert halved.steps == CONFIGURED[halved.name].get("trainer.max_steps", halved.steps)
    assert halved.steps >= EPOCHS or "trainer.max_steps" in CONFIGURED[halved.name]


def test_resumed_after_the_first_epoch_it_ends_with_the_same_bits(halved: Halved, tmp_path: Path) -> None:
    torch.rand(17)  # a process that resumes has drawn other numbers before
    module, _ = under_half_a_mask(halved.name, tmp_path, resume=halved.folder / "epoch=0.ckpt")
    assert same(weights(module), halved.weights)


@pytest.mark.parametrize("name", CONFIGURED)
def test_a_mask_of_nothing_keeps_every_bit(name: str, tmp_path: Path) -> None:
    module, runner = run(name, tmp_path, SaliencyMasking(0.0), max_epochs=1)
    assert runner.global_step > 0
    assert same(parameters(module.network), parameters(original()))


@pytest.mark.parametrize("network", sorted(NETWORKS.keys() - {"plain"}))
@pytest.mark.parametrize("name", CONFIGURED)
def test_it_takes_steps_on_networks_of_other_kinds_and_stays_finite(name: str, network: str, tmp_path: Path) -> None:
    """In a run that counts steps and no epochs."""
    steps = CONFIGURED[name].get("trainer.max_steps", 3)
    module, runner = run(name, tmp_path, network=network, max_epochs=-1, max_steps=steps)
    assert runner.global_step == steps
    after = weights(module.network)
    assert all(tensor.isfinite().all() for tensor in after.values())
    before = parameters(original(network))
    assert not same({name: after[name] for name in before}, before)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every method came to in one pair of processes."""
    folder = tmp_path_factory.mktemp("pair")
    in_two_processes(on_each_process, folder, [*CONFIGURED], limit=600)
    return folder


@pytest.mark.parametrize("name", CONFIGURED)
def test_two_processes_come_to_what_one_comes_to(name: str, pair: Path, tmp_path: Path) -> None:
    """Their batches hold the same samples, and rounding in double precision is all that may differ."""
    first, second = (torch.load(pair / f"{name}.{rank}.pt", weights_only=True) for rank in (0, 1))
    assert not isinstance(first, str), first
    assert same(first, second)
    one: dict[str, Any] = exact(name, tmp_path)
    assert all(torch.allclose(first[weight], one[weight], rtol=1e-7, atol=1e-9) for weight in one)
    largest = max(float((one[weight] - before).abs().max()) for weight, before in parameters(original()).items())
    assert largest > 1e-5  # so the tolerance says something
