"""The whole command, small: what it finds, writes and keeps, and that comparisons take it."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from salun_lightning.cli import main

SPACE = {"model.optimizer.lr": {"low": 0.001, "high": 0.1, "log": True}, "model.method.order": ["sequential", "mixed"]}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A method, and a comparison of three cases, two of which have no files of their own."""
    monkeypatch.chdir(tmp_path)
    network = {"class_path": "SmallResNet", "init_args": {"num_classes": 10, "width": 8, "stages": 1}}
    write(tmp_path / "network.yaml", network)
    options = {"model.network": str(tmp_path / "network.yaml"), "trainer.max_epochs": 1, "trainer.limit_train_batches": 2}
    write(tmp_path / "labels.yaml", {"model.method": "RandomLabel", "search": SPACE})
    write(tmp_path / "ascent.yaml", {"model.method": "GradientAscent", "search": {"model.optimizer.lr": [0.001, 0.003]}})
    write(tmp_path / "tenth.yaml", {"data.forget": {"class_path": "ForgetRandom", "init_args": {"fraction": 0.1}}})
    comparison = {
        "task": "digits",
        "seeds": [1],
        "options": options,
        "cases": {
            "tenth": {"config": "tenth.yaml", "options": {"data.forget.seed": "{seed}"}},
            "memorised": {},
            "fewer": {"data.val_fraction": 0.2},
        },
        "rows": {
            "original": {"config": "digits/original", "cases": {"tenth": {"trainer.max_epochs": 2}}},
            "Retrain": "digits/retrain",
            "Labels": "labels.yaml",
        },
    }
    write(tmp_path / "small.yaml", comparison)
    return tmp_path


def write(path: Path, content: Any) -> None:
    path.write_text(yaml.safe_dump(content, sort_keys=False))


def search(*words: str) -> Any:
    return main(["search", "-c", "small.yaml", "--seeds", "100", *words])


def trials(out: str) -> list[str]:
    return re.findall(r"^\[ *\d+/\d+\] .*", out, flags=re.MULTILINE)


def test_what_is_found_is_written_and_taken_by_comparisons(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = search("--methods", "labels.yaml", "ascent.yaml", "--trials", "3")
    out = capsys.readouterr().out
    assert len(trials(out)) == 2 * (3 + 2)  # two requests; ascent has no more than two settings, or three with its default
    assert [(one["method"], one["request"]) for one in found] == [
        (method, request) for method in ("labels", "ascent") for request in ("tenth", "memorised, fewer")
    ]
    assert [one["file"] for one in found] == []
