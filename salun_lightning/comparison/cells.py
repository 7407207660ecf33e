"""Runs one cell of a comparison, or picks it up where it was."""

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from salun_lightning.comparison.observers import Evidence, Passes
from salun_lightning.comparison.plan import Cell
from salun_lightning.files import read_json, read_torch, set_aside, write_json
from salun_lightning.lightning_cli import UnlearningCLI
from salun_lightning.saliency import SaliencyMasking


def run(cell: Cell) -> dict[str, Any]:
    """Train, test, and write ``result.json``. A run that was killed goes on from its last epoch."""
    _prepare(cell)
    cli = UnlearningCLI(args=list(cell.arguments), run=False)
    if cli.trainer.world_size > 1:
        raise ValueError(
            "A comparison runs each cell on one device. Share the cells out (--only, --seeds), or run their fit commands."
        )
    timer, passes, evidence = Timer(), Passes(), Evidence()
    cli.trainer.callbacks[:0] = [timer, passes]  # type: ignore[attr-defined]  # first: they count the saliency pass, too
    cli.trainer.callbacks.append(evidence)  # type: ignore[attr-defined]
    if cell.trained is None:
        tested = str(cell.checkpoint) if cell.checkpoint.is_file() else None
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=tested, weights_only=True)
        if cli.trainer.received_sigterm:  # in its last batch, which the loop ends with; the test below would forget it
            raise SIGTERMException
        cost = {"seconds": timer.time_elapsed("train"), "passes": passes.number}
    else:
        of_trained = cell.trained.result or {}
        tested = str(cell.trained.checkpoint)
        cost = {name: of_trained[name] for name in ("seconds", "passes")}
    losses = [float(value) for value in cli.trainer.callback_metrics.values()]
    # where nothing was left to train, the average of its weights is only in the checkpoint
    (metrics,) = _merged(
        cli.trainer.test(cli.model, datamodule=cli.datamodule, ckpt_path=tested, verbose=False, weights_only=True)
    )
    evidence.save_samples(cell.samples)
    result = {
        "key": cell.key,
        "row": cell.row,
        "seed": cell.seed,
        "case": cell.case,
        "command": cell.command,
        "state": "finished" if all(map(math.isfinite, (*losses, *metrics.values()))) else "diverged",
        "metrics": metrics,
        **cost,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if cli.trainer.strategy.root_device.type == "cuda" else "cpu",
        "features": getattr(getattr(cli.model, "evaluation", None), "description", None),
        "forget_confidence": evidence.confidence,
        "sampled_classes": [cli.datamodule.class_names[number] for number in sorted(evidence.samples)],
        "forgotten_classes": [
            cli.datamodule.class_names[number] for number in getattr(cli.datamodule, "forgotten_classes", [])
        ],
        **_mask_facts(cli.trainer, cell.folder),
    }
    write_json(cell.folder / "result.json", result)
    return result


def fault(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used, as the end of a sentence; None if it can."""
    if not checkpoint.is_file():
        return "it is gone"
    try:
        read_torch(checkpoint)
    except ValueError:
        return "it is damaged"
    return None


def _prepare(cell: Cell) -> None:
    """The folder, with nothing in it that is damaged or was made with other settings."""
    started = cell.folder / "cell.json"
    if read_json(started).get("key") != cell.key:
        if cell.checkpoint.parent.exists() or (cell.folder / "result.json").exists():
            set_aside(cell.folder, "it was made with other settings")
        write_json(started, {"key": cell.key, "command": cell.command})
    why = fault(cell.checkpoint)
    if why is not None and cell.checkpoint.is_file():
        set_aside(cell.checkpoint, why)


def _merged(results: Any) -> list[dict[str, float]]:
    """Lightning reports a dictionary for each loader; the names do not collide."""
    return [{name: value for result in results for name, value in result.items()}]


def _mask_facts(trainer: Trainer, folder: Path) -> dict[str, Any]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SaliencyMasking) and callback.mask is not None:
            callback.mask.save(folder / "mask.safetensors")
            return {"mask": callback.report, "mask_density": callback.mask.density()}
    return {}
