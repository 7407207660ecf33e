"""Scores of modules that have no ``forget_loss``: what their ``training_step`` would have learned from the forget set."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional

from salun_lightning.saliency import Score, saliency_scores
from salun_lightning.saliency.weights import weights_of
from tests.saliency.helpers import Plain, fit, images_and_targets, loader, small_network


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


class OneOptimizer(Plain):
    """Manual optimization as in Lightning's manual; ``order`` is that of the calls."""

    order = ("zero_grad", "backward", "step")

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss, optimizer = super().training_step(batch, batch_idx), self.optimizers()
        for call in self.order:
            if call == "backward":
                self.manual_backward(loss)
            else:
                getattr(optimizer, call)()


class ZeroLast(OneOptimizer):
    order = ("backward", "step", "zero_grad")


class Clips(OneOptimizer):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(Plain.training_step(self, batch, batch_idx))
        self.clip_gradients(optimizer, gradient_clip_val=1e-9)
        optimizer.step()


class Closure(OneOptimizer):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        def closure() -> Tensor:
            self.optimizers().optimizer.zero_grad()
            loss = Plain.training_step(self, batch, batch_idx)
            self.manual_backward(loss)
            return loss

        assert self.optimizers().step(closure).ndim == 0


class Accumulates(OneOptimizer):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx % 3 == 0:
            self.optimizers().zero_grad()
        self.manual_backward(Plain.training_step(self, batch, batch_idx))
        if (batch_idx + 1) % 3 == 0:
            self.optimizers().step()


class AccumulatesAndZeroesLast(OneOptimizer):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(Plain.training_step(self, batch, batch_idx))
        if (batch_idx + 1) % 3 == 0:
            self.optimizers().step()
            self.optimizers().zero_grad()


AUTOMATIC = [Plain, ReturnsDictionary, NoIndex, OtherName, AnyArguments]
MANUAL = [OneOptimizer, ZeroLast, Clips, Closure, Accumulates, AccumulatesAndZeroesLast]


@pytest.mark.parametrize("batch_size", [1, 4, 25])
@pytest.mark.parametrize("module", AUTOMATIC + MANUAL)
def test_the_score_of_a_training_step_is_that_of_its_samples(module, batch_size):
    assert_close(probed(module(), batch_size), by_sample(Plain()))


@pytest.mark.parametrize("module", [*AUTOMATIC, OneOptimizer, Clips, Accumulates])
def test_the_fisher_score_of_a_training_step_is_that_of_its_samples(module):
    assert_close(probed(module(), score="fisher"), by_sample(Plain(), power=2))


class Adversarial(LightningModule):
    """A generator and a discriminator that are trained by turns."""

    style = "toggle"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Flatten(), nn.Linear(32, 32), nn.Unflatten(1, (2, 4, 4)))
        self.discriminator = small_network()

    def losses(self, images: Tensor) -> tuple[Tensor, Tensor]:
        fake = self.generator(images)
        generator_loss = -self.discriminator(fake)[:, 0].mean()
        return generator_loss, (self.discriminator(fake) - self.discriminator(images)).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        schedulers = self.lr_schedulers()
        for turn, optimizer in enumerate(self.optimizers()):
            getattr(self, self.style)(optimizer, batch[0], turn)
            self.clip_gradients(optimizer, gradient_clip_val=1e-9)
            schedulers[turn].step()
            self.log("lr", schedulers[turn].get_last_lr()[0])

    def toggle(self, optimizer: Any, images: Tensor, turn: int) -> None:
        self.toggle_optimizer(optimizer)
        self.manual_backward(self.losses(images)[turn])
        optimizer.step()
        optimizer.zero_grad()
        self.untoggle_optimizer(optimizer)

    def toggle_model(self, optimizer: Any, images: Tensor, turn: int) -> None:
        with optimizer.toggle_model():
            self.manual_backward(self.losses(images)[turn])
            optimizer.step()
            optimizer.zero_grad()

    def zero_first(self, optimizer: Any, images: Tensor, turn: int) -> None:
        optimizer.zero_grad()
        self.manual_backward(self.losses(images)[turn])
        optimizer.step()

    def closure(self, optimizer: Any, images: Tensor, turn: int) -> None:
        def closure() -> None:
            optimizer.zero_grad()
            self.manual_backward(self.losses(images)[turn])

        with optimizer.toggle_model(sync_grad=False):
            optimizer.step(closure=closure)

    def configure_optimizers(self) -> tuple[list[Any], list[Any]]:
        optimizers = [torch.optim.Adam(net.parameters(), lr=0.1) for net in (self.generator, self.discriminator)]
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizer, 1) for optimizer in optimizers]


def turns_by_hand(module: Adversarial) -> dict[str, Tensor]:
    """The reference: of each network the gradient of its own loss, batch by batch, times the size of the batch."""
    module.double().eval()
    total = {name: torch.zeros_like(weight) for name, weight in weights_of(module).items()}
    for images, _ in loader(batch_size=4):
        for loss, part in zip(module.losses(images.double()), ("generator", "discriminator"), strict=True):
            weights = {name: weight for name, weight in weights_of(module).items() if name.startswith(part)}
            gradients = torch.autograd.grad(loss * len(images), list(weights.values()), retain_graph=True)
            for name, gradient in zip(weights, gradients, strict=True):
                total[name] += gradient
    return {name: gradient.abs() for name, gradient in total.items()}


@pytest.mark.parametrize("style", ["toggle", "toggle_model", "zero_first", "closure"])
def test_each_of_two_optimizers_counts_with_its_own_gradient(style, monkeypatch):
    monkeypatch.setattr(Adversarial, "style", style)
    scores, expected = probed(Adversarial(), batch_size=4), turns_by_hand(Adversarial())
    assert list(scores) == list(expected)
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("style", ["toggle", "toggle_model", "zero_first", "closure"])
def test_nothing_of_the_optimizers_changes(style, monkeypatch):
    monkeypatch.setattr(Adversarial, "style", style)

    class Watch(Probe):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            states = []
            for _ in range(2):
                weights = {name: weight.detach().clone() for name, weight in pl_module.named_parameters()}
                flags = [weight.requires_grad for weight in pl_module.parameters()]
                optimizers = [(o.state_dict(), len(o.state)) for o in trainer.optimizers]
                schedulers = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
                states.append((weights, flags, optimizers, schedulers, trainer.global_step, dict(trainer.logged_metrics)))
                super().on_train_start(trainer, pl_module)
            assert states[0][1:] == states[1][1:]
            assert all(torch.equal(states[0][0][name], states[1][0][name]) for name in states[0][0])
            assert type(pl_module.optimizers()[0]).__name__ == "LightningAdam"
            self.watched = True

    watch = Watch(loader())
    fit(Adversarial(), watch)
    assert watch.watched


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
