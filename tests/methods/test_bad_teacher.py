"""Bad Teacher against a plain loop, and its teacher that knows nothing."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from salun_lightning.data import Samples, epoch_seed
from salun_lightning.methods import BadTeacher
from salun_lightning.methods.bad_teacher import with_fresh_weights
from tests.methods.plain_runs import check_same, divergence, frozen_run_moves_nothing, half_a_mask, network, run, run_by_hand
from tests.modules.small_runs import same, weights

SEED = 11


def fresh() -> nn.Module:
    """What torch makes of the seed, layer after layer, as in a new network."""
    made = network()
    state = torch.get_rng_state()
    torch.manual_seed(SEED)
    made[0].reset_parameters()
    made[1].reset_parameters()
    made[5].reset_parameters()
    torch.set_rng_state(state)
    return made.eval()


@pytest.mark.parametrize("masked", [False, True])
def test_bad_teacher_is_that_of_the_plain_loop(tmp_path: Path, masked: bool) -> None:
    incompetent, mixed = fresh(), set()

    def by_hand(student: nn.Module, original: nn.Module, batch: Mapping[str, Samples], epoch: int) -> Tensor:
        mixed.add(len(batch))
        count = sum(len(samples.targets) for samples in batch.values())
        answers = student(torch.cat([samples.inputs for samples in batch.values()]))
        total = torch.zeros(())
        for name, samples in batch.items():
            mine, answers = answers[: len(samples.targets)], answers[len(samples.targets) :]
            teacher = incompetent if name == "forget" else original
            with torch.no_grad():
                wanted = (teacher(samples.inputs) / 2).softmax(1)
            total = total + divergence(wanted, mine / 2).sum()
        return total / count

    mask = half_a_mask() if masked else None
    module, batches = run(tmp_path, BadTeacher(temperature=2.0, seed=SEED), mask, max_epochs=3)
    check_same(module, run_by_hand(by_hand, batches, mask), mask)
    assert 2 in mixed


def test_fresh_weights_follow_from_the_seed_and_disturb_nothing() -> None:
    trained = network()
    before, random = weights(trained), torch.get_rng_state()
    made = with_fresh_weights(trained, SEED)
    assert same(weights(made), weights(fresh()))
    assert same(weights(trained), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert not made.training or trained.training
    assert not same(weights(with_fresh_weights(trained, SEED + 1)), weights(made))


def test_no_weight_of_a_transformer_is_left() -> None:
    """Some of its weights belong to no layer that can reset them, and attention resets its own by another name."""
    torch.manual_seed(0)
    trained = VisionTransformer(8, 4, 2, 2, 16, 32, num_classes=5)
    with torch.no_grad():
        for weight in trained.parameters():
            weight.add_(torch.randn_like(weight))
    made, old = (weights(network) for network in (with_fresh_weights(trained, SEED), trained))
    for name, weight in old.items():
        assert torch.isfinite(made[name]).all()
        assert (made[name] != weight).all(), name
    both = torch.stack([state["encoder.pos_embedding"].flatten() for state in (made, old)])
    assert both[0].std() == pytest.approx(float(both[1].std()), rel=0.3)
    assert abs(float(torch.corrcoef(both)[0, 1])) < 0.5


def test_the_seed_is_that_of_the_run_but_not_what_the_original_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a comparison all models of a seed have one seed, of which an original may have been made."""
    monkeypatch.setenv("PL_GLOBAL_SEED", str(SEED))
    of_run, _ = run(tmp_path, BadTeacher(), max_epochs=1)
    given, _ = run(tmp_path, BadTeacher(seed=epoch_seed(SEED, -1, 0)), max_epochs=1)
    other, _ = run(tmp_path, BadTeacher(seed=SEED), max_epochs=1)
    assert same(weights(of_run.network), weights(given.network))
    assert not same(weights(of_run.network), weights(other.network))


def test_a_mask_of_nothing(tmp_path: Path) -> None:
    frozen_run_moves_nothing(tmp_path, BadTeacher())


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_no_temperature(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"^temperature must be positive and finite, got .*\. Give one such as 1\."):
        BadTeacher(temperature)
