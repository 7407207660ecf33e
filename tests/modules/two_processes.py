"""Two processes test, predict and train: each runs ``python -m tests.modules.two_processes <folder>``."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from salun_lightning.data import Samples
from salun_lightning.methods import RandomLabel
from salun_lightning.metrics import MembershipInference
from salun_lightning.modules import ProbabilityWriter
from tests.metrics.test_membership import confidences, update
from tests.modules.small_runs import classifier, digits, trainer


def own_share(confidence: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Unequal shares, in no particular order."""
    order = torch.randperm(len(confidence), generator=torch.Generator().manual_seed(1))
    indices = order.split([len(order) // 4, len(order) - len(order) // 4])[rank]
    return confidence[indices], indices


def membership_inference(rank: int) -> float:
    mia = MembershipInference()
    for group, confidence in confidences().items():
        update(mia, group, *own_share(confidence, rank))
    return mia.compute().item()


class Met(Callback):
    """Remembers the samples of each set that this process trained on."""

    def __init__(self) -> None:
        self.samples: dict[str, list[int]] = {"forget": [], "retain": []}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Samples], *_: Any) -> None:
        for name, part in batch.items():
            self.samples[name] += part.indices.tolist()


def trained(folder: Path) -> dict[str, Any]:
    """What this process met in an epoch of random labels, and what came of it."""
    met = Met()
    module = classifier(original=folder / "original.ckpt", method=RandomLabel())
    runner = trainer(folder, devices=2, strategy="ddp", callbacks=[met], max_epochs=1)
    runner.fit(module, datamodule=digits(batch_size=50))
    total = sum(parameter.double().abs().sum().item() for parameter in module.parameters())
    return {"met": met.samples, "steps": runner.global_step, "total": total}


def main(folder: Path) -> None:
    """Test, predict and train the original model, and write what each process found."""
    runner = trainer(folder, devices=2, strategy="ddp", callbacks=[ProbabilityWriter()])
    module, datamodule = classifier(original=folder / "original.ckpt"), digits(batch_size=50)
    results = runner.test(module, datamodule=datamodule, verbose=False)
    found = {
        "metrics": {name: value for result in results for name, value in result.items()},
        "membership inference": membership_inference(runner.global_rank),
    }
    runner.predict(module, datamodule=datamodule, return_predictions=False)
    found["training"] = trained(folder)
    (folder / f"found-{runner.global_rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
