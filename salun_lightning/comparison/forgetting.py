"""What a run records beside its predictions: where the weights moved, and pictures of what it forgot or generates."""

import base64
import io
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from salun_lightning.comparison.plan import Cell
from salun_lightning.data import ForgetRetainDataModule
from salun_lightning.evidence.measures import forgotten
from salun_lightning.evidence.predictions import Predictions
from salun_lightning.files import tensors_fault, write_json
from salun_lightning.networks.loading import read_checkpoint, weights_in
from salun_lightning.weights import renamings, weights_of

SHOWN = 8  # images that were forgotten most, and as many that were forgotten least
_SIDE = 96  # pixels, of larger images
_ROWS = 24  # of a picture of generated images


def moved(module: nn.Module, original: Path) -> dict[str, float]:
    """By weight tensor, the norm of its change as a fraction of its norm in the original model.

    Args:
        module: The module, after unlearning.
        original: The checkpoint of the original model.
    """
    after, before = weights_of(module), weights_in(read_checkpoint(original))
    names = next(iter(renamings(after, before)), {})  # none where the module names its weights otherwise than it did
    return {name: _change(before[names[name]], after[name].detach().cpu()) for name in names}


def _change(before: Tensor, after: Tensor) -> float:
    before, after = before.float(), after.float()
    return float((after - before).norm() / before.norm().clamp(min=1e-12))


def write_thumbnails(cell: Cell, datamodule: Any, predictions: Predictions | None) -> None:
    """Keep the images of the forget set that lost most and least confidence against the original model, as a page shows them.

    Args:
        cell: The cell; the images go to its folder.
        datamodule: What it was tested on.
        predictions: What its model says.
    """
    original = cell.original.predictions if cell.original is not None else None
    if original is None or tensors_fault(original) or not isinstance(datamodule, ForgetRetainDataModule):
        return
    if predictions is None or "forget" not in predictions.sets:
        return
    before, asked = Predictions.load(original), predictions.sets["forget"]
    if not torch.isin(asked.indices, before.training.indices).all():  # it was tested on a part of its data
        return
    lost = forgotten(before, predictions)
    order = lost.nan_to_num(0).argsort(descending=True, stable=True)
    shown = min(SHOWN, len(order) // 2)
    most, least = asked.indices[order[:shown]], asked.indices[order[len(order) - shown :].flip(0)]
    samples: Any = datamodule.forget_dataloader().dataset
    images = samples.samples(torch.cat([most, least])).inputs.cpu()
    pictures = {str(int(index)): _png(image) for index, image in zip(torch.cat([most, least]), images, strict=True)}
    content = {"most": most.tolist(), "least": least.tolist(), "class_names": datamodule.class_names, "images": pictures}
    write_json(cell.thumbnails, content)


def some(images: Mapping[int, Any], forgotten: Collection[int]) -> dict[int, Any]:
    """What was generated of at most 24 conditions, in order: of more, half of them forgotten ones, evenly spread.

    Args:
        images: By condition.
        forgotten: The conditions that are forgotten.
    """
    if len(images) <= _ROWS:
        return dict(sorted(images.items()))
    chosen = set[int]()
    for group in (sorted(images.keys() & {*forgotten}), sorted(images.keys() - {*forgotten})):
        chosen |= {group[number] for number in torch.linspace(0, len(group) - 1, _ROWS // 2).long().tolist() if group}
    return {number: images[number] for number in sorted(chosen)}


def save_images(images: Mapping[int, Mapping[int, Tensor]], path: Path) -> None:
    """Save a picture of generated images, if there are any: a row for each class, a pixel apart.

    Args:
        images: uint8 (C, H, W), by class and number; of each are shown as many as there are of the class with the fewest.
        path: Where to.
    """
    if images:
        width = min(map(len, images.values()))
        shown = [numbered[index] for numbered in images.values() for index in sorted(numbered)[:width]]
        grid = make_grid(torch.stack(shown), nrow=width, padding=1, pad_value=127)
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(grid[:1] if len(shown[0]) == 1 else grid).save(path)  # it makes grey images coloured


def _png(image: Tensor) -> str:
    picture = to_pil_image(image.clamp(0, 1)[:3] if len(image) >= 3 else image.clamp(0, 1)[:1])
    picture.thumbnail((_SIDE, _SIDE))
    with io.BytesIO() as file:
        picture.save(file, format="PNG")
        return base64.b64encode(file.getvalue()).decode("ascii")
