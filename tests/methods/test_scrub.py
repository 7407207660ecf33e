"""SCRUB against a plain loop, and what becomes of epochs without the forget set."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from salun_lightning.data import Samples
from salun_lightning.methods import SCRUB
from salun_lightning.modules import ImageClassifier
from tests.methods.plain_runs import check_same, divergence, frozen_run_moves_nothing, half_a_mask, run, run_by_hand
from tests.modules.small_runs import trainer
from tests.small import small_datamodule

TEMPERATURE, ASCENT_EPOCHS = 3.0, 2


def by_hand(student: nn.Module, original: nn.Module, batch: Mapping[str, Samples], epoch: int) -> Tensor | None:
    (name, samples), *others = batch.items()
    assert not others
    if name == "forget" and epoch >= ASCENT_EPOCHS:
        return None
    logits = student(samples.inputs)
    with torch.no_grad():
        teacher = (original(samples.inputs) / TEMPERATURE).softmax(1)
    apart = TEMPERATURE**2 * divergence(teacher, logits / TEMPERATURE).mean()
    return -apart if name == "forget" else 0.9 * functional.cross_entropy(logits, samples.targets) + 0.3 * apart


@pytest.mark.parametrize("masked", [False, True])
def test_scrub_is_that_of_the_plain_loop(tmp_path: Path, masked: bool) -> None:
    """Two epochs with the forget set, of two batches, and two without, in which no momentum moves a weight either."""
    mask = half_a_mask() if masked else None
    method = SCRUB(gamma=0.9, alpha=0.3, temperature=TEMPERATURE, ascent_epochs=ASCENT_EPOCHS)
    module, batches = run(tmp_path, method, mask, max_epochs=4)
    orders = [[name for batch, of in batches.seen if of == epoch for name in batch] for epoch in range(4)]
    assert orders == [["forget"] * 2 + ["retain"] * 5] * 4
    check_same(module, run_by_hand(by_hand, batches, mask), mask)


def test_steps_on_passed_batches_move_nothing_where_gradients_are_accumulated(tmp_path: Path) -> None:
    """Two forget batches a step: the first step of each epoch is one of them alone."""
    found: list[bool] = []

    class Watched(SCRUB):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            now = torch.cat([weight.detach().flatten() for weight in pl_module.network.parameters()])
            if batch_idx % 2 == 1:
                found.append(torch.equal(now, self.before))
            self.before = now.clone()

    run(tmp_path, Watched(ascent_epochs=1), max_epochs=2, accumulate_grad_batches=2)
    assert found == [False, False, False, True, False, False]


def test_without_batch_norm_the_first_ascent_begins_at_a_stationary_point(tmp_path: Path) -> None:
    """The divergence from the original model is 0 there, and so is its gradient."""
    largest: list[float] = []

    class Watched(SCRUB):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            largest.append(max(float(weight.grad.abs().max()) for weight in pl_module.network.parameters()))

    torch.manual_seed(0)
    module = ImageClassifier(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), method=Watched())
    trainer(tmp_path, max_epochs=1, limit_train_batches=3).fit(module, datamodule=small_datamodule())
    assert largest[0] < 1e-6
    assert largest[2] > 1e-2  # the retain set


def test_a_joint_batch_adds_both_terms_as_long_as_there_are_both(tmp_path: Path) -> None:
    """With another order than the published one."""

    def both(student: nn.Module, original: nn.Module, batch: Mapping[str, Samples], epoch: int) -> Tensor | None:
        terms = [by_hand(student, original, {name: samples}, epoch) for name, samples in batch.items()]
        return sum(term for term in terms if term is not None)

    method = SCRUB(gamma=0.9, alpha=0.3, temperature=TEMPERATURE, ascent_epochs=ASCENT_EPOCHS)
    module, batches = run(tmp_path, method, order="paired", max_epochs=3)
    assert {(*batch,) for batch, _ in batches.seen} == {("forget", "retain")}
    check_same(module, run_by_hand(both, batches))


def test_a_mask_of_nothing(tmp_path: Path) -> None:
    frozen_run_moves_nothing(tmp_path, SCRUB(ascent_epochs=1))


NAN, INF = float("nan"), float("inf")
WRONG = {"gamma": [-1.0, INF, NAN], "alpha": [-0.1, INF, NAN], "temperature": [0.0, -1.0, INF, NAN], "ascent_epochs": [-1]}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_numbers_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^[a-z_ ]*{name}[a-z_ ]* must .*, got .*\. Give "):
        SCRUB(**{name: value})
