"""Two processes find what one finds."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from salun_lightning.modules import ProbabilityWriter
from tests.metrics.test_membership import confidences, measured
from tests.modules.small_runs import classifier, digits, train_original, trainer
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


def test_membership_inference_of_unequal_shares(found: list[dict[str, Any]]) -> None:
    assert found[0]["membership inference"] == found[1]["membership inference"] == measured(confidences())


def test_each_process_writes_its_share_of_the_predictions(folder: Path) -> None:
    trainer(folder, callbacks=[ProbabilityWriter()]).predict(classifier(original=folder / "original.ckpt"), datamodule=digits())

    def samples(name: str) -> list[list[str]]:
        header, *lines = (folder / name).read_text().splitlines()
        assert header.startswith("set,index,target,p0")
        return [line.split(",")[:3] for line in lines]

    shares = [samples(f"predictions-{rank}.csv") for rank in (0, 1)]
    assert all(len(share) > 800 for share in shares)
    assert sorted(shares[0] + shares[1]) == sorted(samples("predictions.csv"))


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
