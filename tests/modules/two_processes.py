"""Two processes test, predict and train: each runs ``python -m tests.modules.two_processes <folder>``."""

import hashlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from salun_lightning.callbacks.predictions import PredictionsWriter
from salun_lightning.data import Samples
from salun_lightning.evidence.predictions import Predictions, Recorder
from salun_lightning.methods import RandomLabel
from tests.evidence.test_measures import confidences, said
from tests.modules.small_runs import classifier, digits, trainer


def recorded(rank: int) -> str:
    """A digest of what both processes recorded, of sets of which the first saw a quarter or nothing."""
    recorder = Recorder()
    for name, confidence in confidences().items():
        order = torch.randperm(len(confidence), generator=torch.Generator().manual_seed(1))
        first = 0 if name == "test" else len(order) // 4
        part = order.split([first, len(order) - first])[rank]
        if len(part):
            own = said(confidence[part], part)
            recorder.add({"set": name, "logits": own.logits, "target": own.targets, "index": own.indices})
    return digest(recorder.predictions())


def digest(predictions: Predictions) -> str:
    """The same for the same bits, whatever the order of the sets."""
    content = hashlib.sha256()
    for name, part in sorted(predictions.sets.items()):
        for values in (part.logits, part.targets, part.indices):
            content.update(name.encode() + values.numpy().tobytes())
    return content.hexdigest()


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
    runner = trainer(folder, devices=2, strategy="ddp", callbacks=[PredictionsWriter()])
    module, datamodule = classifier(original=folder / "original.ckpt"), digits(batch_size=50)
    results = runner.test(module, datamodule=datamodule, verbose=False)
    found = {
        "metrics": {name: value for result in results for name, value in result.items()},
        "recorded": recorded(runner.global_rank),
    }
    runner.predict(module, datamodule=datamodule, return_predictions=False)
    found["training"] = trained(folder)
    (folder / f"found-{runner.global_rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
