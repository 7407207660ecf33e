"""Runs one cell of a comparison, or picks it up where it was."""

import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from typing_extensions import override

from salun_lightning.comparison.files import read_json, write_json
from salun_lightning.comparison.plan import Cell
from salun_lightning.lightning_cli import UnlearningCLI
from salun_lightning.saliency import SaliencyMasking


def run(cell: Cell) -> dict[str, Any]:
    """Train, test, and write ``result.json``. A run that was killed goes on from its last epoch."""
    started = cell.folder / "cell.json"
    if read_json(started).get("key") != cell.key:  # nothing there, or something that was made with other settings
        shutil.rmtree(cell.folder, ignore_errors=True)
        write_json(started, {"key": cell.key, "command": cell.command})
    cli = UnlearningCLI(args=list(cell.arguments), run=False)
    if cli.trainer.world_size > 1:
        raise ValueError(
            "A comparison runs each cell on one device. Share the cells out (--only, --seeds), or run their fit commands."
        )
    timer, confidence = Timer(), _ForgetConfidence()
    cli.trainer.callbacks[:0] = [timer]  # type: ignore[attr-defined]  # first, so that it counts the saliency pass
    cli.trainer.callbacks.append(confidence)  # type: ignore[attr-defined]
    resumed = str(cell.checkpoint) if cell.checkpoint.is_file() else None
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=resumed, weights_only=True)
    (metrics,) = _merged(cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False))
    result = {
        "key": cell.key,
        "row": cell.row,
        "seed": cell.seed,
        "command": cell.command,
        "metrics": metrics,
        "seconds": timer.time_elapsed("train"),
        "device": torch.cuda.get_device_name() if cli.trainer.strategy.root_device.type == "cuda" else "cpu",
        "forget_confidence": confidence.values,
        **_mask_facts(cli.trainer, cell.folder),
    }
    write_json(cell.folder / "result.json", result)
    return result


def _merged(results: Any) -> list[dict[str, float]]:
    """Lightning reports a dictionary for each loader; the names do not collide."""
    return [{name: value for result in results for name, value in result.items()}]


def _mask_facts(trainer: Trainer, folder: Path) -> dict[str, Any]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SaliencyMasking) and callback.mask is not None:
            callback.mask.save(folder / "mask.safetensors")
            return {"mask": callback.report, "mask_density": callback.mask.density()}
    return {}


class _ForgetConfidence(Callback):
    """Collects, while testing, the probability of the true class of each image of the forget set."""

    def __init__(self) -> None:
        self.values: list[float] = []

    @override
    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any, **__: Any) -> None:
        if outputs["set"] == "forget":
            true = outputs["probabilities"].gather(1, outputs["target"].unsqueeze(1))
            self.values += true.flatten().tolist()
