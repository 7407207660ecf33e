"""The commands, as a user gives them."""

import subprocess
import sys
from argparse import ArgumentError
from pathlib import Path

import pytest

from salun_lightning import SaliencyMask
from salun_lightning.cli import main

ROOT = Path(__file__).parents[1]
ORIGINAL, SALUN = (["--config=digits", f"--config={name}"] for name in ("digits/original", "method/salun"))
QUICK = ["--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An original model of the digits, trained for one epoch."""
    folder = tmp_path_factory.mktemp("original")
    main(["fit", *ORIGINAL, f"--trainer.default_root_dir={folder}", *QUICK])
    return folder / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize("request_of", ["random_tenth", "one_class"])
def test_test_and_predict(request_of: str, original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = [
        *ORIGINAL,
        f"--config=digits/{request_of}",
        f"--ckpt_path={original}",
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.enable_progress_bar=false",
    ]
    cli = main(["test", *common])
    printed = capsys.readouterr().out
    for name in ("UA", "RA", "TA", "MIA"):
        assert f"{name:<24} {float(cli.trainer.callback_metrics[name]):9.4f}" in printed
    main(["predict", *common])
    lines = (tmp_path / "predictions.csv").read_text().splitlines()
    assert lines[0] == "set,index,target," + ",".join(f"p{i}" for i in range(10))
    assert len(lines) == 1 + 1797
    assert abs(sum(map(float, lines[1].split(",")[3:])) - 1) < 1e-5  # ten rounded float32 numbers
    assert {path.name for path in tmp_path.glob("config*")} == {"config_test.yaml", "config_predict.yaml"}


def test_test_does_not_touch_what_fit_wrote(original: Path) -> None:
    folder = original.parents[1]
    before = {name: (folder / name).read_text() for name in ("metrics.csv", "config.yaml")}
    main(
        [
            "test",
            f"--config={folder}/config.yaml",
            f"--ckpt_path={original}",
            f"--trainer.default_root_dir={folder}",
            "--trainer.enable_progress_bar=false",
        ]
    )
    assert before == {name: (folder / name).read_text() for name in before}


def test_overrides_and_several_configurations(original: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.yaml"
    second.write_text("trainer: {max_epochs: 2}\nmodel: {init_args: {optimizer: {init_args: {lr: 0.5}}}}\n")
    cli = main(
        [
            "fit",
            *["--config=digits", "--config=digits/random_tenth", "--config=method/random_label"],
            f"--config={second}",
            "--saliency.ratio=0.3",
            "--model.method=GradientAscent",
            f"--model.original={original}",
            "--data.forget.fraction=0.2",
            "--trainer.precision=bf16-mixed",
            f"--trainer.default_root_dir={tmp_path}",
            "--trainer.callbacks+=LearningRateMonitor",
            *QUICK[1:],
        ]
    )
    assert cli.trainer.current_epoch == 2
    assert type(cli.model.method).__name__ == "GradientAscent"
    assert cli.trainer.optimizers[0].defaults["lr"] == 0.5
    mask = SaliencyMask.load(tmp_path / "checkpoints" / "last.ckpt")
    assert mask.num_kept == int(0.3 * mask.num_weights)
    assert len(cli.datamodule.forget_indices) == round(0.2 * len(cli.datamodule.retain_indices) / 0.8)


def test_print_config_round_trip(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["fit", *SALUN, f"--model.original={original}", "--saliency.ratio=0.25"]
    with pytest.raises(SystemExit):
        main([*arguments, "--print_config"])
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    cli = main(["fit", f"--config={printed}", f"--trainer.default_root_dir={tmp_path}", *QUICK])
    assert cli.config_init["fit"]["saliency"].source.ratio == 0.25


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--saliency.ratio=1.2"], "ratio must lie between 0 (nothing may move) and 1 (everything may move), got 1.2"),
        (["--data.forget.fraction=7"], "must lie between 0 and 1, got 7"),
        (["--model.methud=RandomLabel"], "methud"),
    ],
)
def test_bad_options_are_named(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((ArgumentError, ValueError)) as stop:
        main(["fit", *SALUN, "--config=digits/random_tenth", *arguments])
    assert sentence in capsys.readouterr().err + str(stop.value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data.forget=ForgetClasses", "--data.forget.names=[cat]"], "There is no class 'cat'. The classes are: 0, 1, 2"),
        (["--data.forget=ForgetIndices", "--data.forget.positions=[99999]"], "Index 99999 is out of range"),
        (["--model.original=nowhere.ckpt"], "There is no model at 'nowhere.ckpt'"),
        (
            ["--saliency.ratio=null", "--saliency.mask=nowhere.safetensors"],
            "There is no saliency mask at 'nowhere.safetensors'",
        ),
    ],
)
def test_bad_input_gets_one_sentence(arguments: list[str], sentence: str, original: Path, tmp_path: Path) -> None:
    command = ["fit", *SALUN, f"--model.original={original}", *QUICK]
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        main([*command, f"--trainer.default_root_dir={tmp_path}", *arguments])
    assert sentence in str(error.value)


def test_two_processes_from_the_command_line(original: Path, tmp_path: Path) -> None:
    """The README's multi-process line, and the same mask as one process computes."""
    common = [*SALUN, f"--model.original={original}", *QUICK]
    main(["fit", *common, f"--trainer.default_root_dir={tmp_path}/one"])
    devices = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]
    command = [sys.executable, "train.py", "fit", *common, *devices, f"--trainer.default_root_dir={tmp_path}/two"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (SaliencyMask.load(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("one", "two"))
    differing = one.num_weights - (one & two).num_kept - (~one & ~two).num_kept
    assert differing <= 4  # only ties up to the rounding of a sum over two ranks, at the threshold
    assert "largest change outside the mask: 0" in done.stderr + done.stdout


def test_help_is_quick_and_complete() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "train.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for command in ("fit", "validate", "test", "predict", "compare", "search", "configs", "init"):
        assert f"  {command} " in done.stdout
    assert "torch" not in done.stderr
    assert "lightning.pytorch" not in done.stderr
