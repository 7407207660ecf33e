"""The most memorised tenth of a training set: how it is found, and the file of it that is shipped."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from salun_lightning.data import DigitsDataModule, ForgetIndices
from salun_lightning.lightning_cli import UnlearningCLI

CONFIGS = Path(__file__).parents[2] / "configs"
DIGITS = CONFIGS / "digits"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("memorised", CONFIGS / "memorised.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_memorisation_is_what_training_on_an_image_adds(script: ModuleType) -> None:
    inside = torch.tensor([[True, True, True], [True, False, True], [False, False, True]])
    of_class = torch.tensor([[1.0, 0.9, 0.8], [0.8, 0.6, 0.7], [0.3, 0.4, 0.6]])
    scores = script.memorisation(inside, of_class)
    assert scores[:2].tolist() == pytest.approx([0.9 - 0.3, 0.9 - 0.5])
    assert scores[2].isnan()  # no model was trained without it


def test_the_tenth_with_the_largest_scores(script: ModuleType) -> None:
    scores = torch.zeros(29)
    scores[[3, 17, 20]] = torch.tensor([0.5, 0.1, 0.7])
    assert script.top(scores).tolist() == [3, 20]
    scores[5] = float("nan")
    assert script.top(scores).tolist() == [3, 20]
    assert script.top(torch.ones(25)).tolist() == [0, 1]


def test_the_script_writes_a_request(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.accelerator=cpu"]
    for name in ("once.txt", "again.txt"):
        script.main(["--models=2", f"--out={tmp_path / name}", *quick])
    assert "The 129 of 1299 training images" in capsys.readouterr().out
    assert (tmp_path / "once.txt").read_text() == (tmp_path / "again.txt").read_text()
    datamodule = DigitsDataModule(forget=ForgetIndices(tmp_path / "once.txt"), val_fraction=0.1)
    datamodule.setup()
    assert len(datamodule.forget_indices) == 129


def test_answers_that_are_kept_are_not_asked_for_again(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.accelerator=cpu"]
    arguments = [f"--folder={tmp_path / 'kept'}", f"--out={tmp_path / 'found.txt'}", *quick]
    script.main(["--models=2", f"--out={tmp_path / 'at_once.txt'}", *quick])
    train_one, seeds = script.train_one, []

    def counted(task: str, seed: int, folder: str, options: list[str]) -> object:
        seeds.append(seed)
        if seeds == [10_000, 10_001]:
            raise KeyboardInterrupt  # killed in the second model
        return train_one(task, seed, folder, options)

    monkeypatch.setattr(script, "train_one", counted)
    with pytest.raises(KeyboardInterrupt):
        script.main(["--models=2", *arguments])
    script.main(["--models=2", *arguments])
    assert seeds == [10_000, 10_001, 10_001]
    assert (tmp_path / "found.txt").read_text() == (tmp_path / "at_once.txt").read_text()
    script.main(["--models=1", "--trainer.limit_train_batches=1", *arguments])  # other options, other answers
    assert seeds[3:] == [10_000]


def test_a_model_that_another_process_trains_is_waited_for(script: ModuleType, tmp_path: Path) -> None:
    quick = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.accelerator=cpu"]
    command = [sys.executable, str(CONFIGS / "memorised.py"), "--models=3", f"--folder={tmp_path / 'kept'}", *quick]
    runs = [
        subprocess.Popen([*command, f"--out={tmp_path / name}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for name in ("a.txt", "b.txt")
    ]
    said = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert len(list((tmp_path / "kept").glob("*.pt"))) == 3
    assert (tmp_path / "a.txt").read_text() == (tmp_path / "b.txt").read_text()


def test_the_shipped_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # the file lies beside the configuration, wherever that is called from
    cli = UnlearningCLI([f"--config={DIGITS}.yaml", f"--config={DIGITS}/retrain.yaml"], run=False)
    cli.datamodule.setup()
    positions = [int(line) for line in (DIGITS / "memorised.txt").read_text().splitlines() if not line.startswith("#")]
    assert cli.datamodule.forget_indices.tolist() == positions
    assert (len(positions), len(cli.datamodule.retain_indices)) == (129, 1299 - 129)
