"""How the command line ends when it is told to, with real processes and signals."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from salun_lightning.cli import console, main

ROOT = Path(__file__).parents[1]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.limit_train_batches=2"]
KILLED_WHILE_SAVING = """
import os, signal, sys, torch
from pathlib import Path

save, saved = torch.save, []

def half(content, path, *arguments, **keywords):
    saved.append(path)
    if len(saved) == 3:
        Path(path).write_bytes(b"half of a checkpoint")
        os.kill(os.getpid(), signal.SIGKILL)
    save(content, path, *arguments, **keywords)

torch.save = half
from salun_lightning.cli import main
main(sys.argv[1:])
"""


def fit(folder: Path, epochs: int) -> list[str]:
    configs = ["--config=digits", "--config=digits/original"]
    return ["fit", *configs, *QUIET, f"--trainer.default_root_dir={folder}", f"--trainer.max_epochs={epochs}"]


def start(*words: str, **environment: str) -> subprocess.Popen[str]:
    """As from a terminal: what runs in the background of a shell would ignore Ctrl-C."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    environment = {**os.environ, **environment}
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, text=True, env=environment, preexec_fn=heeding, **pipes)  # noqa: PLW1509


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """All of them at once: each takes seconds to import."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("SIGTERM", "SIGINT", "SIGKILL")}
    running = {name: start("train.py", *fit(folders[name], 100_000)) for name in ("SIGTERM", "SIGINT")}
    running["SIGKILL"] = start("-c", KILLED_WHILE_SAVING, *fit(folders["SIGKILL"], 5))
    for name, unbuffered in (("pipe", {}), ("unbuffered pipe", {"PYTHONUNBUFFERED": "1"})):
        running[name] = start("train.py", "--help", **unbuffered)
        running[name].stdout.close()  # type: ignore[union-attr]  # whoever reads has seen enough
    yield {**running, "folders": folders}
    for process in running.values():
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str], folder: Path, number: int) -> tuple[int, str]:
    """The exit status and what was said, after a signal in the midst of training."""
    deadline = time.monotonic() + 90
    while not (folder / "checkpoints" / "last.ckpt").is_file():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.1)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    return process.returncode, said.strip().splitlines()[-1]


def test_sigterm_is_no_success(processes: dict[str, Any]) -> None:
    status, said = ended(processes["SIGTERM"], processes["folders"]["SIGTERM"], signal.SIGTERM)
    assert status == 143
    assert said.startswith("error: Stopped by SIGTERM. It goes on with: python train.py fit ")


def test_ctrl_c_says_how_it_goes_on_and_so_it_does(processes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = processes["folders"]["SIGINT"]
    status, said = ended(processes["SIGINT"], folder, signal.SIGINT)
    assert status == 130
    assert said.startswith("error: Stopped by Ctrl-C. It goes on with: python train.py fit ")
    words = shlex.split(said.partition("It goes on with: ")[2])[2:]
    monkeypatch.chdir(ROOT)
    epoch = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["epoch"]
    cli = main([*words, f"--trainer.max_epochs={epoch + 2}"])
    assert cli.trainer.current_epoch == epoch + 2
    assert not list(folder.glob("*aside*"))


def test_a_kill_in_the_midst_of_saving_leaves_the_checkpoint_before_it(
    processes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    process, folder = processes["SIGKILL"], processes["folders"]["SIGKILL"]
    said = process.communicate(timeout=90)[1]
    assert process.returncode == -signal.SIGKILL, said[-2000:]
    last = folder / "checkpoints" / "last.ckpt"
    assert [path.read_bytes() for path in folder.rglob("*.part")] == [b"half of a checkpoint"]
    assert torch.load(last, weights_only=True)["epoch"] == 1
    monkeypatch.chdir(ROOT)
    cli = main([*fit(folder, 3), f"--ckpt_path={last}"])
    assert cli.trainer.current_epoch == 3
    assert torch.load(last, weights_only=True)["epoch"] == 2
    assert not list(folder.rglob("*.part"))


@pytest.mark.parametrize("name", ["pipe", "unbuffered pipe"])
def test_a_broken_pipe_is_an_ending_without_a_word(processes: dict[str, Any], name: str) -> None:
    said = processes[name].stderr.read()
    assert processes[name].wait(timeout=90) == 141
    assert said == ""


def test_a_pipe_that_broke_elsewhere_is_an_error(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The pipe of a worker process, say: only that of the output means that whoever reads has seen enough."""

    def worker_died(words: list[str]) -> None:
        raise BrokenPipeError("a worker is gone")

    monkeypatch.setattr("salun_lightning.cli.main", worker_died)
    assert console([]) == 1
    assert capfd.readouterr().err == "error: a worker is gone\n"


def test_modules_of_the_working_directory_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The installed script has its own folder on the path, not the working directory."""
    (tmp_path / "module_beside.py").write_text(
        "from salun_lightning.methods import FineTune\nclass Mine(FineTune):\n    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(ROOT))])
    monkeypatch.syspath_prepend(str(ROOT))
    config = ["--config=digits", "--config=digits/original"]
    status = console(["fit", *config, "--model.method=module_beside.Mine", "--trainer.max_epochs=abc"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert status == 2
    assert "--trainer.max_epochs takes a whole number" in said  # the method was found: else that would be said first
    status = console(["fit", *config, "--model.method=module_missing.Mine"])
    assert "there is no module 'module_missing'" in capsys.readouterr().err.splitlines()[-1]
    assert status == 2
