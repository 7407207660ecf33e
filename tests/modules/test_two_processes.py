"""Two processes find what one finds."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from salun_lightning.callbacks.predictions import PredictionsWriter
from salun_lightning.evidence.predictions import Predictions
from tests.evidence.test_measures import confidences, said
from tests.modules.small_runs import classifier, digits, train_original, trainer
from tests.modules.two_processes import digest
from tests.small import free_port


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    train_original(folder)
    command = [sys.executable, "-m", "tests.modules.two_processes", str(folder)]
    # as a cluster starts them: both at once
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(command, env={**os.environ, **meeting, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    try:
        for process in processes:
            _, complaint = process.communicate(timeout=300)
            assert process.returncode == 0, complaint
    finally:
        for process in processes:
            process.kill()
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1)]


def test_metrics_are_those_of_one_process(folder: Path, found: list[dict[str, Any]]) -> None:
    results = trainer(folder).test(classifier(original=folder / "original.ckpt"), datamodule=digits(), verbose=False)
    expected = {name: value for result in results for name, value in result.items()}
    assert found[0]["metrics"] == found[1]["metrics"]
    mia, expected_mia = found[0]["metrics"].pop("MIA"), expected.pop("MIA")
    # counts of the same samples, each once: equal up to the rounding of a float32 division
    assert found[0]["metrics"] == pytest.approx(expected, abs=1e-4)
    # one image of 130 may lie so close to the border that the rounding of another batch takes it across
    assert mia == pytest.approx(expected_mia, abs=100.1 / 130)


def test_what_unequal_shares_recorded_is_put_together(found: list[dict[str, Any]]) -> None:
    whole = digest(Predictions({name: said(confidence) for name, confidence in confidences().items()}))
    assert found[0]["recorded"] == found[1]["recorded"] == whole


def test_predictions_are_those_of_one_process(folder: Path, tmp_path: Path) -> None:
    runner = trainer(tmp_path, callbacks=[PredictionsWriter()])
    runner.predict(classifier(original=folder / "original.ckpt"), datamodule=digits())
    of_two, of_one = (Predictions.load(place / "predictions.safetensors") for place in (folder, tmp_path))
    assert of_two.sets.keys() == of_one.sets.keys()
    for name, part in of_two.sets.items():
        assert len(part) == len(of_one.sets[name])
        torch.testing.assert_close(part.logits, of_one.sets[name].of(part).logits, rtol=1e-3, atol=1e-4)
    tables = [(place / "predictions.csv").read_text().splitlines() for place in (folder, tmp_path)]
    assert tables[0][0].startswith("set,index,target,p0,")
    assert [line.split(",")[:3] for line in tables[0]] == [line.split(",")[:3] for line in tables[1]]


def test_training_shares_the_samples(found: list[dict[str, Any]]) -> None:
    first, second = (process["training"] for process in found)
    datamodule = digits()
    datamodule.setup()
    for name, indices in (("forget", datamodule.forget_indices), ("retain", datamodule.retain_indices)):
        mine, other = first["met"][name], second["met"][name]
        assert sorted({*mine, *other}) == indices.tolist()
        assert len(mine) == len(other) == len(set(mine)) == -(-len(indices) // 2)
    assert first["steps"] == second["steps"] == 2 + 12
    assert first["total"] == second["total"]
