"""Each method that is meant to forget a class of the digits does, at the rate for it, and keeps the others; its choice."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from salun_lightning import ForgetClasses, ForgetIndices, ForgetRandom
from salun_lightning.cli import main
from salun_lightning.configurations import SHIPPED, find
from salun_lightning.lightning_cli import UnlearningCLI
from salun_lightning.search import command
from salun_lightning.search.method import MethodSearch

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.limit_val_batches=0"]
FORGETTING = ["gradient_ascent", "random_label", "salun", "neg_grad_plus"]
CLASSES = 10


def measured(name: str, folder: Path, *arguments: str) -> dict[str, float]:
    """UA, RA, TA and MIA of a configuration as it is shipped, with the digit 3 to be forgotten."""
    tuned = [file for file in (f"digits/tuned/{name}", f"digits/one_class/tuned/{name}") if find(file)]
    files = [f"digits/{name}"] if name in {"original", "retrain"} else [f"method/{name}", *tuned]
    configs = [f"--config={file}" for file in ("digits", *files, "digits/one_class")]
    cli = main(["fit", *configs, f"--trainer.default_root_dir={folder}", *QUIET, *arguments])
    return {name: value for part in cli.trainer.test(cli.model, cli.datamodule, verbose=False) for name, value in part.items()}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original model, which recognises every 3."""
    folder = tmp_path_factory.mktemp("original")
    assert measured("original", folder)["UA"] < 1
    return folder / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def retrained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """What the retrained model measures. It begins with weights of its own."""
    metrics = measured("retrain", tmp_path_factory.mktemp("retrain"), "--seed_everything=1000")
    assert metrics["UA"] == 100
    return metrics


@pytest.mark.parametrize("name", FORGETTING)
def test_a_class_is_forgotten_and_the_others_are_not(
    name: str, original: Path, retrained: dict[str, float], tmp_path: Path
) -> None:
    metrics = measured(name, tmp_path, f"--model.original={original}")
    # gradient ascent, the weakest, has 94.95 with a standard deviation of 4.57 over three seeds (docs/results.md)
    assert metrics["UA"] > (80 if name == "gradient_ascent" else 90)
    assert metrics["RA"] > retrained["RA"] - 100 / (CLASSES - 1)  # less is lost than one more class


def test_fine_tuning_leaves_the_class_where_it_is(original: Path, retrained: dict[str, float], tmp_path: Path) -> None:
    """FT never meets the class again: at a rate that harms nothing else it forgets little of it."""
    metrics = measured("finetune", tmp_path, f"--model.original={original}", f"--{RATE}=0.1")
    assert metrics["UA"] < 50
    assert metrics["RA"] > retrained["RA"] - 1


def shipped(name: str) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())
    return settings


RATE = "model.optimizer.lr"
FOUND = [path for path in sorted(SHIPPED.rglob("tuned/*.yaml")) if "# Written by: search" in path.read_text()]


@pytest.mark.parametrize("path", FOUND, ids=lambda path: str(path.relative_to(SHIPPED)))
def test_what_was_found_is_of_the_space_and_of_other_seeds_than_those_of_comparisons(path: Path) -> None:
    text = path.read_text()
    assert yaml.safe_load(text).keys() == shipped(f"method/{path.stem}")["search"].keys()
    pilot = re.search(r"--seeds ([\d ]+)", text)
    assert pilot is not None
    task = path.relative_to(SHIPPED).parts[0]
    comparisons = [yaml.safe_load(file.read_text()) for file in SHIPPED.glob("compare/*.yaml")]
    tasks = [content.get("task", task) for content in comparisons]
    others = [
        content["seeds"]
        for content, of in zip(comparisons, tasks, strict=True)
        if task in ([of] if isinstance(of, str) else of)
    ]
    assert not {*map(int, pilot[1].split())} & {seed for seeds in others for seed in seeds}


def test_each_request_of_the_digits_is_searched_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[MethodSearch] = []

    def noted(searches: list[MethodSearch]) -> None:
        searched.extend(searches)
        raise KeyboardInterrupt  # nothing is to be run

    monkeypatch.setattr(command, "_train_first", lambda *_: None)
    monkeypatch.setattr(command, "_run_all", noted)
    with pytest.raises(KeyboardInterrupt):
        main(["search", "-c", "compare/digits_requests", "--methods", "salun", "--seeds", "100", f"--out={tmp_path}"])
    requests = {"tuned": ForgetIndices, "random_tenth": ForgetRandom, "one_class": ForgetClasses, "wrong_labels": type(None)}
    assert len(searched) == len(requests)
    for one, (folder, request) in zip(searched, requests.items(), strict=True):
        assert folder in {one.file.parent.name, one.file.parent.parent.name}
        (cell,) = one.cells({RATE: 0.02}, tmp_path)
        cli = UnlearningCLI(args=list(cell.arguments), run=False)
        assert isinstance(cli.datamodule.forget, request)
        assert cli.model.configure_optimizers().param_groups[0]["lr"] == 0.02
        assert cli.config.seed_everything == 100
