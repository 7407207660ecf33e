"""A SalUn run that can be killed: ``python -m tests.modules.interrupted <folder>`` ends with SIGKILL in its third epoch."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from salun_lightning.data import RandomCropFlip
from salun_lightning.methods import RandomLabel
from salun_lightning.saliency import SaliencyMasking
from tests.modules.small_runs import classifier, digits, trainer

EPOCHS = 4


class Kill(Callback):
    """Ends the process, as a cluster would, in the middle of the third epoch."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.current_epoch == 2 and trainer.global_step % 12 == 5:
            os.kill(os.getpid(), signal.SIGKILL)


def unlearn(folder: Path, *callbacks: Callback, resume: Path | None = None) -> LightningModule:
    """Unlearn a tenth of the digits from ``original.ckpt`` in the folder, with everything that draws random numbers on."""
    seed_everything(3, verbose=False)
    module = classifier(
        original=folder / "original.ckpt",
        method=RandomLabel(),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=5e-4),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS),
    )
    last = ModelCheckpoint(folder, "last", enable_version_counter=False, save_on_train_epoch_end=True)
    runner = trainer(
        folder,
        max_epochs=EPOCHS,
        callbacks=[SaliencyMasking(0.5), last, *callbacks],
        enable_checkpointing=True,
        limit_val_batches=1.0,
    )
    runner.fit(module, datamodule=digits(train_transform=RandomCropFlip(1)), ckpt_path=resume, weights_only=True)
    return module


if __name__ == "__main__":
    datamodule = digits()
    datamodule.setup()
    print(json.dumps(datamodule.split), flush=True)
    unlearn(Path(sys.argv[1]), Kill())
