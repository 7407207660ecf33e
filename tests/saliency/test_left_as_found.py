"""The saliency pass leaves everything as it found it."""

import random
from collections import deque
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import CatMetric, MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from salun_lightning.saliency import SaliencyMasking, saliency_scores
from tests.saliency.helpers import Plain, copied, fit, loader, same_bits, same_weights


class Recorder(Logger):
    """Keeps all it is handed."""

    name, version = "recorder", "0"

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.seen.append((step, metrics))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    @property
    def experiment(self) -> list[Any]:
        return self.seen


class InPlace(Metric):
    """A metric that writes to its state."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, value: Tensor) -> None:
        self.total.add_(value)

    def compute(self) -> Tensor:
        return self.total


class Busy(Plain):
    """A training step with every side effect that one can have."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"width": 3, "names": ["a"]})
        self.net.append(nn.Dropout(0.2))
        self.mean = MeanMetric()
        self.outputs = CatMetric()
        self.total = InPlace()
        accuracy, f1 = (kind(3, average="micro") for kind in (MulticlassAccuracy, MulticlassF1Score))
        self.metrics = MetricCollection({"acc": accuracy, "f1": f1})
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("last", torch.zeros(1))
        self.register_buffer("nothing", None)
        self.steps = 0
        self.losses: list[Tensor] = []
        self.queue = deque([1.0, 2.0], maxlen=2)
        self.nested: dict[str, list[float]] = {"losses": [0.5]}
        self.targets_seen: set[int] = set()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, targets = batch
        noise = torch.randn(()) + np.random.randn() + random.random()
        logits = self.net(images + 0.1 * float(noise))
        loss = functional.cross_entropy(logits, targets)
        self.update(loss.detach(), logits.detach(), targets)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"mean": self.mean, "steps": float(self.steps)})
        if self.logger is not None:
            self.logger.log_metrics({"direct": loss.item()})
            self.logger.experiment.append(loss.item())
        return loss

    def update(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        self.mean(loss)
        self.outputs.update(loss)
        self.total.update(loss)
        self.metrics.update(logits, targets)
        self.seen += 1
        self.last = loss[None].clone()
        self.steps += 1
        self.hparams["names"].append("b")
        self.losses.append(loss)
        self.queue.append(float(loss))
        self.nested["losses"].append(float(loss))
        self.nested.setdefault("more", []).append(float(loss))
        self.targets_seen.update(targets.tolist())


def state(module: Busy) -> list[Any]:
    """All that the pass might change, as plain data."""
    return [
        {name: child.training for name, child in module.named_modules()},
        {name: parameter.grad.tolist() for name, parameter in module.named_parameters() if parameter.grad is not None},
        {name: value.tolist() for name, value in (*module.named_parameters(), *module.named_buffers())},
        [module.mean.mean_value.tolist(), module.mean.weight.tolist(), module.mean._update_count, module.mean.update_called],
        [float(value) for value in (*module.outputs.value, module.total.total)],
        [module.metrics.compute_groups, {name: metric.tp.tolist() for name, metric in module.metrics.items(copy_state=False)}],
        [module.steps, [float(loss) for loss in module.losses]],
        deepcopy([dict(module.hparams), module.queue, module.nested, module.targets_seen]),
        [vars(module).keys()],
        [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()],
    ]


def used(module: Busy) -> Busy:
    """As in the middle of training: with gradients, one part frozen in eval mode, and something in every metric."""
    module.train()
    module.net[1].eval()
    module.log = module.log_dict = lambda *_, **__: None
    for batch in list(loader())[:2]:
        module.training_step(batch, 0).backward()
    del module.log, module.log_dict
    return module


@pytest.mark.parametrize("score", ["gradient", "fisher", "snip", "magnitude", "random"])
def test_everything_is_left_as_it_was(score):
    module = used(Busy())
    before = state(module)
    objects = [module.seen, module.last, module.losses, module.queue, module.nested, module.net[0].weight.grad]
    saliency_scores(module, loader(), score)
    for after, expected in zip(state(module), before, strict=True):
        assert after == expected
    now = [module.seen, module.last, module.losses, module.queue, module.nested, module.net[0].weight.grad]
    assert all(mine is theirs for mine, theirs in zip(now, objects, strict=True))


def test_all_but_the_random_state_is_left_as_it_was_after_an_error():
    module = used(Busy())
    before = state(module)

    def batches() -> Any:
        yield from loader()
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        saliency_scores(module, batches())
    for after, expected in list(zip(state(module), before, strict=True))[:-1]:
        assert after == expected


def test_the_pass_is_in_eval_mode_with_gradients():
    modes = []

    class Watch(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            modes.append((self.training, self.net[1].training, torch.is_grad_enabled()))
            return super().training_step(batch, batch_idx)

    with torch.no_grad():
        saliency_scores(Watch(), loader())
    assert modes == [(False, False, True)] * 5


def test_metrics_go_on_as_if_nothing_had_happened():
    """Torchmetrics finds at the first update which metrics share their state; the pass must not decide it for training."""
    module, other = Busy(), Busy()
    saliency_scores(module, loader())
    logits, targets = torch.eye(3)[[0, 1, 1, 2]], torch.tensor([0, 1, 2, 0])
    for busy in (module, other):
        busy.metrics.update(logits, targets)
    assert module.metrics.compute() == other.metrics.compute()
    assert module.metrics.compute_groups == other.metrics.compute_groups


@pytest.mark.parametrize("score", ["gradient", "fisher"])
def test_training_goes_on_as_if_nothing_had_happened(score):
    """A run whose mask lets everything move equals one without the callback: weights, logs, metrics and random numbers."""
    runs = []
    for callbacks in ((), (SaliencyMasking(1, score=score),)):
        torch.manual_seed(7)
        np.random.seed(7)
        random.seed(7)
        logger, module = Recorder(), Busy()
        trainer = fit(module, *callbacks, data=loader(shuffle=True, drop_last=True), logger=logger, log_every_n_steps=1)
        trainer.callback_metrics.pop("steps")
        runs.append((logger.seen, {k: float(v) for k, v in trainer.callback_metrics.items()}, state(module), copied(module)))
        assert trainer.loggers == [logger]
    unmasked, masked = runs
    assert masked[0] == unmasked[0]
    assert masked[1] == unmasked[1]
    assert masked[2] == unmasked[2]
    assert same_weights(masked[3], unmasked[3])


def test_replaced_gradients_come_back_as_the_same_tensors():
    module = Plain()
    loss = functional.cross_entropy(module.net(next(iter(loader()))[0]), torch.arange(5) % 3)
    loss.backward()
    gradients = [weight.grad for weight in module.parameters()]
    values = [gradient.clone() for gradient in gradients]
    saliency_scores(module, loader())
    assert all(weight.grad is gradient for weight, gradient in zip(module.parameters(), gradients, strict=True))
    assert all(same_bits(gradient, value) for gradient, value in zip(gradients, values, strict=True))


class Sealed(dict):
    """A mapping that refuses to be changed, as configurations of diffusers do."""

    def _refuse(self, *_: Any, **__: Any) -> None:
        raise TypeError("sealed")

    __setitem__ = __delitem__ = clear = update = pop = setdefault = _refuse


def test_attributes_that_cannot_be_changed_are_left_alone():
    module = Plain()
    module.config = Sealed({"sizes": [1, 2]})
    assert saliency_scores(module, loader())
    assert module.config == {"sizes": [1, 2]}
    assert type(module.config) is Sealed


def test_nested_containers_are_refilled_in_place():
    class Nested(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.inner = [1]
            self.outer = {"inner": self.inner, "queue": deque([2])}

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.inner.append(3)
            self.outer["queue"].append(4)
            self.outer["new"] = 5
            return super().training_step(batch, batch_idx)

    module = Nested()
    inner, outer = module.inner, module.outer
    saliency_scores(module, loader())
    assert module.outer is outer
    assert outer == {"inner": [1], "queue": deque([2])}
    assert outer["inner"] is inner is module.inner
