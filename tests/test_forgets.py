"""Each method that is meant to forget a class of the digits does, at the rate for it, and keeps the others; its choice."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from salun_lightning import ForgetClasses, ForgetIndices, ForgetRandom
from salun_lightning.cli import main
from salun_lightning.comparison.plan import Plan
from salun_lightning.comparison.rows import ConfigFile, Row, all_rows
from salun_lightning.configurations import SHIPPED
from salun_lightning.lightning_cli import UnlearningCLI

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.limit_val_batches=0"]
FORGETTING = ["gradient_ascent", "random_label", "salun", "neg_grad_plus"]
CLASSES = 10


def measured(name: str, folder: Path, *arguments: str) -> dict[str, float]:
    """UA, RA, TA and MIA of a configuration as it is shipped, with the digit 3 to be forgotten."""
    files = [f"digits/{name}"] if name in {"original", "retrain"} else [f"method/{name}", f"digits/tuned/{name}"]
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
    rows = [row for row in shipped("compare/digits_class")["rows"].values() if isinstance(row, dict)]
    of_name = [row for row in rows if row["config"] == f"method/{name}"]
    own = [f"--{option}={value}" for row in of_name for option, value in row["options"].items()]
    metrics = measured(name, tmp_path, f"--model.original={original}", *own)
    assert metrics["UA"] > 90
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
COMPARISONS = ("digits", "digits_class", "digits_requests")


@pytest.mark.parametrize("name", [*FORGETTING, "finetune"])
def test_the_rate_lies_within_the_grid_it_was_chosen_from(name: str) -> None:
    rows = [Row(**row) for row in shipped("compare/pilot")["rows"].values() if isinstance(row, dict)]
    (grid,) = (row.grid[RATE] for row in rows if row.files[0] == f"method/{name}" and not row.options)
    assert grid == sorted(grid)
    assert shipped(f"digits/tuned/{name}")[RATE] in grid[1:-1]


def test_the_pilot_tries_each_rate_on_each_request() -> None:
    pilot = shipped("compare/pilot")
    others = [shipped(f"compare/{name}")["seeds"] for name in COMPARISONS]
    assert not {*pilot["seeds"]} & {seed for seeds in others for seed in seeds}
    sources = {name: Row(**row) if isinstance(row, dict) else row for name, row in pilot["rows"].items()}
    rows, _, _ = all_rows(sources, "Retrain", pilot["noise_floor"], {})
    rates = {name: row.options[RATE] for name, row in rows.items() if RATE in row.options}
    assert all(float(name.split()[-1]) == rate for name, rate in rates.items())
    assert {name.rpartition(" ")[0] for name in rates} >= {"FT", "GA", "RL", "SalUn", "NegGrad+"}
    plan = Plan(Path("out"), {}, task=[ConfigFile(pilot["task"])])
    cases = {name: Row(**case) if isinstance(case, dict) else Row(ConfigFile(case)) for name, case in pilot["cases"].items()}
    for row in cases.values():
        row.config = [ConfigFile(file) for file in row.files]
    for name in ("original", "SalUn 0.01", "SalUn forget first 0.01"):
        rows[name] = replace(rows[name], config=[ConfigFile(file) for file in rows[name].files])
    plan.add({name: rows[name] for name in ("original", "SalUn 0.01", "SalUn forget first 0.01")}, [100], cases)
    requests = [ForgetIndices, ForgetRandom, ForgetClasses, type(None)]
    for cell, request in zip(plan.cells[4:], requests * 2, strict=True):
        cli = UnlearningCLI(args=list(cell.arguments), run=False)
        assert isinstance(cli.datamodule.forget, request)
        assert cli.model.configure_optimizers().param_groups[0]["lr"] == 0.01
        assert cli.model.order == ("sequential" if "first" in cell.row else "mixed")
