"""Small runs on the digits that the tests of the modules share."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from salun_lightning.data import DigitsDataModule, ForgetRandom
from salun_lightning.methods import FineTune
from salun_lightning.modules import ImageClassifier
from salun_lightning.networks import SmallResNet


def digits(**kwargs: Any) -> DigitsDataModule:
    return DigitsDataModule(**{"forget": ForgetRandom(fraction=0.1), "val_fraction": 0.1, "batch_size": 128, **kwargs})


def classifier(**kwargs: Any) -> ImageClassifier:
    return ImageClassifier(SmallResNet(10, width=8, stages=2), **kwargs)


def trainer(folder: Path, **kwargs: Any) -> Trainer:
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"), False)
    one = {"default_root_dir": folder, "accelerator": "cpu", "devices": 1, "limit_val_batches": 0}
    return Trainer(**{**quiet, **one, **kwargs})


def train_original(folder: Path, epochs: int = 4, **kwargs: Any) -> Path:
    """Train an original model and return its checkpoint."""
    torch.manual_seed(0)
    module = classifier(method=FineTune(order="all"), optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    runner = trainer(folder, max_epochs=epochs)
    runner.fit(module, datamodule=digits(**{"batch_size": 64, **kwargs}))
    path = folder / "original.ckpt"
    runner.save_checkpoint(path)
    return path


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of all weights and buffers."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether all bits are equal."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
