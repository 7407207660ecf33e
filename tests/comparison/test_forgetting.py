"""What a run records of forgetting beside its predictions."""

import base64
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from salun_lightning.comparison.forgetting import SHOWN, moved, save_images, some, write_thumbnails
from salun_lightning.comparison.plan import Cell
from salun_lightning.data import ForgetIndices
from salun_lightning.evidence.predictions import PredictedSet, Predictions
from tests.small import small_datamodule

POSITIONS = list(range(0, 60, 3))  # 20 of class 0


def said(positions: list[int], confidences: list[float]) -> PredictedSet:
    p = torch.tensor(confidences)
    logits = torch.stack([p, (1 - p) / 2, (1 - p) / 2], 1).log()
    return PredictedSet(logits, torch.zeros(len(p)), torch.tensor(positions))


def test_the_images_that_lost_most_and_least_are_kept(tmp_path: Path) -> None:
    datamodule = small_datamodule(ForgetIndices(POSITIONS))
    original = Cell("original", 1, "", tmp_path / "original", (), "")
    cell = Cell("SalUn", 1, "", tmp_path / "salun", (), "", original)
    retained = [position for position in range(60) if position % 3]
    before = {"forget": said(POSITIONS, [0.9] * 20), "retain": said(retained, [0.9] * 40)}
    Predictions(before).save(original.predictions)
    after = [0.5 + 0.01 * (7 * i % 20) for i in range(20)]  # each another, in no order
    write_thumbnails(cell, datamodule, Predictions({"forget": said(POSITIONS, after)}))
    kept = json.loads(cell.thumbnails.read_text())
    ranked = [position for _, position in sorted(zip(after, POSITIONS, strict=True))]
    assert kept["most"] == ranked[:SHOWN]
    assert kept["least"] == ranked[::-1][:SHOWN]
    assert kept["class_names"] == ["0", "1", "2"]
    assert kept["images"].keys() == {str(position) for position in kept["most"] + kept["least"]}
    for position, picture in kept["images"].items():  # every pixel of an image is its number
        with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
            assert (np.asarray(image) == int(position)).all()


@pytest.mark.parametrize("known", [POSITIONS[:5], None])
def test_without_the_original_models_word_none_are_kept(tmp_path: Path, known: list[int] | None) -> None:
    """It was tested on a part of its data, or not at all."""
    original = Cell("original", 1, "", tmp_path / "original", (), "")
    cell = replace(original, folder=tmp_path / "salun", original=original)
    if known is not None:
        Predictions({"forget": said(known, [0.9] * len(known))}).save(original.predictions)
    write_thumbnails(cell, small_datamodule(ForgetIndices(POSITIONS)), Predictions({"forget": said(POSITIONS, [0.5] * 20)}))
    assert not cell.thumbnails.exists()


def test_how_far_the_weights_moved(tmp_path: Path) -> None:
    module = nn.ModuleDict({"network": nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))})
    torch.save({"state_dict": module.state_dict()}, tmp_path / "original.ckpt")
    before = module["network"][0].weight.norm().item()
    with torch.no_grad():
        module["network"][0].weight += torch.tensor([[3.0, 4.0]])
        module["network"][1].running_mean += 1  # which is not a weight
    found = moved(module, tmp_path / "original.ckpt")
    assert found == {"0.weight": pytest.approx(5 / before, rel=1e-5), "0.bias": 0, "1.weight": 0, "1.bias": 0}


def test_a_picture_has_a_row_for_each_class_and_no_empty_places(tmp_path: Path) -> None:
    """And of many classes a few, the forgotten ones among them."""
    images = {n: {i: torch.full((1, 2, 3), 10 * n + i, dtype=torch.uint8) for i in range(3 if n < 2 else 2)} for n in range(3)}
    save_images(images, tmp_path / "samples.png")
    with Image.open(tmp_path / "samples.png") as picture:
        grid = np.asarray(picture)
    assert grid.shape == (3 * 3 + 1, 2 * 4 + 1)
    assert grid[1::3, 1::4].tolist() == [[0, 1], [10, 11], [20, 21]]
    assert some(images, [0]) == images
    many = dict.fromkeys(reversed(range(220)), 0)
    chosen = [*some(many, range(100, 140))]
    assert chosen == sorted(chosen)
    assert len(chosen) == len(set(chosen)) == 24
    assert [number for number in chosen if 100 <= number < 140][::11] == [100, 139]
    assert {0, 219} < {*chosen}
    assert len(some(many, [])) == 12
