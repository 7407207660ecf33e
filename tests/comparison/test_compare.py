"""A whole comparison, small: what it writes, and that it goes on where it was."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from salun_lightning import ImageClassifier
from salun_lightning.cli import main
from salun_lightning.comparison.plan import Cell, Plan
from salun_lightning.comparison.rows import ConfigFile, Row
from salun_lightning.evidence.predictions import Predictions
from tests.comparison.test_page import parsed

ROWS = {
    "original": ["digits/original"],
    "Retrain": ["digits/retrain"],
    "SalUn": ["method/salun", "digits/tuned/salun"],
}
FLOOR = ["Retrain again", "Retrain again 2"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A comparison of two epochs a row, with a narrow network."""
    network = {"class_path": "SmallResNet", "init_args": {"num_classes": 10, "width": 8}}
    (tmp_path / "network.yaml").write_text(yaml.safe_dump(network))
    options = {
        "data.forget.seed": "{seed}",
        "model.network": str(tmp_path / "network.yaml"),
        "trainer.max_epochs": 2,
    }
    path = tmp_path / "compare.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "task": ["digits", "digits/random_tenth"],
                "out": str(tmp_path / "out"),
                "seeds": [1],
                "options": options,
                "noise_floor": 2,
                "rows": ROWS,
            },
            sort_keys=False,
        )
    )
    return path


def compare(config: Path, *arguments: str) -> dict[str, Any]:
    report: dict[str, Any] = main(["compare", f"--config={config}", *arguments])
    return report


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return state


def test_everything_is_written_and_nothing_is_run_twice(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = compare(config)
    out = config.parent / "out"
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(report))
    table = (out / "table.md").read_text()
    assert table.startswith("| | UA | RA | TA | MIA | avg. gap | above the floor | cost | run time |")
    assert all((f"| {name}" in table) == (name != FLOOR[1]) for name in (*ROWS, *FLOOR))
    assert {path.name for path in out.glob("*.png")} == {"comparison.png"}
    page = parsed(out / "report.html")
    assert [" | ".join(cells).strip("| ") for cells in page.rows] == [
        line.strip("| ") for line in table.split("\n\n")[0].splitlines() if not line.startswith("| ---")
    ]
    assert {"gaps", "confidence", "where", "images"} <= page.sections
    salun = next(cell for cell in report["cells"] if cell["row"] == "SalUn")
    assert salun["mask"]["drift"] == 0
    assert salun["mask"]["num_moved"] <= salun["mask"]["num_kept"] == salun["mask"]["num_weights"] // 2
    said = Predictions.load(out / "salun" / "seed-1" / "predictions.safetensors")
    assert len(said.sets["forget"]) == 130  # a tenth of the 1,299 digits that are neither test nor validation
    floor = report["summary"]["Retrain again"]["gap"]
    assert floor["mean"] > 0
    assert floor["runs"] == 3  # all pairs of three retrained models
    assert floor["std"] > 0

    stamps = {path: path.stat().st_mtime_ns for path in (*out.rglob("last.ckpt"), out / "report.html", out / "comparison.png")}
    capsys.readouterr()
    again = compare(config)
    assert capsys.readouterr().out.count("was there") == 5
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert again["summary"] == report["summary"]


