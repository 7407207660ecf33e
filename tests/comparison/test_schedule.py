"""What goes wrong in one cell, or is done by another process, and what becomes of the others."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock

from salun_lightning import ImageClassifier
from salun_lightning.cli import main
from salun_lightning.comparison import schedule
from salun_lightning.comparison.plan import Cell
from salun_lightning.comparison.schedule import CellsFailed, Schedule
from salun_lightning.files import read_json, write_json

ROOT = Path(__file__).parents[2]
ROWS = {"original": "digits/original", "Retrain": "digits/retrain", "SalUn": "method/salun", "FT": "method/finetune"}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("salun_lightning.comparison.command.plot", lambda *_: [])  # test_report.py has the pictures
    network = {"class_path": "SmallResNet", "init_args": {"num_classes": 10, "width": 8, "stages": 1}}
    (tmp_path / "network.yaml").write_text(yaml.safe_dump(network))
    options = {
        "seed_everything": "{seed}",
        "model.network": str(tmp_path / "network.yaml"),
        "trainer.max_epochs": 1,
        "trainer.limit_train_batches": 2,
    }
    rows: dict[str, Any] = {name: {"config": file} for name, file in ROWS.items()}
    path = tmp_path / "compare.yaml"
    settings = {"task": "digits", "out": str(tmp_path / "out"), "seeds": [1], "options": options, "rows": rows}
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def compare(config: Path, *arguments: str) -> dict[str, Any]:
    report: dict[str, Any] = main(["compare", f"--config={config}", *arguments])
    return report


def written(config: Path) -> dict[str, dict[str, Any]]:
    """What ``results.json`` says of each row; it holds no bare NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    content = json.loads((config.parent / "out" / "results.json").read_text(), parse_constant=refuse)
    return {cell["row"]: cell for cell in content["cells"]}


def with_options(config: Path, row: str, **options: Any) -> None:
    settings = yaml.safe_load(config.read_text())
    settings["rows"][row]["options"] = options
    config.write_text(yaml.safe_dump(settings, sort_keys=False))


