"""What methods ask classifiers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from salun_lightning.data import Samples
from salun_lightning.methods import FineTune
from salun_lightning.methods.answers import divergence, rightness
from tests.methods.plain_runs import divergence as by_definition
from tests.methods.plain_runs import network, run
from tests.modules.small_runs import same, weights


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_divergence_is_that_of_the_definition(temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    teacher[0, 1:3] = -torch.inf
    expected = by_definition((teacher / temperature).softmax(1), student / temperature)
    torch.testing.assert_close(divergence(student, teacher, temperature), expected)
    torch.testing.assert_close(divergence(student, student, temperature), torch.zeros(6, dtype=torch.float64))


class Asks(FineTune):
    """Asks about sets after the first epoch."""

    needs_original = True

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        before, random, modes = weights(pl_module), torch.get_rng_state(), [m.training for m in pl_module.modules()]
        self.answers = {name: rightness(pl_module, name) for name in ("forget", "retain", "val", "test", "test_forget")}
        self.of_original = rightness(pl_module, "forget", original=True)
        assert same(weights(pl_module), before)
        assert torch.equal(torch.get_rng_state(), random)
        assert [m.training for m in pl_module.modules()] == modes
        assert pl_module.network.training


def test_answers_are_those_of_the_network_in_eval_mode(tmp_path: Path) -> None:
    method = Asks()
    module, _ = run(tmp_path, method, max_epochs=1)
    sets = {name: module.datamodule._sets[name][2] for name in ("forget", "retain", "val", "test")}
    asked = module.network.eval()
    for name, positions in sets.items():
        right, classes = method.answers[name]
        assert torch.equal(classes, positions % 3)
        assert torch.equal(right, asked(images(positions)).argmax(1) == positions % 3)
    assert [len(field) for field in method.answers["test_forget"]] == [0, 0]
    positions = sets["forget"]
    assert torch.equal(method.of_original[0], network().eval()(images(positions)).argmax(1) == positions % 3)
    assert 0 < sum(int(right.sum()) for right, _ in method.answers.values()) < 72


def images(positions: torch.Tensor) -> torch.Tensor:
    return Samples(positions.float()[:, None, None, None].expand(-1, 1, 4, 4) / 255, positions % 3, positions).inputs
