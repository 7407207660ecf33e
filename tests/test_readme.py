"""What the README shows, run as it stands there."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from salun_lightning import ForgetClasses, ForgetIndices, ForgetRandom, SaliencyMask
from salun_lightning.cli import main
from salun_lightning.comparison.command import compare

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore:.*`train_dataloader` yielded None")
def test_reuse_in_another_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    code = next(block for block in blocks("python") if "SaliencyMasking" in block)
    exec(compile(code, "README.md", "exec"), {})
    assert "SaliencyMask(33 of 66 weights in 2 tensors may move)\n0.0\n" in capsys.readouterr().out
    assert SaliencyMask.load("mask.safetensors").num_kept == 33
    assert len(code.strip().splitlines()) <= 20


def test_own_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_module.py").write_text(next(block for block in blocks("python") if "Forgetful" in block))
    monkeypatch.syspath_prepend(str(tmp_path))
    quick = ["--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={tmp_path}"]
    config = f"--config={ROOT}/configs/digits/random_label.yaml"
    original = tmp_path / "original"
    folder = f"--trainer.default_root_dir={original}"
    main(["fit", f"--config={ROOT}/configs/digits/original.yaml", *quick, folder])
    checkpoint = f"--model.original={original}/checkpoints/last.ckpt"
    cli = main(["fit", config, "--model.method=my_module.Forgetful", checkpoint, *quick])
    assert type(cli.model.method).__name__ == "Forgetful"
    assert cli.datamodule.train_dataloader().sampler.order == "paired"


def test_requests() -> None:
    lines = [line for block in blocks("yaml") for line in block.splitlines() if line.startswith("forget:")]
    made: list[Any] = []
    for line in lines:
        entry = yaml.safe_load(line)["forget"]
        made.append(
            {c.__name__: c for c in (ForgetClasses, ForgetIndices, ForgetRandom)}[entry["class_path"]](**entry["init_args"])
        )
    assert [type(request) for request in made] == [ForgetRandom, ForgetClasses, ForgetIndices]
    assert len(made[0].indices(torch.zeros(50, dtype=torch.int64), ["cat"], torch.arange(50))) == 5


def test_every_file_and_option_that_is_named_exists() -> None:
    for path in set(re.findall(r"(?:configs|docs)/[\w./]+\.\w+", README)):
        assert (ROOT / path).is_file(), path
    comparison = yaml.safe_load((ROOT / "configs/cifar10/compare.yaml").read_text())
    loop = re.search(r"for row in ([\w ]+);", README)
    assert loop is not None
    assert set(loop[1].split()) == set(comparison["rows"]) - {"original"}
    options = set(re.findall(r"compare --config \S+ (.*?)(?:'|\"|  #)", README))
    named = {word for words in options for word in re.findall(r"--(\w+)", words)}
    assert named == {"only", "seeds", "config"}
    assert named - {"config"} <= compare.__annotations__.keys()


def test_the_two_commands_install_and_run() -> None:
    main_job, tests = (block.strip() for block in blocks("sh")[:2])
    install, job = main_job.rsplit(" && ", 1)
    assert install == "python3 -m venv .venv && .venv/bin/pip install -e ."
    assert job == ".venv/bin/python train.py compare --config configs/digits/compare.yaml"
    assert tests == "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/python -m pytest -n 2"
