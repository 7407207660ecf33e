"""SalUn-soft against a few lines of torch that sort all changes."""

import math
from collections.abc import Iterable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.nn import functional

from salun_lightning.saliency import SoftMasking, selection
from salun_lightning.saliency.selection import kth_smallest
from salun_lightning.weights import weights_of
from tests.saliency.helpers import Plain, PlainManual, copied, fit, loader, same_weights, sgd
from tests.saliency.test_masking_steps import SignDescent
from tests.saliency.test_pytorch_lightning import Theirs, their_trainer

WEIGHTS = 300


def held(ratio: float, step: int, steps: int) -> int:
    """How many weights have their original bits after a step."""
    return math.floor(Fraction(str(ratio)) * (1 - Fraction(step, steps)) * WEIGHTS)


def by_hand(module: Plain, ratio: float, accumulate: int = 1, epochs: int = 2) -> None:
    """The reference: step, find the threshold by sorting, shrink the changes."""
    original = torch.cat([weight.detach().flatten() for weight in module.parameters()]).clone()
    optimizer = module.make_optimizer(module.parameters())
    steps, step = epochs * math.ceil(5 / accumulate), 0
    for _ in range(epochs):
        for number, (images, targets) in enumerate(loader(), start=1):
            loss = functional.cross_entropy(module.net(images.to(original.dtype)).float(), targets)
            (loss / accumulate).backward()
            if number % accumulate and number < 5:
                continue
            if isinstance(module, PlainManual):
                nn.utils.clip_grad_norm_(module.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if k := held(ratio, step, steps):
                now = torch.cat([weight.detach().flatten() for weight in module.parameters()])
                change = torch.promote_types(now.dtype, torch.float32)
                delta = now.to(change) - original.to(change)
                threshold = delta.abs().sort().values[k - 1]
                shrunk = original + torch.where(delta > 0, delta - threshold, delta + threshold)
                new = torch.where(delta.abs() > threshold, shrunk.to(now.dtype), original)
                nn.utils.vector_to_parameters(new, list(module.parameters()))


OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "AdamW": partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1),
    "SignDescent": partial(SignDescent, lr=0.02),
}


@pytest.mark.parametrize(
    ("optimizer", "ratio", "accumulate"), [("SGD", 0.3, 1), ("SGD", 1.0, 2), ("AdamW", 0.3, 2), ("SignDescent", 0.5, 1)]
)
def test_every_step_is_that_of_the_reference(optimizer: str, ratio: float, accumulate: int) -> None:
    module, reference = (Plain(OPTIMIZERS[optimizer]) for _ in range(2))
    fit(module, SoftMasking(ratio), accumulate_grad_batches=accumulate)
    by_hand(reference, ratio, accumulate)
    assert same_weights(copied(module), copied(reference))


def test_manual_optimization() -> None:
    module, reference = PlainManual(), PlainManual()
    fit(module, SoftMasking(0.5))
    by_hand(reference, 0.5)
    assert same_weights(copied(module), copied(reference))


def test_weights_in_bf16() -> None:
    module, reference = Plain(), Plain()
    fit(module, SoftMasking(0.5), precision="bf16-true")
    by_hand(reference.bfloat16(), 0.5)
    assert {weight.dtype for weight in module.parameters()} == {torch.bfloat16}
    assert same_weights(copied(module), copied(reference))


class Counts(Callback):
    """Counts after each step the weights that have their original bits."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.original, self.counts = copied(pl_module), []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        now = weights_of(pl_module)
        self.counts.append(sum(int((now[name] == original).sum()) for name, original in self.original.items()))


def test_exactly_k_weights_are_original_after_each_step_and_none_at_the_end() -> None:
    counts = Counts()
    fit(Plain(), SoftMasking(0.5), counts, precision="64-true", max_epochs=3)  # there, no two changes are equal
    assert counts.counts == [held(0.5, step, 15) for step in range(1, 16)]
    assert (counts.counts[0], counts.counts[-1]) == (140, 0)


def test_a_run_that_counts_steps() -> None:
    counts = Counts()
    fit(Plain(), SoftMasking(0.5), counts, precision="64-true", max_epochs=-1, max_steps=7)
    assert counts.counts == [held(0.5, step, 7) for step in range(1, 8)]


def test_ratio_0_is_plain_training() -> None:
    plain, soft = Plain(), Plain()
    fit(plain)
    fit(soft, SoftMasking(0))
    assert same_weights(copied(plain), copied(soft))


class Momentum(Callback):
    """Keeps the momentum that the first step left."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == 1:
            states = trainer.optimizers[0].state.values()
            self.momentum, self.weights = [state["momentum_buffer"].clone() for state in states], copied(pl_module)


def test_momentum_stays_as_the_step_left_it() -> None:
    plain, soft = Momentum(), Momentum()
    fit(Plain(), plain, max_steps=2)
    fit(Plain(), SoftMasking(1.0), soft, max_steps=2)
    assert all(torch.equal(first, second) for first, second in zip(plain.momentum, soft.momentum, strict=True))
    assert not same_weights(plain.weights, soft.weights)


