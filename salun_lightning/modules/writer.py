"""What ``predict`` writes."""

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

_FIELDS = {"set", "index", "target", "probabilities"}


class ProbabilityWriter(Callback):
    """Writes ``predictions.csv`` into the run folder: set, index, target and the probability of each class.

    With several processes each writes the samples it saw, to ``predictions-<rank>.csv``. What a module of another kind predicts
    is left alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self._file: TextIO | None = None

    @override
    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any, **__: Any) -> None:
        if not isinstance(outputs, Mapping) or not outputs.keys() >= _FIELDS:
            return
        if self._file is None:
            path = _unfinished(_path(trainer))
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", newline="", encoding="utf-8")
            classes = outputs["probabilities"].shape[1]
            csv.writer(self._file).writerow(["set", "index", "target", *(f"p{i}" for i in range(classes))])
        rows = zip(outputs["index"].tolist(), outputs["target"].tolist(), outputs["probabilities"].tolist(), strict=True)
        csv.writer(self._file).writerows([outputs["set"], index, target, *row] for index, target, row in rows)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._file is not None:
            self._close()
            os.replace(_unfinished(_path(trainer)), _path(trainer))
            rank_zero_info(f"Class probabilities: {_path(trainer)}")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _path(trainer: Trainer) -> Path:
    name = "predictions.csv" if trainer.world_size == 1 else f"predictions-{trainer.global_rank}.csv"
    return Path(trainer.default_root_dir) / name


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")