def test_one_cell_that_fails_does_not_stop_the_others(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = ImageClassifier.training_step

    def failing(self: ImageClassifier, batch: Any) -> Any:
        if type(self.method).__name__ == "RandomLabel":
            raise RuntimeError("The device is\nout of memory.")
        return step(self, batch)

    monkeypatch.setattr(ImageClassifier, "training_step", failing)
    with pytest.raises(CellsFailed, match=r"1 of 4 cells failed. SalUn, seed 1: The device is out of memory."):
        compare(config)
    cells = written(config)
    assert {row: cell["state"] for row, cell in cells.items()} == {
        "original": "finished",
        "Retrain": "finished",
        "SalUn": "failed",
        "FT": "finished",
    }
    assert cells["SalUn"]["error"] == "The device is out of memory"
    table = (config.parent / "out" / "table.md").read_text()
    assert "| SalUn (1 of 1 failed) | - | - | - | - | - | - | - |" in table
    assert "Failed: SalUn, seed 1: The device is out of memory." in table
    assert "Traceback" in (config.parent / "out" / "salun" / "seed-1" / "error.txt").read_text()
    monkeypatch.setattr(ImageClassifier, "training_step", step)
    compare(config)  # the same command goes on
    assert written(config)["SalUn"]["state"] == "finished"
    assert not (config.parent / "out" / "salun" / "seed-1" / "error.txt").exists()


def test_what_starts_from_a_model_that_failed_is_not_run(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = ImageClassifier.training_step

    def failing(self: ImageClassifier, batch: Any) -> Any:
        if "original" in str(self.trainer.default_root_dir):
            raise RuntimeError("No.")
        return step(self, batch)

    monkeypatch.setattr(ImageClassifier, "training_step", failing)
    with pytest.raises(CellsFailed, match="3 of 4 cells failed"):
        compare(config)
    cells = written(config)
    assert cells["Retrain"]["state"] == "finished"
    assert cells["FT"]["error"] == cells["SalUn"]["error"] == "needs 'original, seed 1', which failed"
    assert not (config.parent / "out" / "ft" / "seed-1").exists()


def test_where_everything_fails_the_table_stays(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = config.parent / "out" / "table.md"
    table.parent.mkdir()
    table.write_text("the table of before")

    def failing(*_: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr(ImageClassifier, "training_step", failing)
    with pytest.raises(CellsFailed, match="Retrain, seed 1: RuntimeError"):
        compare(config, "--only=Retrain")
    assert table.read_text() == "the table of before"


@pytest.mark.filterwarnings("ignore:The loss was NaN or infinite:UserWarning")
def test_a_run_that_diverged_is_marked(config: Path) -> None:
    with_options(config, "FT", **{"model.optimizer.init_args.lr": 1e30})
    report = compare(config, "--only=[Retrain, FT]")
    assert {row: cell["state"] for row, cell in written(config).items()} == {
        "original": "finished",
        "Retrain": "finished",
        "FT": "diverged",
    }
    assert written(config)["FT"]["metrics"]["MIA"] is None
    assert "| FT (1 of 1 diverged) |" in (config.parent / "out" / "table.md").read_text()
    assert "gap" not in report["summary"]["FT"]
    assert report["summary"]["Retrain"]["MIA"]["runs"] == 1
    compare(config, "--only=[Retrain, FT]")  # also as it is read again
    assert written(config)["FT"]["state"] == "diverged"


def test_the_cost_is_counted_in_passes(config: Path) -> None:
    """By hand: an epoch of 1,299 samples or of the 1,170 retained ones; the saliency pass sees the 129 forgotten once more."""
    report = compare(config, "--only=[Retrain, SalUn]", "--", "--trainer.limit_train_batches=1.0")
    cells = {cell["row"]: cell for cell in report["cells"]}
    assert {row: cell["passes"] for row, cell in cells.items()} == {
        "original": 3 * 1299,
        "Retrain": 3 * 1170,
        "SalUn": 3 * (1299 + 129),
    }
    assert report["summary"]["SalUn"]["cost"]["mean"] == pytest.approx(1428 / 1170)
    assert cells["SalUn"]["threads"] == 1


def test_a_cell_computes_with_the_threads_that_were_asked_for(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    step = ImageClassifier.training_step

    def noted(self: ImageClassifier, batch: Any) -> Any:
        seen.append(torch.get_num_threads())
        return step(self, batch)

    monkeypatch.setattr(ImageClassifier, "training_step", noted)
    report = compare(config, "--only=Retrain", "--threads=2")
    assert set(seen) == {2}
    assert torch.get_num_threads() == 1
    assert report["threads"] == [2]
    assert "the saliency pass included, with 2 threads." in (config.parent / "out" / "table.md").read_text()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", ["result.json", "cell.json", "checkpoints/last.ckpt"])
def test_damaged_files_are_set_aside_and_made_again(
    config: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The original model, from which another cell is still to start."""
    compare(config, "--only=original")
    folder = config.parent / "out" / "original" / "seed-1"
    before = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    truncate(folder / name)
    if name == "cell.json":  # of a cell that was not finished
        (folder / "result.json").unlink()
    capsys.readouterr()
    with pytest.warns(UserWarning, match="was set aside as"):
        report = compare(config, "--only=FT")
    assert [cell["state"] for cell in report["cells"]] == ["finished", "finished"]
    after = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(before[weight], after[weight]) for weight in before)
    assert read_json(folder / "result.json")["row"] == "original"
    assert list((config.parent / "out").rglob("*.aside-*"))


def test_a_damaged_checkpoint_of_an_unfinished_cell_is_trained_afresh(config: Path) -> None:
    compare(config, "--only=Retrain")
    folder = config.parent / "out" / "retrain" / "seed-1"
    whole = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    (folder / "result.json").unlink()
    truncate(folder / "checkpoints/last.ckpt")
    with pytest.warns(UserWarning, match=r"last.ckpt' was set aside as 'last.ckpt.aside-\d+', because it is damaged"):
        compare(config, "--only=Retrain")
    again = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(whole[weight], again[weight]) for weight in whole)


def test_two_processes_take_turns(config: Path) -> None:
    """They need the same original model; each cell is run in one of them, and both tell the same in the end."""
    command = [sys.executable, "train.py", "compare", f"--config={config}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    lines = [[line for line in out.splitlines() if line.startswith("[")] for out, _ in outputs]
    run = [line for of_one in lines for line in of_one if not line.endswith(("was there", "run by another process"))]
    assert sorted(line.split("]")[1].split()[0] for line in run) == sorted(ROWS)
    assert [len(of_one) for of_one in lines] == [4, 4]
    tables = [out[out.index("| |") : out.index("wrote ")] for out, _ in outputs]
    assert tables[0] == tables[1]


def test_two_workers_give_what_one_gives(
    config: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first cell waits here until all that do not need it are there: so another process has run those."""
    run_here = schedule._run_quietly
    out = config.parent / "out"

    def run_last(cell: Cell, threads: int) -> dict[str, Any]:
        if cell.row == "original":
            give_up = time.monotonic() + 300
            while len([*out.glob("retrain*/seed-1/result.json")]) < 2:
                assert time.monotonic() < give_up
                time.sleep(0.1)
        return run_here(cell, threads)

    monkeypatch.setattr(schedule, "_run_quietly", run_last)
    shared = compare(config, "--workers=2", "--noise_floor=1")
    said = capfd.readouterr()
    assert said.out.count("[  1/") == said.out.count("[  3/") == 1
    assert said.out.count("run by another process") >= 2
    alone = compare(config, f"--out={config.parent / 'alone'}", "--noise_floor=1")
    figures = [{cell["row"]: (cell["metrics"], cell["passes"]) for cell in report["cells"]} for report in (shared, alone)]
    assert figures[0] == figures[1]
    assert len(figures[0]) >= 3


def test_a_cell_that_another_process_runs_is_left_for_later(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compare(config, "--only=original")
    held = FileLock(config.parent / "out" / "retrain" / "seed-1.lock")
    (config.parent / "out" / "retrain").mkdir()
    held.acquire()
    step = ImageClassifier.training_step

    def released(self: ImageClassifier, batch: Any) -> Any:
        held.release()  # while the next cell is run
        return step(self, batch)

    monkeypatch.setattr(ImageClassifier, "training_step", released)
    compare(config, "--only=[Retrain, FT]")
    rows = [line.split("]")[1].split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert rows == ["original", "original", "FT", "Retrain"]


def test_a_cell_that_another_process_runs_to_the_end_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell = Cell("SalUn", 1, "", tmp_path / "salun" / "seed-1", (), "key")
    cell.folder.parent.mkdir()
    other = FileLock(f"{cell.folder}.lock")
    other.acquire()
    told: list[tuple[Cell, str]] = []
    waiting = Thread(target=Schedule([cell], 1, lambda cell, _, note: told.append((cell, note))).run)
    waiting.start()
    said, deadline = "", time.monotonic() + 30
    while "\n" not in said and time.monotonic() < deadline:
        said += capsys.readouterr().out
        time.sleep(0.01)
    assert said == "waiting for another process, which runs 'SalUn, seed 1'\n"
    waiting.join(0.3)
    assert waiting.is_alive()
    assert not told
    write_json(cell.folder / "result.json", {"key": "key"})
    other.release()
    waiting.join(30)
    assert told == [(cell, "run by another process")]


def test_lost_predictions_are_made_by_testing_again(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gone in one cell and damaged in another, which that one starts from."""
    before = {cell["row"]: cell for cell in compare(config, "--only=SalUn")["cells"]}
    original, salun = (config.parent / "out" / row / "seed-1" / "predictions.safetensors" for row in ("original", "salun"))
    whole = {path: path.read_bytes() for path in (original, salun)}
    truncate(original)
    salun.unlink()
    monkeypatch.setattr(ImageClassifier, "training_step", lambda *_: pytest.fail("it is trained again"))
    with pytest.warns(UserWarning, match=r"predictions.safetensors' was set aside as .*, because it is damaged"):
        after = {cell["row"]: cell for cell in compare(config, "--only=SalUn")["cells"]}
    assert {path: path.read_bytes() for path in whole} == whole
    for row, cell in before.items():
        assert {name: after[row].get(name) for name in cell if name != "source"} == {
            name: value for name, value in cell.items() if name != "source"
        }


def test_an_old_run_is_reported_again_without_its_checkpoints(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the figures have another definition by now."""
    before = compare(config, "--only=Retrain")
    for path in (config.parent / "out").rglob("checkpoints"):
        shutil.rmtree(path)
    (config.parent / "out" / "results.json").unlink()
    monkeypatch.setattr("salun_lightning.evidence.measures.accuracy", lambda part: torch.tensor(0.25))
    after = compare(config, "--only=Retrain")
    assert after["summary"]["Retrain"]["RA"]["mean"] == 25
    assert after["summary"]["Retrain"]["MIA"] == before["summary"]["Retrain"]["MIA"]


def test_sigterm_at_the_end_of_a_test_is_heeded(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    end = ImageClassifier.on_test_epoch_end

    def told_to_stop(self: ImageClassifier) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        end(self)

    with monkeypatch.context() as patch:
        patch.setattr(ImageClassifier, "on_test_epoch_end", told_to_stop)
        with pytest.raises(SystemExit):
            compare(config, "--only=[original, Retrain]")
    assert not (config.parent / "out" / "retrain").exists()
    capsys.readouterr()
    compare(config, "--only=original")
    assert capsys.readouterr().out.count("was there") == 1  # what was finished is kept


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--seeds=[]"], r"'seeds' is \[\]. Name at least one, and each only once."),
        (["--seeds=[1, 2, 1]"], r"'seeds' is \[1, 2, 1\]"),
        (["--metrics=[]"], r"'metrics' is \[\]"),
        (["--only=[]"], r"'only' is \[\]"),
        (["--threads=0"], "'threads' is 0. A comparison needs at least one."),
        (["--workers=0"], "'workers' is 0. A comparison needs at least one."),
        (["--noise_floor=-1"], "'noise_floor' is -1. Give the number of further retrained models"),
        (["--reference=Retrian"], "There is no row 'Retrian'"),
        (["--", "--model.optimizr=SGD"], "Row 'original': .*optimizr"),
    ],
)
def test_what_cannot_be_is_refused_before_a_finished_table_is_overwritten(
    config: Path, arguments: list[str], sentence: str
) -> None:
    table = config.parent / "out" / "table.md"
    table.parent.mkdir()
    table.write_text("the table of before")
    with pytest.raises(ValueError, match="(?s)" + sentence):
        compare(config, *arguments)
    assert table.read_text() == "the table of before"
    assert list(table.parent.iterdir()) == [table]
