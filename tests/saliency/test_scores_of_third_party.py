"""Scores of modules that have no ``forget_loss``: what their ``training_step`` would have learned from the forget set."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional

from salun_lightning.saliency import SaliencyMasking, Score, saliency_scores
from salun_lightning.weights import weights_of
from tests.saliency.helpers import Plain, fit, images_and_targets, loader


class Probe(Callback):
    """Takes the scores when training starts, and stops."""

    def __init__(self, batches: Iterable[Any], score: Score = "gradient") -> None:
        self.batches = batches
        self.score = score

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.scores = saliency_scores(pl_module, self.batches, self.score, strategy=trainer.strategy)
        trainer.should_stop = True


def probed(module: LightningModule, batch_size: int = 5, score: Score = "gradient", **kwargs: Any) -> dict[str, Tensor]:
    probe = Probe(loader(batch_size=batch_size), score)
    fit(module.double(), probe, precision="64-true", **kwargs)
    return probe.scores


def by_sample(module: Plain, power: int = 1) -> dict[str, Tensor]:
    """The reference: gradients of one sample at a time, summed."""
    module.double().eval()
    weights = weights_of(module)
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for image, target in images_and_targets():
        loss = functional.cross_entropy(module.net(image[None].double()).float(), target[None])
        for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            total[name] += gradient**power
    return {name: gradient.abs() for name, gradient in total.items()}


def assert_close(scores: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Up to the rounding of the loss, which is taken in float32."""
    assert list(scores) == list(expected)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-7)


class ReturnsDictionary(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return {"logits": batch[0], "loss": super().training_step(batch, batch_idx)}


class NoIndex(Plain):
    def training_step(self, batch: Any) -> Tensor:
        return super().training_step(batch, 0)


class OtherName(Plain):
    def training_step(self, batch: Any, number: int) -> Tensor:
        assert number == 0
        return super().training_step(batch, number)


class AnyArguments(Plain):
    def training_step(self, *arguments: Any) -> Tensor:
        return super().training_step(*arguments)


AUTOMATIC = [Plain, ReturnsDictionary, NoIndex, OtherName, AnyArguments]


@pytest.mark.parametrize("batch_size", [1, 4, 25])
@pytest.mark.parametrize("module", AUTOMATIC)
def test_the_score_of_a_training_step_is_that_of_its_samples(module, batch_size):
    assert_close(probed(module(), batch_size), by_sample(Plain()))


@pytest.mark.parametrize("module", AUTOMATIC)
def test_the_fisher_score_of_a_training_step_is_that_of_its_samples(module):
    assert_close(probed(module(), score="fisher"), by_sample(Plain(), power=2))


def test_manual_optimization_without_forget_loss_is_asked_for_one():
    with pytest.raises(ValueError, match=r"Manual optimizes manually.*Give the module a forget_loss\(batch\) that returns"):
        saliency_scores(Manual(), loader())
    with pytest.raises(ValueError, match="Manual optimizes manually"):
        fit(Manual(), SaliencyMasking(0.5))
    assert_close(probed(ManualWithLoss()), by_sample(Plain()))


class Manual(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class ManualWithLoss(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def forget_loss(self, batch: Any) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]).float(), batch[1])


class NoLoss(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)


class NoLossInDictionary(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        return {"logits": super().training_step(batch, batch_idx)}


class NeedsBoth(Plain):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return super().training_step(batch["retain"], batch_idx) - super().training_step(batch["forget"], batch_idx)


@pytest.mark.parametrize("module", [NoLoss, NoLossInDictionary])
def test_a_training_step_without_loss_is_refused(module):
    with pytest.raises(ValueError, match=r"training_step returned no loss .*\. Give the module a forget_loss"):
        saliency_scores(module(), loader())


def test_a_training_step_that_needs_the_retain_part_is_refused():
    both = [{"forget": batch, "retain": batch} for batch in loader()]
    with pytest.raises(ValueError, match=r"NeedsBoth\.training_step needs the retain part .* a forget_loss\(batch\)"):
        saliency_scores(NeedsBoth(), both)


def test_another_key_error_is_that_of_the_module():
    class Broken(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return batch["labels"]

    with pytest.raises(KeyError, match="labels"):
        saliency_scores(Broken(), [{"images": torch.ones(2, 2)}])


class Hooked(Plain):
    """Batches are prepared in the hooks around their transfer."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch["raw"] * 2, batch["target"]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] + 1, batch[1]


@pytest.mark.parametrize("attached", [True, False])
def test_batches_go_through_the_hooks_of_the_module(attached):
    raw = [{"raw": images, "target": targets} for images, targets in loader()]
    prepared = [(images * 2 + 1, targets) for images, targets in loader()]
    if attached:
        probe = Probe(raw)
        fit(Hooked(), probe, data=raw)
        scores = probe.scores
    else:
        scores = saliency_scores(Hooked(), raw)
    expected = saliency_scores(Plain(), prepared)
    assert all(torch.equal(scores[name], expected[name]) for name in expected)
