"""How well the images that a model draws fit their prompts, as CLIP sees it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from salun_lightning.files import write_json
from salun_lightning.networks.pipeline import reason, silent_diffusers
from salun_lightning.networks.text_to_image import need_transformers


class ClipScore(Callback):
    r"""Measures the CLIP score of the images of ``predict``, and writes ``clip_score.json`` into the run folder.

    The score of an image (Hessel et al., EMNLP 2021, without their factor 2.5) is :math:`\max(100 \cos(E_I, E_T), 0)` of its
    embedding and that of its prompt, which is the name of its condition. There is the mean over the prompts that are forgotten,
    where forgetting makes it small, that over the others, where it should stay, and the numbers of images. Prompts are cut off
    where the text model of CLIP ends.

    Args:
        model: A model of CLIP, as a directory or by its name on the hub of Hugging Face: scores of different ones cannot be
            compared.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        ValueError: The model cannot be read.
    """

    def __init__(self, model: str = "openai/clip-vit-large-patch14") -> None:
        self.model = model
        self._clip: Any = None
        self._processor: Any = None
        self._sums = torch.zeros(2, 2, dtype=torch.float64)  # (forgotten, others) x (sum, number)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._clip is None:
            self._clip, self._processor = _read(self.model)
        self._clip.to(pl_module.device)
        self._sums = torch.zeros(2, 2, dtype=torch.float64)

    @override
    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any, **__: Any) -> None:
        if not (isinstance(outputs, Mapping) and "image" in outputs):
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        numbers = outputs["target"].tolist()
        scores = self.scores(outputs["image"], [data.class_names[number] for number in numbers]).double().cpu()
        forgotten = torch.tensor([number in data.forgotten_classes for number in numbers])
        for row, members in enumerate((forgotten, ~forgotten)):
            self._sums[row] += torch.stack([scores[members].sum(), members.sum()])

    @torch.no_grad()
    def scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The scores of images, uint8 (B, C, H, W) with one channel or three, for their prompts; (B,)."""
        coloured = images.expand(-1, 3, -1, -1).cpu()
        given = self._processor(text=[*prompts], images=[*coloured], return_tensors="pt", padding=True, truncation=True)
        with torch.autocast(self._clip.device.type, enabled=False):
            seen = self._clip(**given.to(self._clip.device))  # its embeddings have length 1
        scores: Tensor = 100 * (seen.image_embeds * seen.text_embeds).sum(1)
        return scores.clamp(min=0)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = trainer.strategy.reduce(self._sums.float().to(trainer.strategy.root_device), reduce_op="sum").tolist()
        self._clip.cpu()
        if trainer.is_global_zero:
            found = {
                name: {"images": int(number), "clip_score": score / number if number else None}
                for name, (score, number) in zip(("forgotten", "others"), total, strict=True)
            }
            path = Path(trainer.default_root_dir) / "clip_score.json"
            write_json(path, {"model": self.model, **found})
            rank_zero_info(f"CLIP score: {path}")


def _read(model: str) -> tuple[Any, Any]:
    need_transformers("A CLIP score needs")
    from safetensors import SafetensorError
    from transformers import CLIPModel, CLIPProcessor

    try:
        with silent_diffusers():
            read = CLIPModel.from_pretrained(model, use_safetensors=True), CLIPProcessor.from_pretrained(model)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"'{model}' cannot be read as a model of CLIP: {reason(error)}. Give a directory that transformers has saved,"
            " or a name on the hub that can be reached."
        ) from error
    return read
