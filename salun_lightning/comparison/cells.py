"""Runs one cell of a comparison, or picks it up where it was."""

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from salun_lightning.comparison.forgetting import moved, save_images, some, write_thumbnails
from salun_lightning.comparison.observers import Passes
from salun_lightning.comparison.plan import Cell
from salun_lightning.evidence.gaps import METRICS
from salun_lightning.files import read_json, read_torch, set_aside, tensors_fault, write_json
from salun_lightning.lightning_cli import UnlearningCLI
from salun_lightning.saliency import SaliencyMasking


def run(cell: Cell) -> dict[str, Any]:
    """Train, test, and write ``result.json``.

    A run that was killed goes on from its last epoch; one whose predictions are lost is only tested again.
    """
    known = _prepare(cell)
    cli = UnlearningCLI(args=list(cell.arguments), run=False)
    if cli.trainer.world_size > 1:
        raise ValueError(
            "A comparison runs each cell on one device. Share the cells out (--only, --seeds), or run their fit commands."
        )
    timer, passes = Timer(), Passes()
    cli.trainer.callbacks[:0] = [timer, passes]  # type: ignore[attr-defined]  # first: they count the saliency pass, too
    losses: list[float] = []
    if cell.trained is None and not known:
        tested = str(cell.checkpoint) if cell.checkpoint.is_file() else None
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=tested, weights_only=True)
        _heed_sigterm(cli.trainer)
        losses = [float(value) for value in cli.trainer.callback_metrics.values()]
        known = {
            "seconds": timer.time_elapsed("train"),
            "passes": passes.number,
            **_mask_facts(cli.trainer, cell.folder),
        }
    else:
        of_trained = cell if cell.trained is None else cell.trained
        known = known or {name: (of_trained.result or {})[name] for name in ("seconds", "passes")}
        tested = str(of_trained.checkpoint)
    # where nothing was left to train, the average of its weights is only in the checkpoint
    (metrics,) = _merged(
        cli.trainer.test(cli.model, datamodule=cli.datamodule, ckpt_path=tested, verbose=False, weights_only=True)
    )
    evaluation, predictions = (getattr(cli.model, name, None) for name in ("evaluation", "predictions"))
    forgotten_classes = getattr(cli.datamodule, "forgotten_classes", [])
    examples = some(getattr(evaluation, "examples", {}), forgotten_classes)
    save_images(examples, cell.samples)
    computed = {*METRICS, *(f"test/{name}/acc" for name in predictions.sets)} if predictions is not None else {}
    class_names = list(getattr(cli.datamodule, "class_names", []))
    result = {
        **known,
        "key": cell.key,
        "row": cell.row,
        "seed": cell.seed,
        "case": cell.case,
        "command": cell.command,
        "state": "finished" if all(map(math.isfinite, (*losses, *metrics.values()))) else "diverged",
        "predictions": predictions is not None,
        "metrics": {name: value for name, value in metrics.items() if name not in computed},
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if cli.trainer.strategy.root_device.type == "cuda" else "cpu",
        "features": getattr(evaluation, "description", None),
        "class_names": class_names,
        "sampled_classes": [class_names[number] for number in examples],
        "forgotten_classes": [class_names[number] for number in forgotten_classes],
    }
    if cell.original is not None:
        result["moved"] = moved(cli.model, cell.original.checkpoint)
        write_thumbnails(cell, cli.datamodule, predictions)
    write_json(cell.folder / "result.json", result)
    _heed_sigterm(cli.trainer)
    return result


def _heed_sigterm(trainer: Trainer) -> None:
    """A loop that is told to stop in its last batch ends as if it had not been told, and the next one forgets it."""
    if trainer.received_sigterm:
        raise SIGTERMException


def fault(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used, as the end of a sentence; None if it can."""
    if not checkpoint.is_file():
        return "it is gone"
    try:
        read_torch(checkpoint, mmap=True)
    except ValueError:
        return "it is damaged"
    return None


def _prepare(cell: Cell) -> dict[str, Any]:
    """The folder, with nothing in it that is damaged or was made with other settings.

    Returns:
        What is known of the training, if it was finished and only the predictions are lost.
    """
    started = cell.folder / "cell.json"
    if read_json(started).get("key") != cell.key:
        if cell.checkpoint.parent.exists() or (cell.folder / "result.json").exists():
            set_aside(cell.folder, "it was made with other settings")
        write_json(started, {"key": cell.key, "command": cell.command})
    for path, why in ((cell.checkpoint, fault(cell.checkpoint)), (cell.predictions, tensors_fault(cell.predictions))):
        if why is not None and path.is_file():
            set_aside(path, why)
    known = read_json(cell.folder / "result.json")
    trained = cell.checkpoint if cell.trained is None else cell.trained.checkpoint
    return known if known.get("key") == cell.key and trained.is_file() else {}


def _merged(results: Any) -> list[dict[str, float]]:
    """Lightning reports a dictionary for each loader; the names do not collide."""
    return [{name: value for result in results for name, value in result.items()}]


def _mask_facts(trainer: Trainer, folder: Path) -> dict[str, Any]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SaliencyMasking) and callback.mask is not None:
            callback.mask.save(folder / "mask.safetensors")
            return {"mask": callback.report, "mask_density": callback.mask.density()}
    return {}
