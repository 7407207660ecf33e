"""What ``predict`` writes."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

_FIELDS = {"set", "index", "target", "probabilities"}


class ProbabilityWriter(BasePredictionWriter):
    """Writes ``predictions.csv`` into the run folder: set, index, target and the probability of each class.

    With several processes each writes the samples it saw, to ``predictions-<rank>.csv``. What a module of another kind predicts
    is left alone.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    @override
    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        batches = [batch for loader in predictions for batch in (loader if isinstance(loader, list) else [loader])]
        if not batches or not all(isinstance(batch, Mapping) and batch.keys() >= _FIELDS for batch in batches):
            return
        name = "predictions.csv" if trainer.world_size == 1 else f"predictions-{trainer.global_rank}.csv"
        path = Path(trainer.default_root_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.part")
        with unfinished.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            classes = batches[0]["probabilities"].shape[1]
            writer.writerow(["set", "index", "target", *(f"p{i}" for i in range(classes))])
            for batch in batches:
                rows = zip(batch["index"].tolist(), batch["target"].tolist(), batch["probabilities"].tolist(), strict=True)
                writer.writerows([batch["set"], index, target, *row] for index, target, row in rows)
        os.replace(unfinished, path)
        rank_zero_info(f"Class probabilities: {path}")
