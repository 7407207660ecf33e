"""Averaged weights, compiled modules, buffers, and other callbacks that write to weights."""

from functools import partial
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from salun_lightning.saliency import SaliencyMasking
from tests.saliency.helpers import Plain, assert_frozen, copied, fit, half_mask, loader, quiet_trainer, same_bits, same_weights

ALL_ZERO_BUT_ONE = 5e-324  # the drift that stands for a change of bits alone


def buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in module.named_buffers()}


class Validated(Plain):
    """Validation swaps the average into the network, and back."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])


AVERAGES = {
    "EMA": partial(EMAWeightAveraging, decay=0.9),
    "EMA without buffers": partial(EMAWeightAveraging, decay=0.9, use_buffers=False),
    "EMA that starts late": partial(EMAWeightAveraging, decay=0.9, update_starting_at_step=7),
    "EMA on another device": partial(EMAWeightAveraging, decay=0.9, device=torch.device("cpu", 0)),
    "mean": WeightAveraging,
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", AVERAGES)
def test_the_average_is_frozen_too(kind, first, tmp_path):
    module = Validated()
    original, mask = copied(module), half_mask(module)
    masking, average = SaliencyMasking(mask=mask), AVERAGES[kind]()
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="last")
    trainer = quiet_trainer(*((masking, average) if first else (average, masking)), checkpoint, enable_checkpointing=True)
    trainer.fit(module, loader(), loader())
    assert_frozen(original, copied(module), mask)
    assert masking.report["drift"] == 0
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for state in (saved["state_dict"], saved["current_model_state"]):
        assert_frozen(original, {name: state[name] for name in original}, mask)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", ["EMA", "EMA without buffers", "mean"])
def test_the_average_of_frozen_buffers_is_frozen_too(kind, first):
    module = Validated()
    torch.manual_seed(0)
    module.net[1].running_mean.normal_()
    original, masking = buffers(module), SaliencyMasking(0.5, freeze_buffers=True)
    average = AVERAGES[kind]()
    quiet_trainer(*((masking, average) if first else (average, masking))).fit(module, loader(), loader())
    assert all(same_bits(buffer, original[name]) for name, buffer in module.named_buffers())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_an_averaged_run_resumes_with_the_original_weights(tmp_path):
    module, resumed = Plain(), Plain()
    original, mask = copied(module), half_mask(module)
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="last")
    fit(module, SaliencyMasking(mask=mask), AVERAGES["EMA"](), checkpoint, enable_checkpointing=True, max_epochs=1)
    fit(resumed, SaliencyMasking(mask=mask), AVERAGES["EMA"](), ckpt_path=tmp_path / "last.ckpt", max_epochs=3)
    assert_frozen(original, copied(resumed), mask)


def test_an_average_is_frozen_from_before_its_first_update(tmp_path):
    """The average is a copy of the module from before ``setup`` loads the original weights."""

    class Loads(Plain):
        def setup(self, stage: str) -> None:
            for weight in self.parameters():
                nn.init.constant_(weight, 0.3)

    class SaveAtOnce(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
            if trainer.global_step == 0:
                trainer.save_checkpoint(tmp_path / "start.ckpt")

    module = Loads()
    mask = half_mask(module)
    fit(module, SaliencyMasking(mask=mask), AVERAGES["EMA that starts late"](), SaveAtOnce())
    state = torch.load(tmp_path / "start.ckpt", weights_only=True)["state_dict"]
    for name in mask:
        assert (state[name][~mask[name]] == 0.3).all()


def test_weights_averaged_over_the_last_epochs_are_frozen():
    module = Plain()
    original, mask = copied(module), half_mask(module)
    masking, average = SaliencyMasking(mask=mask), StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2)
    fit(module, masking, average, max_epochs=5)
    assert_frozen(original, copied(module), mask)
    assert masking.report["drift"] == 0


def dense() -> Plain:
    torch.manual_seed(2)
    return Plain(network=nn.Sequential(nn.Flatten(), nn.Linear(32, 4), nn.Tanh(), nn.Linear(4, 3)))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch looks at it
@pytest.mark.skipif(which("g++") is None and which("clang++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("how", ["network", "network in place", "module"])
def test_frozen_when_compiled(how):
    torch._dynamo.reset()
    module, callback, reference = dense(), SaliencyMasking(0.5), SaliencyMasking(0.5)
    original = copied(module)
    fit(dense(), reference, max_epochs=1)
    if how == "network":
        module.net = torch.compile(module.net)
    elif how == "network in place":
        module.net.compile()
    # the whole step takes inductor a minute; what it generates is covered by the other two
    trained = torch.compile(module, backend="eager") if how == "module" else module
    quiet_trainer(callback, max_epochs=1).fit(trained, loader())
    assert (callback.mask & reference.mask).num_kept >= reference.mask.num_kept - 1  # sums are rounded in another order
    assert_frozen(original, copied(module), callback.mask)


@pytest.mark.parametrize("freeze", [True, False])
def test_buffers_move_unless_they_are_frozen(freeze):
    module = Plain()
    module.register_buffer("flags", torch.tensor([True, False]))
    original = buffers(module)
    fit(module, SaliencyMasking(0.5, freeze_buffers=freeze))
    unchanged = {name for name, buffer in module.named_buffers() if same_bits(buffer, original[name])}
    assert unchanged == (set(original) if freeze else {"flags"})


class Meddler(Callback):
    """Writes to all weights, and to one of them twice, at the end of training."""

    def __init__(self, change: float) -> None:
        self.change = change

    @torch.no_grad()
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for weight in pl_module.parameters():
            weight.add_(1e-3)
        pl_module.net[5].bias.fill_(self.change)


@pytest.mark.parametrize(("change", "drift"), [(2.0, 2.0), (float("nan"), float("inf"))])
def test_what_another_callback_writes_is_measured_put_back_and_warned_of(change, drift):
    module = Plain()
    nn.init.zeros_(module.net[5].bias)
    original = copied(module)
    callback = SaliencyMasking(0)
    with pytest.warns(UserWarning, match="Something other than an optimizer wrote to weights outside the saliency mask"):
        fit(module, callback, Meddler(change))
    assert callback.report["drift"] == drift
    assert (callback.report["num_weights"], callback.report["num_kept"], callback.report["num_moved"]) == (300, 0, 0)
    assert same_weights(copied(module), original)


def test_a_change_of_bits_alone_is_drift():
    module = Plain()
    nn.init.zeros_(module.net[5].bias)
    callback = SaliencyMasking(0)

    class Negate(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            pl_module.net[5].bias.data.neg_()

    with pytest.warns(UserWarning, match="Something other than an optimizer"):
        fit(module, callback, Negate())
    assert callback.report["drift"] == ALL_ZERO_BUT_ONE
    assert not torch.signbit(module.net[5].bias).any()


def test_the_report_says_how_many_could_move_and_did(caplog):
    module, callback = Plain(), SaliencyMasking(0.5)
    original = copied(module)
    with caplog.at_level("INFO"):
        fit(module, callback)
    moved = sum(int((original[name] != weight).sum()) for name, weight in copied(module).items())
    assert callback.report == {
        "num_weights": 300,
        "num_kept": 150,
        "num_moved": moved,
        "num_uncovered": 0,
        "num_without_optimizer": 0,
        "drift": 0,
    }
    assert 140 < moved <= 150
    assert "SaliencyMasking: SaliencyMask(150 of 300 weights in 6 tensors may move)" in caplog.text
    assert f"of 300 weights 150 could move and {moved} did; largest change outside the mask: 0" in caplog.text


class Unfreeze(BaseFinetuning):
    """Trains the last layer, and the first one from the second epoch on."""

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)


@pytest.mark.parametrize("uncovered", ["frozen", "free"])
def test_a_weight_that_is_unfrozen_later_is_held_still_or_moves(uncovered, caplog):
    def trainable(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.1, momentum=0.9, weight_decay=0.1)

    module, callback = Plain(trainable), SaliencyMasking(0.5, uncovered=uncovered)
    original, first = copied(module), module.net[0].weight.detach().clone()
    fit(module, callback, Unfreeze(), max_epochs=3)
    assert callback.mask.num_weights == 300 - 54
    assert callback.report["num_uncovered"] == 54
    assert callback.report["drift"] == 0
    assert same_bits(module.net[0].weight, first) == (uncovered == "frozen")
    assert_frozen({n: w for n, w in original.items() if n in callback.mask}, copied(module), callback.mask)


def test_weights_that_are_frozen_and_yet_optimized_are_left_alone():
    module = Plain()
    module.net[0].requires_grad_(False)
    first = module.net[0].weight.detach().clone()
    fit(module, SaliencyMasking(0.5))
    assert torch.equal(module.net[0].weight, first)


class Fails(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trainer.global_step == 3:
            raise OSError("the disk is gone")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("module_class", [Plain, Fails])
def test_nothing_stays_behind_on_optimizers_and_averages(module_class):
    module, callback, average = module_class(), SaliencyMasking(0.5), AVERAGES["EMA"]()
    trainer = quiet_trainer(callback, average)
    if module_class is Fails:
        with pytest.raises(OSError, match="the disk is gone"):
            trainer.fit(module, loader())
    else:
        trainer.fit(module, loader())
    assert not _global_optimizer_post_hooks
    assert not _global_optimizer_pre_hooks
    assert not module._state_dict_pre_hooks
    assert "save_checkpoint" not in vars(trainer.strategy)
    assert callback._held is None
    before = copied(module)
    with torch.no_grad():
        for weight in module.parameters():
            weight.grad = torch.ones_like(weight)
    trainer.optimizers[0].step()
    assert all((before[name] != weight).all() for name, weight in copied(module).items())


def test_an_interrupt_in_the_middle_of_a_step_leaves_frozen_weights_as_they_were():
    module, callback = Plain(), SaliencyMasking(0.5)
    original = copied(module)

    class Interrupted(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
            for weight in pl_module.parameters():
                weight.data.add_(1)
            callback.on_exception(trainer, pl_module, KeyboardInterrupt())
            trainer.should_stop = True

    fit(module, callback, Interrupted())
    assert_frozen(original, copied(module), callback.mask)


def test_a_masked_run_saves_the_plain_weights(tmp_path: Path):
    module = Plain()
    trainer = fit(module, SaliencyMasking(0.5))
    trainer.save_checkpoint(tmp_path / "masked.ckpt")
    saved = torch.load(tmp_path / "masked.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == Plain().state_dict().keys()
