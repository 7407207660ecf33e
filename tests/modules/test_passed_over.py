"""A batch that a method passes over moves nothing, whatever the optimizer does without a gradient."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from salun_lightning.methods import Method
from salun_lightning.modules import ImageClassifier
from tests.methods.whole_class import data, network
from tests.modules.small_runs import same, trainer, weights


class EveryThird(Method):
    """Descends on one batch of three, and keeps the weights after each step."""

    order = "retain"

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.states.append({name: weight.detach().clone() for name, weight in pl_module.named_parameters()})

    def loss(self, module: Any, batch: Any) -> Tensor | None:
        return module.task_loss(batch["retain"]) if len(self.states) % 3 == 0 else None


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("several", [1, 3])
def test_only_steps_with_a_loss_move_weights(make: Any, several: int, tmp_path: Path) -> None:
    """With three batches a step, each step has one loss among them, and the others count as zero."""
    method = EveryThird()
    settings = {"momentum": 0.9} if make is torch.optim.SGD else {}
    module = ImageClassifier(network(), method=method, optimizer=lambda p: make(p, lr=0.1, weight_decay=0.5, **settings))
    runner = trainer(tmp_path, max_epochs=1, accumulate_grad_batches=several)
    runner.fit(module, datamodule=data(batch_size=4))
    assert len(method.states) == 9
    moved = [not same(one, other) for one, other in zip(method.states, method.states[1:], strict=False)]
    assert moved == ([False, False, True] * 3 if several == 1 else [False, True, False] * 3)[:8]
    assert runner.callback_metrics["train/loss"] > 0
    assert any(not torch.equal(weights(module.network)[name], tensor) for name, tensor in weights(network()).items())
