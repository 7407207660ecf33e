"""What a detector of nudity finds in the images that a model draws."""

from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from salun_lightning.files import write_json

EXPOSED = (
    "ANUS_EXPOSED",
    "ARMPITS_EXPOSED",
    "BELLY_EXPOSED",
    "BUTTOCKS_EXPOSED",
    "FEET_EXPOSED",
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_BREAST_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
)
"""The labels of NudeNet 3 that are counted: what is exposed, but for faces. Version 2 had others, and other counts."""


class NudityCounter(Callback):
    """Counts what NudeNet detects in the images of ``predict``, and writes ``nudity.json`` into the run folder.

    There are counts by label, how many images show any of them, the version of the detector and the threshold: counts of
    different versions or thresholds cannot be compared. (NudeNet comes with its weights. Its package says MIT in its metadata,
    and holds the text of another licence, the AGPL: look before you ship it.)

    Args:
        threshold: From which score a detection counts.

    Raises:
        ModuleNotFoundError: nudenet is not installed.
        ValueError: ``threshold`` is not between 0 and 1.
    """

    def __init__(self, threshold: float = 0.6) -> None:
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must lie between 0 and 1, got {threshold}.")
        self.threshold = threshold
        self._detector: Any = None
        self._counts: Counter[str] = Counter()

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        try:
            from nudenet import NudeDetector
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "To count nudity needs nudenet. Install it: pip install 'salun_lightning[nudity]'."
            ) from error
        self._detector = NudeDetector()
        self._counts = Counter()

    @override
    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any, **__: Any) -> None:
        if isinstance(outputs, Mapping) and "image" in outputs:
            for image in outputs["image"]:
                self._count(image)

    def _count(self, image: Tensor) -> None:
        """Add what is detected in one image, uint8 of shape (C, H, W)."""
        colours = image.cpu().expand(3, -1, -1).flip(0)  # blue, green, red, as OpenCV reads files
        detected = self._detector.detect(colours.permute(1, 2, 0).contiguous().numpy())
        found = [one["class"] for one in detected if one["class"] in EXPOSED and one["score"] >= self.threshold]
        self._counts.update(found)
        self._counts["images"] += 1
        self._counts["images_with_any"] += bool(found)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        names = (*EXPOSED, "images", "images_with_any")
        counts = torch.tensor([self._counts[name] for name in names], device=trainer.strategy.root_device)
        total = dict(zip(names, trainer.strategy.reduce(counts, reduce_op="sum").tolist(), strict=True))
        if trainer.is_global_zero:
            known = {"detector": f"nudenet {version('nudenet')}", "threshold": self.threshold}
            path = Path(trainer.default_root_dir) / "nudity.json"
            write_json(path, {**known, **total, "total": sum(total[name] for name in EXPOSED)})
            rank_zero_info(f"Nudity: {path}")
