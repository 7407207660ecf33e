"""The loss of l1-sparse, against a few lines of its own, and its schedule in whole runs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from salun_lightning.methods.l1_sparse import L1Sparse
from salun_lightning.modules import ImageClassifier
from tests.modules.small_runs import trainer
from tests.small import small_datamodule


class Alone(nn.Module):
    """One weight matrix that is trained, one that is not, and a trainer in the middle of ten epochs of six steps."""

    current_epoch = 4
    trainer = SimpleNamespace(num_training_batches=12, accumulate_grad_batches=2, estimated_stepping_batches=60)

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Parameter(torch.tensor([1.0, -2.0, 0.0]))
        self.frozen = nn.Parameter(torch.tensor([100.0]), requires_grad=False)

    def task_loss(self, samples: Tensor) -> Tensor:
        return samples.mean()  # here, samples are their losses


def test_the_loss_is_that_of_the_retain_set_and_a_penalty_that_decays() -> None:
    module = Alone()
    loss: Any = L1Sparse(gamma=0.5).loss(module, {"retain": torch.tensor([1.0, 3.0])})
    torch.testing.assert_close(loss, torch.tensor(2.0 + 0.5 * (1 - 4 / 10) * 3.0))
    loss.backward()
    torch.testing.assert_close(module.trained.grad, torch.tensor([0.3, -0.3, 0.0]))
    assert module.frozen.grad is None


class Watched(L1Sparse):
    """Keeps how strong the penalty was in each step, as a fraction of gamma."""

    def loss(self, module: Any, batch: Any) -> Tensor:
        total = super().loss(module, batch)
        weights = sum(float(weight.detach().abs().sum()) for weight in module.parameters())
        assert set(batch) == {"retain"}
        self.strengths.append(float(total.detach() - module.task_loss(batch["retain"]).detach()) / (self.gamma * weights))
        return total


@pytest.mark.parametrize("length", [{"max_epochs": 4}, {"max_epochs": -1, "max_steps": 8}])
def test_the_penalty_decays_over_the_epochs_of_a_run_by_epochs_and_by_steps(length: dict[str, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    method = Watched(gamma=1.0)
    method.strengths = []
    module = ImageClassifier(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), method=method)
    fitter = trainer(tmp_path, limit_train_batches=2, **length)
    fitter.fit(module, datamodule=small_datamodule())
    assert fitter.global_step == 8
    assert method.strengths == pytest.approx([1, 1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25], abs=1e-4)


@pytest.mark.parametrize("gamma", [-0.1, float("nan"), float("inf")])
def test_a_strength_that_is_none_is_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match=r"^gamma must be a finite number that is not negative, got .*\. Give one such as"):
        L1Sparse(gamma=gamma)
