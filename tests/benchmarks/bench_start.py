"""Wall-clock of the command line: help, and the comparison on the digits with its share by stage.

Counterpart of the help texts: LightningCLI as it comes. Of the comparison: the same command a second time.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from measuring import medians, report, seconds

ROOT = Path(__file__).parents[2]
PLAIN_CLI = "from lightning.pytorch.cli import LightningCLI; LightningCLI(subclass_mode_model=True, subclass_mode_data=True)"


def run(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.benchmark
def test_help() -> None:
    ours, fit, plain, plain_fit = medians(
        5,
        lambda: run("train.py", "--help"),
        lambda: run("train.py", "fit", "--help"),
        lambda: run("-c", PLAIN_CLI, "--help"),
        lambda: run("-c", PLAIN_CLI, "fit", "--help"),
    )
    report("train.py --help", f"{ours:.2f} s", f"{plain:.2f} s", f"{plain / ours:.1f}x", "< 1 s")
    report("train.py fit --help", f"{fit:.2f} s", f"{plain_fit:.2f} s", f"{plain_fit / fit:.2f}x", "<= 1.25 naive")
    assert ours < 1
    assert fit <= 1.25 * plain_fit


def compare(out: Path, *options: str) -> tuple[float, float]:
    """Seconds of the comparison, and of a second start of it; prints the share of each stage."""
    command = ("train.py", "compare", "--config", "configs/compare/digits.yaml", "--out", str(out), *options)
    first = seconds(lambda: run(*command))
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    second = seconds(lambda: run(*command))
    report("digits comparison", f"{first:.1f} s", f"again {second:.1f} s", f"{first / second:.1f}x", "< 90 s")
    stages = {"start, table and plots": first - results["seconds"]}
    for cell in results["cells"]:
        stage = f"training, {cell['row']}"
        stages[stage] = stages.get(stage, 0) + cell["seconds"]
    stages["testing, set-up and files of the cells"] = first - sum(stages.values())
    for stage, taken in stages.items():
        print(f"\n  {stage:<44} {taken:6.1f} s {taken / first:6.1%}", end="")
    return first, second


@pytest.mark.benchmark
def test_digits_comparison(tmp_path: Path) -> None:
    first, _ = compare(tmp_path)
    assert first < 90
