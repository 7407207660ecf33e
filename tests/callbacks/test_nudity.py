"""What is counted of the detections of NudeNet, and one real run of it."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from salun_lightning.callbacks import GenerationEvaluator, NudityCounter
from salun_lightning.networks import SmallResNet
from tests.modules.small_diffusion import diffusion, images
from tests.modules.small_runs import trainer

SEEN: list[np.ndarray] = []


class Detector:
    """Finds a breast and a face in every image, surely, and a foot that it is less sure of in every second one."""

    def detect(self, image: np.ndarray) -> list[dict[str, Any]]:
        SEEN.append(image)
        found = [("FEMALE_BREAST_EXPOSED", 0.9), ("FACE_FEMALE", 0.99), ("FEET_EXPOSED", 0.7 if len(SEEN) % 2 else 0.5)]
        return [{"class": name, "score": score, "box": [0, 0, 1, 1]} for name, score in found]


@pytest.fixture
def _detector(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("nudenet")
    module.NudeDetector = Detector  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nudenet", module)
    monkeypatch.setattr("salun_lightning.callbacks.nudity.version", {"nudenet": "9.9"}.get)
    SEEN.clear()


def counted(folder: Path, **settings: Any) -> dict[str, Any]:
    judge = SmallResNet(3, in_channels=1, width=4, stages=1)
    module = diffusion(evaluation=GenerationEvaluator(4, classifier=judge, features="classifier"))
    trainer(folder, callbacks=[NudityCounter(**settings)]).predict(module, datamodule=images(), return_predictions=False)
    content: dict[str, Any] = json.loads((folder / "nudity.json").read_text())
    return content


@pytest.mark.usefixtures("_detector")
@pytest.mark.parametrize(("threshold", "feet"), [(0.6, 6), (0.8, 0), (0.5, 12)])
def test_what_is_exposed_is_counted_from_the_threshold_on(threshold: float, feet: int, tmp_path: Path) -> None:
    found = counted(tmp_path, threshold=threshold)
    assert found["detector"] == "nudenet 9.9"
    assert found["threshold"] == threshold
    assert found["images"] == found["images_with_any"] == len(SEEN) == 12
    assert {name: count for name, count in found.items() if name.endswith("_EXPOSED") and count} == {
        "FEMALE_BREAST_EXPOSED": 12,
        **({"FEET_EXPOSED": feet} if feet else {}),
    }
    assert found["total"] == 12 + feet


@pytest.mark.usefixtures("_detector")
def test_the_detector_sees_colours_as_it_reads_them_from_files() -> None:
    counter = NudityCounter()
    counter._detector = Detector()
    image: Tensor = torch.stack([torch.full((4, 5), value, dtype=torch.uint8) for value in (200, 100, 0)])
    counter._count(image)
    counter._count(image[:1])
    assert SEEN[0].shape == (4, 5, 3)
    assert SEEN[0][0, 0].tolist() == [0, 100, 200]
    assert SEEN[1][0, 0].tolist() == [200, 200, 200]


def test_without_the_package_or_with_a_wrong_threshold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'salun_lightning\[nudity\]'"):
        counted(tmp_path)
    with pytest.raises(ValueError, match="threshold must lie between 0 and 1"):
        NudityCounter(1.5)


@pytest.mark.foreign
def test_nudenet_itself_finds_nothing_in_noise(tmp_path: Path) -> None:
    nudenet = pytest.importorskip("nudenet")
    labels = set(vars(sys.modules[nudenet.NudeDetector.__module__])["__labels"])
    assert labels >= set(NudityCounter.__init__.__globals__["EXPOSED"])
    found = counted(tmp_path)
    assert found["images"] == 12
    assert found["total"] == 0
