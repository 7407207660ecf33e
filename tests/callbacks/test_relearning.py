"""How fast a concept is learned again: what is trained, on what, and that nothing is left of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from salun_lightning.callbacks import GenerationEvaluator, Relearning
from salun_lightning.data import ForgetRandom, Samples
from salun_lightning.networks import SmallResNet
from tests.modules.small_diffusion import diffusion, images
from tests.modules.small_runs import same, trainer, weights
from tests.modules.test_text_to_image import digits


def judge() -> GenerationEvaluator:
    torch.manual_seed(0)
    return GenerationEvaluator(2, classifier=SmallResNet(3, in_channels=1, width=4, stages=1), features="classifier")


def measured(folder: Path, relearning: Relearning, module: Any = None) -> float:
    module = module or diffusion(evaluation=judge())
    run = trainer(folder, callbacks=[relearning])
    run.test(module, datamodule=images(), verbose=False)
    return run.callback_metrics["relearning"].item()


def seen(rates: list[float], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Let the judge find these shares, one look after the other; returns the weights at each look."""
    looks: list[dict[str, Tensor]] = []

    def recognised(_: Any, __: Any, module: Any, ___: Any) -> float:
        looks.append(weights(module.network))
        return rates[min(len(looks), len(rates)) - 1]

    monkeypatch.setattr(Relearning, "_recognised", recognised)
    return looks


@pytest.mark.parametrize(
    ("rates", "steps", "looks"), [([0.9], 0, 1), ([0.1, 0.79, 0.8], 6, 3), ([0.2], 8, 3), ([0.0, 0.0, 0.0, 1.0], 8, 3)]
)
def test_steps_until_enough_is_recognised(
    rates: list[float], steps: int, looks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = seen(rates, monkeypatch)
    assert measured(tmp_path, Relearning(every=3, limit=8)) == steps
    assert len(found) == looks


def test_it_is_adam_on_few_forgotten_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = seen([0.0], monkeypatch)
    module = diffusion(evaluation=judge())
    before, loss, batches = weights(module.network), module.task_loss, list[tuple[Samples, Tensor]]()

    def noted(samples: Samples) -> Tensor:
        batches.append((samples, torch.get_rng_state()))
        return loss(samples)

    monkeypatch.setattr(module, "task_loss", noted)
    assert measured(tmp_path, Relearning(images=4, batch_size=5, every=1, limit=3, lr=0.01), module) == 3
    assert same(weights(module.network), before)
    assert all(weight.grad is None for weight in module.network.parameters())
    assert [len(samples.targets) for samples, _ in batches] == [5, 5, 5]
    assert {int(index) for samples, _ in batches for index in samples.indices} <= {0, 9, 18, 27}  # evenly over 0, 3, ..., 27
    reference = diffusion().eval()
    optimizer = torch.optim.Adam(reference.network.parameters(), lr=0.01)
    for look, (samples, state) in zip(looks, batches, strict=True):
        torch.testing.assert_close(weights(reference.network), look)
        torch.set_rng_state(state)
        optimizer.zero_grad()
        reference.task_loss(samples).backward()
        optimizer.step()
    assert not same(looks[0], looks[2])


def test_it_repeats_and_leaves_the_random_numbers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks, states = seen([0.0], monkeypatch), []
    for callbacks in ([], [Relearning(every=1, limit=2)], [Relearning(every=1, limit=2)]):
        module = diffusion(evaluation=judge())
        torch.manual_seed(3)
        trainer(tmp_path, callbacks=callbacks).test(module, datamodule=images(), verbose=False)
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1])
    assert same(looks[1], looks[3])


def test_the_judge_is_asked_for_what_was_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the evaluator judges it: the share is 100 - UA where the same images are looked at."""
    module = diffusion(evaluation=judge())
    found = []

    def steps(relearning: Relearning, run: Any, module: Any, samples: Samples) -> int:
        found.append(relearning._recognised(run, module, samples))
        return 0

    monkeypatch.setattr(Relearning, "_steps", steps)
    run = trainer(tmp_path, callbacks=[Relearning(judged=2)])
    run.test(module, datamodule=images(), verbose=False)
    assert found == [pytest.approx(1 - run.callback_metrics["UA"].item() / 100)]


def test_conditions_for_several_things_are_left_out() -> None:
    data = digits()
    data.setup()
    module = type("Module", (), {"datamodule": data, "device": torch.device("cpu")})()
    samples = Relearning(images=6)._samples(module)
    assert [data.class_names[target].removesuffix(" in ink") for target in samples.targets] == ["a seven"] * 6
    assert len(set(samples.indices.tolist())) == 6


def test_what_it_needs_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Relearning needs a module with an evaluation that has a classifier"):
        measured(tmp_path, Relearning(), diffusion())
    data, run = images(forget=ForgetRandom(count=5)), trainer(tmp_path, callbacks=[Relearning()])
    with pytest.raises(ValueError, match="of a forgotten class, or of one thing alone: there are none"):
        run.test(diffusion(evaluation=judge()), datamodule=data, verbose=False)
    with pytest.raises(ValueError, match=r"until must be positive, got 0\.0"):
        Relearning(until=0.0)
