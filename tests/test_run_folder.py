"""What a run leaves in its folder survives kills, resumes, other loggers and other configurations."""

import csv
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from salun_lightning.cli import main
from salun_lightning.run_folder import WholeCheckpointIO


def fit(folder: Path, *options: str, epochs: int = 1) -> Any:
    quick = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.limit_train_batches=2"]
    quick += ["--trainer.limit_val_batches=0", f"--trainer.max_epochs={epochs}", f"--trainer.default_root_dir={folder}"]
    return main(["fit", "--config=digits", "--config=digits/original", *quick, *options])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    fit(folder, epochs=2)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def rows(folder: Path) -> list[str]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [row["step"] for row in csv.DictReader(file)]


def test_a_resumed_run_keeps_its_metrics(folder: Path) -> None:
    before = rows(folder)
    with (folder / "metrics.csv").open("a") as file:
        file.write(
            (folder / "metrics.csv").read_text().splitlines()[-1].replace(before[-1], "4") + "\n"
        )  # after the checkpoint
    fit(folder, f"--ckpt_path={folder}/checkpoints/last.ckpt", epochs=3)
    assert before == ["1", "3"]
    assert rows(folder) == ["1", "3", "5"]


def test_a_finished_run_that_is_resumed_keeps_its_metrics(folder: Path) -> None:
    """Nothing is left to train, so the run does not start; validation alone would bring other columns."""
    before = (folder / "metrics.csv").read_text()
    fit(folder, f"--ckpt_path={folder}/checkpoints/last.ckpt", epochs=2)
    assert (folder / "metrics.csv").read_text().startswith(before)


def test_checkpoints_and_configuration_lie_in_the_run_folder_whatever_the_logger(tmp_path: Path) -> None:
    fit(tmp_path, "--trainer.logger=lightning.pytorch.loggers.CSVLogger", f"--trainer.logger.save_dir={tmp_path}/elsewhere")
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()
    assert (tmp_path / "config.yaml").is_file()
    assert not list((tmp_path / "elsewhere").rglob("*.ckpt"))


def test_another_configuration_sets_the_finished_run_aside(folder: Path) -> None:
    was = (folder / "checkpoints" / "last.ckpt").read_bytes()
    fit(folder, "--trainer.log_every_n_steps=2", epochs=2)  # the same outcome: it simply runs again
    assert not list(folder.glob("*aside*"))
    was = (folder / "checkpoints" / "last.ckpt").read_bytes()
    with pytest.warns(UserWarning, match="was set aside as .* because another configuration made it"):
        fit(folder, "--model.optimizer.lr=0.01", epochs=2)
    (aside,) = folder.glob("checkpoints.aside-*")
    assert (aside / "last.ckpt").read_bytes() == was
    assert (folder / "checkpoints" / "last.ckpt").read_bytes() != was


def test_a_save_that_ends_half_way_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, saver = tmp_path / "last.ckpt", WholeCheckpointIO()
    saver.save_checkpoint({"pytorch-lightning_version": "2", "epoch": 1}, path)

    def half(content: Any, place: Path) -> None:
        Path(place).write_bytes(b"half")
        assert saver.load_checkpoint(path)["epoch"] == 1  # while the new one is being written
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        saver.save_checkpoint({"epoch": 2}, path)
    assert saver.load_checkpoint(path)["epoch"] == 1


def test_the_command_line_saves_whole_checkpoints_and_removes_none(folder: Path) -> None:
    cli = fit(folder, f"--ckpt_path={folder}/checkpoints/last.ckpt", epochs=3)
    assert type(cli.trainer.strategy.checkpoint_io) is WholeCheckpointIO
    assert cli.trainer.checkpoint_callback.save_top_k == -1


class Malicious:
    """What runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("remote", [False, True])
def test_no_pickle_is_executed(command: str, remote: bool, tmp_path: Path, served: str) -> None:
    mark, path = tmp_path / "executed", tmp_path / "evil.ckpt"
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6", "x": Malicious(mark)}, path)
    source = f"{served}/evil.ckpt" if remote else str(path)
    with pytest.raises(ValueError, match="holds more than tensors and plain data") as error:
        main(
            [
                command,
                "--config=digits",
                "--config=digits/original",
                f"--ckpt_path={source}",
                f"--trainer.default_root_dir={tmp_path}/run",
                "--trainer.enable_progress_bar=false",
            ]
        )
    assert source in str(error.value)
    assert "weights_only" not in str(error.value)
    assert not mark.exists()
