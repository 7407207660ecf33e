"""Whatever another callback writes, in whichever hook: no validation and no checkpoint sees it outside the mask."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from salun_lightning.saliency import SaliencyMasking
from salun_lightning.saliency.held import HeldModule
from salun_lightning.weights import weights_of
from tests.saliency.helpers import Plain, assert_frozen, copied, fit, half_mask, loader, quiet_trainer, sgd
from tests.saliency.test_leaks import LEAK, Evaluated

BEFORE_TRAINING = {"on_fit_start", "on_sanity_check_start", "on_sanity_check_end", "on_load_checkpoint"}
HOOKS = sorted(
    hook
    for hook in vars(Callback)
    if hook.startswith("on_") and hook not in BEFORE_TRAINING and not hook.startswith(("on_test_", "on_predict_"))
)


class Writes(Callback):
    """Writes to all weights at one of the points of training."""

    def __init__(self, where: str, change: float) -> None:
        self.change, self.calls = change, 0
        setattr(self, where, self.write)

    def write(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        for weight in pl_module.parameters():
            weight.data.add_(self.change)
        self.change /= 2
        self.calls += 1


class Stops(Callback):
    """Ends a run with an error, and saves what there is, behind all other callbacks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 3:
            raise OSError("the disk is gone")

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / "error.ckpt")


@pytest.mark.filterwarnings(LEAK)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("where", HOOKS)
def test_nobody_sees_what_is_written_outside_the_mask(where, first, tmp_path):
    module, masking, writes = Evaluated(sgd), SaliencyMasking(mask=half_mask(Plain())), Writes(where, 0.5)
    original = copied(module)
    if where == "on_train_start" and not first:
        original = {name: weight + 0.5 for name, weight in original.items()}  # the start of training is after that
    callbacks: list[Callback] = [masking, writes] if first else [writes, masking]
    callbacks.append(ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1))
    if where == "on_exception":
        callbacks.append(Stops(tmp_path))
    trainer = quiet_trainer(*callbacks, enable_checkpointing=True, num_sanity_val_steps=0, val_check_interval=1)
    if where == "on_exception":
        with pytest.raises(OSError, match="the disk is gone"):
            trainer.fit(module, loader(10), loader(5))
    else:
        trainer.fit(module, loader(10), loader(5))
        writes.change = 0.0  # training is over
        trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert writes.calls > 0
    paths = list(Path(tmp_path).glob("*.ckpt"))
    assert len(paths) >= 4
    assert len(module.seen) >= 3
    saved = [torch.load(path, weights_only=True)["state_dict"] for path in paths]
    for weights in (copied(module), *module.seen, *saved):
        assert_frozen(original, weights, masking.mask)


@pytest.mark.filterwarnings(LEAK)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "where",
    ["on_train_batch_end", "on_train_epoch_end", "on_validation_start", "on_validation_epoch_start", "on_validation_end"],
)
def test_the_largest_change_that_anything_made_is_reported(where, first, tmp_path):
    module = Evaluated(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    original, mask = copied(module), half_mask(module)
    masking, writes = SaliencyMasking(mask=mask), Writes(where, 0.5)
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="last")
    callbacks = (masking, writes) if first else (writes, masking)
    trainer = quiet_trainer(*callbacks, checkpoint, enable_checkpointing=True, num_sanity_val_steps=0)
    trainer.fit(module, loader(), loader())
    assert masking.report["drift"] == pytest.approx(0.5)  # the first, not what the last one left
    for weights in (copied(module), *module.seen, torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]):
        assert_frozen(original, weights, mask)


def test_a_leak_is_said_once_and_with_its_size():
    with pytest.warns(UserWarning, match=r"Something other than an optimizer wrote .* the largest change was 0\.5") as caught:
        fit(Plain(), SaliencyMasking(0.5), Writes("on_train_batch_end", 0.5))
    assert sum("Something other" in str(warning.message) for warning in caught) == 1


def test_what_is_held_follows_the_weights_to_another_device():
    """At the end of training Lightning moves a module to the CPU, and ``on_fit_end`` comes after that."""
    module = Plain()
    held = HeldModule(module, weights_of(module), half_mask(module), hold_uncovered=True, hold_buffers=False)
    held.release()
    held.weights = {nn.Parameter(weight.to("meta")): part for weight, part in held.weights.items()}
    held.follow()
    assert len(held.weights) == 6
    for part in held.weights.values():
        assert part.original.device.type == part.movable.device.type == "meta"
