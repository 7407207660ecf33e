"""What a run keeps in its folder: configuration, metrics and checkpoints, none of which is ever lost or half there."""

import csv
import io
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from salun_lightning.files import read_torch, set_aside, whole, write_text

_SHOWN_ONLY = {  # options that do not change which model comes out
    "": ("ckpt_path", "weights_only", "config"),
    "trainer": (
        "default_root_dir",
        "logger",
        "enable_progress_bar",
        "enable_model_summary",
        "log_every_n_steps",
        "profiler",
        "detect_anomaly",
    ),
}


class WholeCheckpointIO(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all, and are read without executing anything that is in them."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if storage_options is not None or _is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with whole(path) as unfinished:
            torch.save(checkpoint, unfinished)

    @override
    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = "cpu",
        weights_only: bool | None = None,  # True, whatever is asked for
    ) -> dict[str, Any]:
        check_checkpoint_path(path)
        # not by way of torch.hub, which would take an older file of the same name
        stream = io.BytesIO(get_filesystem(path).cat_file(str(path))) if _is_remote(path) else None
        content = read_torch(path, "a checkpoint", stream, map_location)
        if not isinstance(content, dict) or "pytorch-lightning_version" not in content:
            raise ValueError(
                f"'{path}' is not the checkpoint of a run. Weights alone, to start from, are given to --model.original."
            )
        return content


def check_checkpoint_path(path: str | Path) -> None:
    """Refuse what cannot be a checkpoint file.

    Raises:
        FileNotFoundError: There is nothing.
        ValueError: It is a folder.
    """
    if _is_remote(path):
        return
    if Path(path).is_dir():
        raise ValueError(f"'{path}' is a folder. Give the checkpoint file in it, such as checkpoints/last.ckpt.")
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no checkpoint at '{path}'. Give the path of the last.ckpt of a run.")


def _is_remote(path: str | Path) -> bool:
    return "://" in str(path)


class RunLogger(CSVLogger):
    """``metrics.csv`` in the run folder. A run that goes on from a checkpoint keeps the rows that were written before it.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(folder, name="", version="")

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment = _Rows(self.log_dir)
        return self._experiment


class _Rows(ExperimentWriter):
    @override
    def _check_log_dir_exists(self) -> None:
        """Keep the earlier rows and columns: Lightning would delete them here, before it knows whether the run goes on."""
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                self.metrics_keys = list(csv.DictReader(file).fieldnames or [])

    def keep(self, first_step: int) -> None:
        """Drop the rows from this step on, which is where the run starts."""
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if _step(row) < first_step]
        if not rows:
            path.unlink()
            self.metrics_keys = []
            return
        with whole(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)


def _step(row: dict[str, str]) -> float:
    step = row.get("step") or ""
    return int(step) if step.isdigit() else float("inf")  # a kill may leave half a row


class KeepMetrics(Callback):
    """Tells the :class:`RunLogger` where a run starts: at 0, or where its checkpoint was made."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger) and trainer.is_global_zero:
                logger.experiment.keep(trainer.fit_loop.epoch_loop._batches_that_stepped)


class SaveConfig(SaveConfigCallback):
    """Saves the configuration of each command under its own name, so that ``test`` does not overwrite that of ``fit``.

    It lies in the run folder, whatever the logger.
    """

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        name = "config.yaml" if stage == "fit" else f"config_{TrainerFn(stage).value}.yaml"
        write_text(Path(trainer.default_root_dir) / name, self.parser.dump(self.config, skip_none=False))


def set_other_run_aside(folder: Path, config: str) -> None:
    """Set aside the models that another configuration has left in the run folder.

    Args:
        folder: The run folder.
        config: The present configuration, as it would be saved.
    """
    saved = folder / "config.yaml"
    if not (folder / "checkpoints").exists() or (saved.is_file() and _outcome(saved.read_text()) == _outcome(config)):
        return
    for name in ("checkpoints", "pipeline", "metrics.csv", "predictions.safetensors", "config.yaml"):
        if (folder / name).exists():
            set_aside(
                folder / name, "another configuration made it. Train into another --trainer.default_root_dir to keep both"
            )


def _outcome(text: str) -> Any:
    """A configuration without what does not change the outcome."""
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    if not isinstance(config, dict):
        return None
    for key, names in _SHOWN_ONLY.items():
        part: Any = config.get(key) if key else config
        for name in names if isinstance(part, dict) else ():
            part.pop(name, None)
    return config
