"""Training by hand: what a run of the library is compared with."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from salun_lightning.data import Order, Samples
from salun_lightning.methods import Method
from salun_lightning.modules import ImageClassifier
from salun_lightning.saliency import SaliencyMask, SaliencyMasking, saliency_scores
from tests.modules.small_runs import trainer
from tests.small import small_datamodule

Loss = Callable[[nn.Module, nn.Module, Mapping[str, Samples], int], Tensor | None]
"""Of the network in training, the original in eval mode, a batch and the epoch; None for no step."""


def network() -> nn.Module:
    """A small one with BatchNorm, whose answers are far from uniform."""
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )
    made[5].weight.data *= 5
    return made


def half_a_mask() -> SaliencyMask:
    return SaliencyMask.from_scores(saliency_scores(network(), [], "random", seed=1), 0.5)


def settings(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)


class Batches(Callback):
    """Keeps the batches of a run, each with its epoch."""

    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, Samples], int]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *_: Any) -> None:
        self.seen.append((dict(batch), trainer.current_epoch))


def run(
    folder: Path, method: Method, mask: SaliencyMask | None = None, order: Order | None = None, **kwargs: Any
) -> tuple[ImageClassifier, Batches]:
    """A run of the library."""
    module, batches = ImageClassifier(network(), method=method, optimizer=settings), Batches()
    callbacks = [batches] if mask is None else [batches, SaliencyMasking(mask=mask)]
    trainer(folder, callbacks=callbacks, **kwargs).fit(module, datamodule=small_datamodule(val_fraction=0.2, order=order))
    return module, batches


def run_by_hand(loss: Loss, batches: Batches, mask: SaliencyMask | None = None) -> nn.Module:
    """The same in a plain loop."""
    student, original = network().train(), network().eval()
    before = deepcopy(dict(student.named_parameters()))
    optimizer = settings(student.parameters())
    for batch, epoch in batches.seen:
        value = loss(student, original, batch, epoch)
        optimizer.zero_grad()
        if value is None:
            continue
        value.backward()
        optimizer.step()
        if mask is not None:
            with torch.no_grad():
                for name, weight in student.named_parameters():
                    weight.copy_(torch.where(mask[name], weight, before[name]))
    return student


def check_same(module: ImageClassifier, expected: nn.Module, mask: SaliencyMask | None = None) -> None:
    """Weights and buffers are equal up to rounding, have moved, and outside the mask have not."""
    before, after = network().state_dict(), module.network.state_dict()
    torch.testing.assert_close(after, expected.state_dict(), rtol=1e-4, atol=1e-5)
    moved = {name: after[name] != before[name] for name, _ in module.network.named_parameters()}
    assert sum(int(where.sum()) for where in moved.values()) > 20
    if mask is not None:
        assert not any((where & ~mask[name]).any() for name, where in moved.items())


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL of each sample by its definition, of probabilities (B, C) and logits (B, C)."""
    return (teacher * (teacher.clamp(min=1e-30).log() - student.log_softmax(1))).sum(1)


def frozen_run_moves_nothing(folder: Path, method: Method) -> None:
    """With a mask that lets no weight move, the weights keep their bits."""
    none = SaliencyMask.from_scores(saliency_scores(network(), [], "random", seed=1), 0.0)
    module, _ = run(folder, method, none, max_epochs=2)
    for name, weight in network().named_parameters():
        assert torch.equal(module.network.get_parameter(name), weight), name