def test_one_row_runs_alone_and_its_command_repeats_it(config: Path, tmp_path: Path) -> None:
    report = compare(config, "--only=salun", "--seeds=3")
    assert [(cell["row"], cell["seed"]) for cell in report["cells"]] == [("original", 3), ("SalUn", 3)]
    command = shlex.split(report["cells"][1]["command"])
    assert command[:3] == ["python", "train.py", "fit"]
    main([*command[2:], f"--trainer.default_root_dir={tmp_path}/again"])
    first, second = weights(tmp_path / "out/salun/seed-3"), weights(tmp_path / "again")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_killed_cell_goes_on_from_its_last_epoch(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(config, "--only=SalUn", f"--out={config.parent}/whole")
    training_step = ImageClassifier.training_step

    def killed(self: ImageClassifier, batch: Any) -> Any:
        if self.current_epoch == 1 and type(self.method).__name__ == "RandomLabel":
            raise KeyboardInterrupt
        return training_step(self, batch)

    monkeypatch.setattr(ImageClassifier, "training_step", killed)
    with pytest.raises(SystemExit):  # which Lightning makes of it
        compare(config, "--only=SalUn")
    monkeypatch.setattr(ImageClassifier, "training_step", training_step)
    folder = config.parent / "out" / "salun" / "seed-1"
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 0
    compare(config, "--only=SalUn")
    resumed, whole = weights(folder), weights(config.parent / "whole" / "salun" / "seed-1")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_further_arguments_reach_every_row(config: Path) -> None:
    report = compare(config, "--only=SalUn", "--", "--data.forget.fraction=0.5", "--trainer.max_epochs=1")
    assert all("--data.forget.fraction=0.5 --trainer.max_epochs=1" in cell["command"] for cell in report["cells"])
    for row in ("original", "salun"):
        said = Predictions.load(config.parent / "out" / row / "seed-1" / "predictions.safetensors")
        assert len(said.sets["forget"]) == 650  # half of 1,299, rounded to even


def test_changed_settings_run_again(config: Path) -> None:
    compare(config, "--only=original")
    settings = yaml.safe_load(config.read_text())
    settings["options"]["trainer.max_epochs"] = 1
    config.write_text(yaml.safe_dump(settings))
    folder = config.parent / "out" / "original" / "seed-1"
    with pytest.warns(UserWarning, match="was set aside as .* because it was made with other settings"):
        compare(config, "--only=original")
    (aside,) = folder.parent.glob("seed-1.aside-*")
    assert torch.load(aside / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 1
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 0


def plan(rows: dict[str, Row], seeds: list[int], out: Path, options: dict[str, Any]) -> dict[tuple[str, int], Cell]:
    """The cells of a comparison without cases, by row and seed."""
    planned = Plan(out, options, task=[ConfigFile("digits")])
    planned.add(rows, seeds, {})
    assert {cell.run for cell in planned.cells} == {(seed, "") for seed in seeds}
    return {(cell.row, cell.seed): cell for cell in planned.cells}


def rows() -> dict[str, Row]:
    return {name: Row([ConfigFile(file) for file in files]) for name, files in ROWS.items()}


def test_plan() -> None:
    cells = plan(rows(), [1, 2], Path("out"), {"seed_everything": "{seed}"})
    salun = cells["SalUn", 2]
    assert salun.original is cells["original", 2]
    assert "--model.original out/original/seed-2/checkpoints/last.ckpt" in salun.command
    assert "--seed_everything 2" in salun.command
    assert cells["Retrain", 1].original is None
    assert len({cell.key for cell in cells.values()}) == 6


def test_bad_input(config: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no row 'salon'. The rows are: original, Retrain, Retrain again, "):
        compare(config, "--only=salon")
    lonely = {name: row for name, row in rows().items() if name != "original"}
    with pytest.raises(ValueError, match="starts from an original model, but there is no row 'original'"):
        plan(lonely, [1], Path("out"), {})


def test_a_comparison_names_what_lies_beside_it_and_what_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder is called like the configuration."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "ascent.yaml").write_text("model.method: GradientAscent\ntrainer.max_epochs: 7\n")
    (tmp_path / "mine" / "many.yaml").write_text(
        yaml.safe_dump({"task": "digits", "seeds": 1, "rows": {**ROWS, "Mine": "ascent.yaml", "GA": "method/gradient_ascent"}})
    )
    planned: list[Plan] = []

    def noted(self: Plan, *arguments: Any) -> None:
        add(self, *arguments)
        planned.append(self)
        raise KeyboardInterrupt  # nothing is to be run

    add = Plan.add
    monkeypatch.setattr(Plan, "add", noted)
    with pytest.raises(KeyboardInterrupt):
        main(["compare", "-c", "mine/many.yaml"])
    commands = {cell.row: cell.command for cell in planned[0].cells}
    assert "--config digits --config mine/ascent.yaml" in commands["Mine"]
    assert "--config digits --config method/gradient_ascent" in commands["GA"]
    assert "--trainer.default_root_dir runs/compare/many/ga/seed-1" in commands["GA"]
