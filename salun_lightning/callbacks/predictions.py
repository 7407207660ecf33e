"""Writes what a model says of every sample."""

import csv
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from salun_lightning.evidence.predictions import FILE, Predictions
from salun_lightning.files import whole


class PredictionsWriter(Callback):
    """Writes ``predictions.safetensors`` into the run folder after ``test`` and ``predict``, and a table of ``predict``.

    It takes the attribute ``predictions`` of a module, as ours have; other modules are left alone. The table,
    ``predictions.csv``, holds set, index, target and the probability of each class. Nothing is written in a ``fast_dev_run``,
    which sees only the first batches.
    """

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tested = getattr(pl_module, "predictions", None)  # in this process, before

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if getattr(pl_module, "predictions", None) is self._tested:
            return  # of a model that generates: no classifier judges what predict makes
        predictions = self._write(trainer, pl_module)
        if predictions is not None:
            path = Path(trainer.default_root_dir) / "predictions.csv"
            _write_table(predictions, path)
            rank_zero_info(f"Class probabilities: {path}")

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> Predictions | None:
        """What was written, if anything was, and in this process."""
        predictions = getattr(pl_module, "predictions", None)
        fast: bool = trainer.fast_dev_run  # type: ignore[attr-defined]
        if not isinstance(predictions, Predictions) or fast or not trainer.is_global_zero:
            return None
        predictions.save(Path(trainer.default_root_dir) / FILE)
        return predictions


def _write_table(predictions: Predictions, path: Path) -> None:
    with whole(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        classes = max(part.logits.shape[1] for part in predictions.sets.values())
        writer.writerow(["set", "index", "target", *(f"p{i}" for i in range(classes))])
        for name, part in predictions.sets.items():
            rows = zip(part.indices.tolist(), part.targets.tolist(), part.probabilities.tolist(), strict=True)
            writer.writerows([name, index, target, *row] for index, target, row in rows)
