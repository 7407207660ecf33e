"""Projects that ``import pytorch_lightning``: the classes of ``lightning.pytorch`` under another name."""

from typing import Any
from unittest.mock import Mock

import pytest
import pytorch_lightning as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_fabric.utilities.distributed import DistributedSamplerWrapper
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.nn import functional
from torch.utils.data import SubsetRandomSampler

from salun_lightning.saliency import SaliencyMask, SaliencyMasking
from salun_lightning.saliency.forget_set import _positions
from tests.saliency.helpers import (
    Plain,
    assert_frozen,
    copied,
    fit,
    loader,
    same_weights,
    sgd,
    small_network,
)


class Theirs(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = small_network()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = functional.cross_entropy(self.net(batch[0]).float(), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self.parameters())


class TheirData(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader(shuffle=True)

    def forget_dataloader(self) -> Any:
        return loader()


def their_trainer(*callbacks: Any, **kwargs: Any) -> Any:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", devices=1, max_epochs=2, callbacks=list(callbacks), **{**quiet, **kwargs})


@pytest.mark.parametrize(
    "settings", [{}, {"precision": "bf16-mixed"}, {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}]
)
def test_the_callback_under_their_trainer(settings):
    module, ours, masking, reference = Theirs(), Plain(), SaliencyMasking(0.5), SaliencyMasking(0.5)
    original = copied(module)
    their_trainer(masking, **settings).fit(module, loader())
    fit(ours, reference, **settings)
    assert masking.mask == reference.mask
    assert masking.report == reference.report
    assert_frozen(original, copied(module), masking.mask)
    assert same_weights(copied(module), copied(ours))


def test_their_datamodule_averages_and_checkpoints(tmp_path):
    module, masking = Theirs(), SaliencyMasking(0.5, freeze_buffers=True)
    original, buffers = copied(module), {name: buffer.clone() for name, buffer in module.named_buffers()}
    average = pl.callbacks.EMAWeightAveraging(decay=0.9)
    checkpoint = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, filename="last")
    their_trainer(average, masking, checkpoint, enable_checkpointing=True).fit(module, TheirData())
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert SaliencyMask.load(tmp_path / "last.ckpt") == masking.mask
    for weights in (copied(module), state["state_dict"], state["current_model_state"]):
        assert_frozen(original, {name: weights[name] for name in original}, masking.mask)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in module.named_buffers())


def test_their_strategies_are_told_apart():
    for strategy in (DDPStrategy, ModelParallelStrategy):
        SaliencyMasking(0.5).setup(Mock(strategy=Mock(spec=strategy)), Theirs(), "fit")
    with pytest.raises(MisconfigurationException, match="keeps weights in a form of its own"):
        SaliencyMasking(0.5).setup(Mock(strategy=Mock(spec=FSDPStrategy)), Theirs(), "fit")


def test_samplers_that_their_trainer_puts_around_others_are_taken_off():
    wrapped = DistributedSamplerWrapper(SubsetRandomSampler([7, 3]), num_replicas=2, rank=0)
    assert _positions(wrapped) == [3, 7]