class Within(torch.optim.Optimizer):
    """An optimizer that lets another one step."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {})
        self.inner = sgd(self.param_groups[0]["params"])

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


def test_a_step_within_a_step_is_pulled_back_once() -> None:
    module, reference = Plain(Within), Plain(sgd)
    fit(module, SoftMasking(0.5))
    by_hand(reference, 0.5)
    assert same_weights(copied(module), copied(reference))


def saved(folder: Path, *callbacks: Callback) -> tuple[dict[str, Tensor], Path]:
    """The weights after three epochs, and the checkpoint of the first one."""
    module = Plain()
    every = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    fit(module, *callbacks, every, max_epochs=3, enable_checkpointing=True)
    return copied(module), folder / "epoch=0.ckpt"


@pytest.mark.filterwarnings("ignore:Be aware that when using")
def test_a_resumed_run_keeps_to_the_original_weights(tmp_path: Path) -> None:
    whole, checkpoint = saved(tmp_path, SoftMasking(0.5))
    resumed = Plain()
    fit(resumed, SoftMasking(0.5), max_epochs=3, ckpt_path=checkpoint)
    assert same_weights(copied(resumed), whole)


@pytest.mark.filterwarnings("ignore:Be aware that when using")
def test_another_run_is_not_resumed(tmp_path: Path) -> None:
    soft, plain = saved(tmp_path / "soft", SoftMasking(0.5))[1], saved(tmp_path / "plain")[1]
    with pytest.raises(MisconfigurationException, match=r"with SoftMasking of ratio 0\.5, but 0\.4 is asked for\. Resume with"):
        fit(Plain(), SoftMasking(0.4), max_epochs=3, ckpt_path=soft)
    with pytest.raises(MisconfigurationException, match=r"made without SoftMasking, so it does not hold the original weights"):
        fit(Plain(), SoftMasking(0.5), max_epochs=3, ckpt_path=plain)
    content = torch.load(soft, weights_only=True)
    del content["callbacks"]["SoftMasking"]["original"]["net.0.weight"]
    torch.save(content, soft)
    with pytest.raises(
        MisconfigurationException, match=r"in the checkpoint are not those of the weights that are trained\. Train"
    ):
        fit(Plain(), SoftMasking(0.5), max_epochs=3, ckpt_path=soft)


def test_weights_that_are_not_trained_do_not_count() -> None:
    module = Plain(lambda parameters: sgd(list(parameters)[-1:]))
    original = copied(module)
    fit(module, SoftMasking(1.0), max_steps=3)
    final = copied(module)
    assert [name for name in final if not torch.equal(final[name], original[name])] == ["net.7.weight"]


class Two(PlainManual):
    """Two optimizers."""

    def configure_optimizers(self) -> Any:
        return [sgd(self.net[0].parameters()), sgd(self.net[5].parameters())]


def test_what_is_not_served(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"the one optimizer, but there are 2\. Leave it out"):
        fit(Two(), SoftMasking())
    with pytest.raises(MisconfigurationException, match=r"this run has no end\. Give max_epochs or max_steps"):
        fit(Plain(), SoftMasking(), max_epochs=-1)
    with pytest.raises(MisconfigurationException, match=r"under ModelParallelStrategy no process .* Use a single device or"):
        SoftMasking().setup(Trainer(strategy=ModelParallelStrategy(), accelerator="cpu", logger=False), Plain(), "fit")
    for ratio in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"^The ratio of SoftMasking must lie between 0 .*, got .*\. Give one"):
            SoftMasking(ratio)


class Fails(Callback):
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        raise OSError("the disk is gone")


def test_nothing_is_left_behind_by_a_run_that_failed() -> None:
    callback, other = SoftMasking(1.0), Plain()
    failed = Plain()
    with pytest.raises(OSError, match="disk"):
        fit(failed, callback, Fails())
    before = copied(failed)
    sgd(failed.parameters()).step()
    failed.net[0].weight.grad = torch.ones_like(failed.net[0].weight)
    sgd(failed.parameters()).step()
    assert not torch.equal(failed.net[0].weight, before["net.0.weight"])
    fit(other, callback, max_epochs=2)  # the callback serves another run
    by_hand(reference := Plain(), 1.0)
    assert same_weights(copied(other), copied(reference))


def test_nan_is_not_hidden() -> None:
    class Poisoned(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + self.net[7].weight[0, 0] * float("nan")

    module = Poisoned()
    fit(module, SoftMasking(0.5), max_epochs=1)
    assert module.net[7].weight[0, 0].isnan()


def test_their_trainer() -> None:
    module, reference = Theirs(), Plain()
    their_trainer(SoftMasking(0.5)).fit(module, loader())
    by_hand(reference, 0.5)
    assert same_weights(copied(module), copied(reference))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_kth_smallest_of_many_tensors(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_CHUNK", 7)
    draw = torch.Generator().manual_seed(0)
    scores = {str(n): torch.rand(n, 2, generator=draw).mul(8).round(decimals=1).to(dtype) for n in (1, 3, 0, 9)}
    in_order = torch.cat([score.flatten() for score in scores.values()]).sort().values.tolist()
    assert [kth_smallest(scores, k) for k in range(1, len(in_order) + 1)] == in_order
    scores["3"][1, 1] = float("nan")
    assert math.isnan(kth_smallest(scores, len(in_order)))
    assert not math.isnan(kth_smallest(scores, len(in_order) - 1))
