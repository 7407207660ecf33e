"""Runs one cell of a comparison, or picks it up where it was."""

import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from typing_extensions import override

from salun_lightning.comparison.plan import Cell
from salun_lightning.files import read_json, write_json
from salun_lightning.lightning_cli import UnlearningCLI
from salun_lightning.saliency import SaliencyMasking

_SHOWN = 8  # generated images of each class in the report


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
    timer, evidence = Timer(), _Evidence()
    cli.trainer.callbacks[:0] = [timer]  # type: ignore[attr-defined]  # first, so that it counts the saliency pass
    cli.trainer.callbacks.append(evidence)  # type: ignore[attr-defined]
    if cell.trained is None:
        resumed = str(cell.checkpoint) if cell.checkpoint.is_file() else None
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=resumed, weights_only=True)
        seconds, tested = timer.time_elapsed("train"), resumed  # where nothing was left to train, its average is only there
    else:
        seconds, tested = (cell.trained.result or {})["seconds"], str(cell.trained.checkpoint)
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
        "metrics": metrics,
        "seconds": seconds,
        "device": torch.cuda.get_device_name() if cli.trainer.strategy.root_device.type == "cuda" else "cpu",
        "features": getattr(getattr(cli.model, "quality", None), "description", None),
        "forget_confidence": evidence.confidence,
        "sampled_classes": [cli.datamodule.class_names[number] for number in sorted(evidence.samples)],
        "forgotten_classes": [
            cli.datamodule.class_names[number] for number in getattr(cli.datamodule, "forgotten_classes", [])
        ],
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


class _Evidence(Callback):
    """Collects, while testing, what the report shows of each model."""

    def __init__(self) -> None:
        self.confidence: list[float] = []
        """The probability of the true class of each image of the forget set."""
        self.samples: dict[int, dict[int, Tensor]] = {}
        """The first generated images of each class, by class and number."""

    @override
    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any, **__: Any) -> None:
        if outputs["set"] == "forget" and "probabilities" in outputs:
            true = outputs["probabilities"].gather(1, outputs["target"].unsqueeze(1))
            self.confidence += true.flatten().tolist()
        if outputs["set"] == "generated":
            for image, target, index in zip(
                outputs["image"], outputs["target"].tolist(), outputs["index"].tolist(), strict=True
            ):
                if index < _SHOWN:
                    self.samples.setdefault(target, {})[index] = image.cpu()

    def save_samples(self, path: Path) -> None:
        """Save a picture with a row of images for each class, a pixel apart."""
        if self.samples:
            images = [numbered[index] for _, numbered in sorted(self.samples.items()) for index in sorted(numbered)]
            grid = make_grid(torch.stack(images), nrow=len(images) // len(self.samples), padding=1, pad_value=127)
            path.parent.mkdir(parents=True, exist_ok=True)
            to_pil_image(grid[:1] if len(images[0]) == 1 else grid).save(path)  # it makes grey images coloured
