"""The configurations that ship: found by name from anywhere, listed, copied, and what they are held to."""

from pathlib import Path

import pytest
import torch
import yaml

from salun_lightning.cli import main, program
from salun_lightning.configurations import SHIPPED, find, located, shown
from salun_lightning.lightning_cli import UnlearningCLI

FILES = sorted(SHIPPED.rglob("*.yaml"))


def test_configurations_are_short() -> None:
    """All but those that the search writes. Before there was a file for each method, they were 991 lines."""
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES if path.parent.name != "tuned"}
    assert sum(lengths.values()) <= 700
    assert max(length for path, length in lengths.items() if path.parent.name == "method") <= 8


def test_each_file_is_listed_with_its_first_line(capsys: pytest.CaptureFixture[str]) -> None:
    main(["configs"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(FILES)
    assert all(len(line.split("  ")[-1]) > 10 for line in lines)
    assert "method/gradient_ascent" in {line.split()[0] for line in lines}
    assert next(line for line in lines if line.startswith("digits/judge ")).endswith("from scratch, on all training data.")


@pytest.mark.parametrize(
    ("name", "folder", "found"),
    [
        ("digits", "", "digits.yaml"),
        ("digits.yaml", "", "digits.yaml"),
        ("digits", "compare", "compare/digits.yaml"),
        ("method/salun", "compare", "method/salun.yaml"),
        ("digits/tuned/salun.yaml", "", "digits/tuned/salun.yaml"),
        ("method", "", None),
        ("nowhere", "", None),
        ("", "", None),
    ],
)
def test_a_name_is_found_from_anywhere(
    name: str, folder: str, found: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()  # a folder of that name is no configuration
    assert find(name, folder) == (None if found is None else SHIPPED / found)


def test_a_local_file_takes_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shown(SHIPPED / "digits.yaml") == "digits"
    Path("digits.yaml").write_text("# mine\n")
    assert find("digits.yaml") == Path("digits.yaml")
    assert find("digits") == SHIPPED / "digits.yaml"
    Path("digits").write_text("# mine\n")
    assert find("digits") == Path("digits")
    assert find(shown(SHIPPED / "digits.yaml")).resolve() == SHIPPED / "digits.yaml"  # type: ignore[union-attr]


def test_words_of_a_command_line() -> None:
    digits, salun = str(SHIPPED / "digits.yaml"), str(SHIPPED / "method" / "salun.yaml")
    words, files = located(["fit", "-c", "digits", "--config=method/salun", "--model", "digits", "-c=nowhere", "--config"])
    assert words == ["fit", "-c", digits, f"--config={salun}", "--model", "digits", "-c=nowhere", "--config"]
    assert files == [Path(digits), Path(salun), Path("nowhere")]


@pytest.mark.parametrize(
    ("names", "folder"),
    [
        (["digits", "method/salun"], "runs/digits/salun"),
        (["digits", "method/salun", "digits/tuned/salun"], "runs/digits/salun"),
        (["digits", "digits/one_class", "method/salun"], "runs/digits/one_class/salun"),
        (["digits", "digits/original"], "runs/digits/original"),
    ],
)
def test_a_run_lies_under_the_names_of_its_configurations(names: list[str], folder: str) -> None:
    words = [f"--config={name}" for name in names]
    for options, expected in (([], folder), (["--trainer.default_root_dir=mine"], "mine")):
        cli = UnlearningCLI([*words, "--trainer.accelerator=cpu", *options], run=False)
        assert cli.trainer.default_root_dir == str(Path(expected))
        assert cli.config_init.trainer.default_root_dir == str(Path(expected))


def test_a_run_and_its_test_share_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The saved configuration names it, so that the same file trains into the same folder."""
    monkeypatch.chdir(tmp_path)
    quick = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.enable_progress_bar=false"]
    configs = ["-c", "digits", "-c", "digits/original", *quick]
    main(["fit", *configs])
    folder = tmp_path / "runs" / "digits" / "original"
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["trainer"]["default_root_dir"] == "runs/digits/original"
    main(["test", *configs, "--ckpt_path=last"])
    assert (folder / "config_test.yaml").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    cli = main(["fit", "-c", "digits", "-c", "method/finetune", *quick])  # the original lies where the task says
    assert torch.load(folder.with_name("finetune") / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 0
    assert cli.model.original == "runs/digits/original/checkpoints/last.ckpt"


@pytest.mark.parametrize(
    ("called", "said"),
    [
        ("train.py", "python train.py"),
        ("../train.py", "python ../train.py"),
        ("../a b/train.py", "python '../a b/train.py'"),
        ("/usr/bin/salun-lightning", "salun-lightning"),
        ("/usr/lib/pytest/__main__.py", "python train.py"),
    ],
)
def test_commands_are_shown_in_the_form_that_was_called(called: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [called])
    assert program() == said
