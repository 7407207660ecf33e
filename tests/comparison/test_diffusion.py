"""A whole comparison of diffusion models, as small as they get: two cases, one seed, a judge that is trained first."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from salun_lightning.cli import main
from salun_lightning.comparison.plan import Cell
from salun_lightning.comparison.plots import plot_samples
from salun_lightning.files import write_json

ROWS = {"original": "digits_diffusion/original", "Retrain": "digits_diffusion/retrain", "SalUn": "method/salun_diffusion"}
CASES = ["3", "5"]
PER_CLASS, SHOWN, CLASSES = 10, 8, ["3", "5", "7"]
OPTIONS = {
    "seed_everything": "{seed}",
    "model.evaluation.weights": "{judge}",
    "model.sampling.steps": 2,
    "model.evaluation.per_condition": PER_CLASS,
    "model.evaluation.conditions": CLASSES,
    "model.network.init_args.block_out_channels": [8, 16],
    "model.network.init_args.norm_num_groups": 4,
    "model.evaluation.classifier.init_args.width": 8,
    "trainer.max_steps": 2,
    "trainer.limit_test_batches": 2,
}


def write_configs(folder: Path) -> Path:
    """A comparison with narrow networks and a judge of one epoch."""
    judge = {"model.network.init_args.width": 8, "trainer.max_epochs": 1}
    comparison = {
        "task": "digits_diffusion",
        "out": str(folder / "out"),
        "seeds": [1],
        "cases": {case: {"data.forget.names": [case]} for case in CASES},
        "options": OPTIONS,
        "metrics": ["UA", "entropy", "FID", "acc"],
        "gap": False,
        "first": {"judge": {"config": ["digits", "digits/judge"], "options": judge}},
        "rows": ROWS,
    }
    (folder / "compare.yaml").write_text(yaml.safe_dump(comparison, sort_keys=False))
    return folder


def compare(folder: Path, *arguments: str) -> dict[str, Any]:
    report: dict[str, Any] = main(["compare", f"--config={folder / 'compare.yaml'}", *arguments])
    return report


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished comparison, and the texts of the figures it drew, by file."""
    from matplotlib.figure import Figure

    folder = write_configs(tmp_path_factory.mktemp("diffusion"))
    texts: dict[str, list[str]] = {}
    save = Figure.savefig

    def noted(figure: Figure, path: Path, **kwargs: Any) -> None:
        texts[path.name] = _texts(figure)
        save(figure, path, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", noted)
        compare(folder)
    (folder / "texts.json").write_text(json.dumps(texts))
    return folder


def _texts(figure: Any) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text)]


@pytest.fixture
def report(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "out" / "results.json").read_text())
    return content


def cells(report: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(cell["row"], cell["case"]): cell for cell in report["cells"]}


def weights(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


def test_what_is_written(folder: Path, report: dict[str, Any]) -> None:
    out = folder / "out"
    pictures = {path.name for path in out.glob("*.png")}
    assert pictures == {"comparison.png", "samples-3.png", "samples-5.png"}
    page = (out / "report.html").read_text()
    assert page.count('<img class="picture" src="data:image/png;base64,') == 2
    assert 'id="where"' in page
    assert 'id="confidence"' not in page  # no classifier was tested
    trained = {str(path.relative_to(out)) for path in out.rglob("last.ckpt")}
    assert trained == {
        f"{place}/checkpoints/last.ckpt"
        for place in ("judge", "original/seed-1-3", "retrain/seed-1-3", "retrain/seed-1-5", "salun/seed-1-3", "salun/seed-1-5")
    }
    table = (out / "table.md").read_text()
    assert table.startswith("| | UA | entropy | FID | acc | cost | run time |")
    assert all(f"\n| {name} | " in table for name in ROWS)
    assert " - " not in table.split("\n\n")[0].replace("| --- ", "")  # no figure is missing
    judge = report["first"][0]["metrics"]["TA"]
    assert f"The model called judge: TA {judge:.2f}" in table
    for case in CASES:  # real images of the retained classes that images were asked of, as many in every row
        (real,) = {cell["metrics"]["num_real"] for cell in report["cells"] if cell["case"] == case}
        assert f"FID of 20 generated images against {real:.0f} of the training set, features: SmallResNet" in table
    assert "cannot be compared" not in table
    assert report["summary"]["SalUn"]["UA"]["runs"] == 2


def test_the_original_is_measured_as_forgetting_each_class(report: dict[str, Any]) -> None:
    measured = {case: cells(report)["original", case] for case in CASES}
    assert measured["3"]["seconds"] == measured["5"]["seconds"]
    recognised = {name: [measured[case]["metrics"][f"acc/{name}"] for case in CASES] for name in CLASSES}
    assert all(first == second for first, second in recognised.values())  # one model, the same noise
    for case in CASES:
        metrics = measured[case]["metrics"]
        assert metrics["UA"] == pytest.approx(100 - recognised[case][0])
        others = [recognised[name][0] for name in CLASSES if name != case]
        assert metrics["acc"] == pytest.approx(sum(others) / len(others))
        assert metrics["num_generated"] == 2 * PER_CLASS
    assert measured["3"]["metrics"]["FID"] != measured["5"]["metrics"]["FID"]


def test_the_mask_stays_that_of_a_diffusion_model(report: dict[str, Any]) -> None:
    for case in CASES:
        mask = cells(report)["SalUn", case]["mask"]
        assert mask["drift"] == 0
        assert 0 < mask["num_moved"] <= mask["num_kept"] == mask["num_weights"] // 2


def test_the_grids_show_every_row(folder: Path) -> None:
    texts = json.loads((folder / "texts.json").read_text())
    for case in CASES:
        shown = texts[f"samples-{case}.png"]
        assert set(ROWS) <= set(shown)
        assert set(CLASSES) <= set(shown)


def test_the_grid_of_a_cell_holds_the_first_images_of_each_class(folder: Path, report: dict[str, Any]) -> None:
    for (row, case), cell in cells(report).items():
        assert cell["sampled_classes"] == CLASSES
        place = folder / "out" / row.lower() / f"seed-1-{case}"
        with Image.open(place / "samples.png") as picture:
            assert (picture.mode, picture.size) == ("L", (9 * SHOWN + 1, 9 * len(CLASSES) + 1))  # a pixel apart


TIMER = "ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint"  # it timed the training


@pytest.mark.filterwarnings(TIMER)
def test_the_grids_are_of_what_the_model_generates(folder: Path, report: dict[str, Any], tmp_path: Path) -> None:
    import numpy as np

    cell = cells(report)["SalUn", "5"]
    place = folder / "out" / "salun" / "seed-1-5"
    arguments = [*shlex.split(cell["command"])[3:], f"--trainer.default_root_dir={tmp_path}"]
    main(["predict", *arguments, f"--ckpt_path={place / 'checkpoints' / 'last.ckpt'}"])
    with Image.open(place / "samples.png") as picture:
        grid = np.asarray(picture)
    for line, name in enumerate(CLASSES):
        files = sorted((tmp_path / "images" / f"{name}-{name}").iterdir())
        assert len(files) == PER_CLASS
        for column, file in enumerate(files[:SHOWN]):
            with Image.open(file) as picture:
                own = np.asarray(picture).astype(int)
            top, left = 9 * line + 1, 9 * column + 1
            shown = grid[top : top + 8, left : left + 8].astype(int)
            assert abs(own - shown).max() <= 1  # sampled in other batches


def test_a_second_start_runs_nothing(folder: Path, report: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*.ckpt")}
    again = compare(folder)
    assert capsys.readouterr().out.count("was there") == 7
    assert {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*.ckpt")} == stamps
    assert again["summary"] == report["summary"]


def test_the_commands_of_the_table_repeat_the_training(folder: Path, report: dict[str, Any], tmp_path: Path) -> None:
    lines = (folder / "out" / "table.md").read_text().splitlines()
    assert "One row again by itself (seed 1, 3):" in lines
    commands = {name: line.split("`")[1] for name in ROWS for line in lines if line.startswith(f"- {name}: ")}
    assert commands == {name: cells(report)[name, "3"]["command"] for name in ROWS}
    words = shlex.split(commands["SalUn"])
    assert words[:3] == ["python", "train.py", "fit"]
    main([*words[2:], f"--trainer.default_root_dir={tmp_path}"])
    first, second = weights(folder / "out/salun/seed-1-3/checkpoints/last.ckpt"), weights(tmp_path / "checkpoints/last.ckpt")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.filterwarnings(TIMER)
def test_the_command_of_a_cell_that_only_tests_repeats_the_test(
    folder: Path, report: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = cells(report)["original", "5"]
    words = shlex.split(cell["command"])
    assert words[:3] == ["python", "train.py", "test"]
    assert words[-1] == str(folder / "out/original/seed-1-3/checkpoints/last.ckpt")
    main([*words[2:], f"--trainer.default_root_dir={tmp_path}"])
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines() if len(line.split()) == 2)
    for name in ("UA", "entropy", "FID", "KID", "acc", "acc/5", "num_generated", "num_real"):
        assert float(printed[name]) == pytest.approx(cell["metrics"][name], abs=6e-5, rel=1e-5)


def test_a_cell_that_was_killed_while_testing_is_not_trained_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from salun_lightning import ClassDiffusion

    def killed(self: ClassDiffusion) -> None:
        raise KeyboardInterrupt

    arguments = [f"--out={tmp_path}", "--only=Retrain", "--cases=null"]
    with monkeypatch.context() as patch:
        patch.setattr(ClassDiffusion, "on_test_epoch_start", killed)
        with pytest.raises(SystemExit):  # which Lightning makes of it
            compare(folder, *arguments)
    checkpoint = tmp_path / "retrain" / "seed-1" / "checkpoints" / "last.ckpt"
    before = weights(checkpoint)
    monkeypatch.setattr(ClassDiffusion, "training_step", lambda *_: pytest.fail("it is trained again"))
    report = compare(folder, *arguments)
    assert [(cell["row"], cell["case"]) for cell in report["cells"]] == [("Retrain", "")]
    assert report["cells"][0]["seconds"] > 0
    after = weights(checkpoint)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "samples.png").is_file()


def sampled(out: Path, row: str, seed: int, case: str, metrics: dict[str, float], picture: bool = True) -> Cell:
    """A finished cell with a picture of two classes, which is as grey as its seed says."""
    cell = Cell(row, seed, case, out / row / f"{seed}-{case}", (), "key")
    result = {"key": "key", "metrics": metrics, "sampled_classes": ["cat", "dog"], "forgotten_classes": ["cat"]}
    write_json(cell.folder / "result.json", result)
    if picture:
        Image.new("L", (64, 16), 100 * seed).save(cell.samples)
    return cell


def test_the_grids_are_of_the_first_seed_and_each_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    texts, greys, labels = {}, {}, {}
    save = Figure.savefig

    def noted(figure: Figure, path: Path, **kwargs: Any) -> None:
        texts[path.name] = set(_texts(figure))
        labels[path.name] = figure.axes[0].get_ylabel()
        greys[path.name] = [round(255 * float(axis.images[0].get_array().max())) for axis in figure.axes]
        save(figure, path, **kwargs)

    monkeypatch.setattr(Figure, "savefig", noted)
    metrics = {"acc/cat": 96.6}
    places = [(row, seed, case) for row in ("original", "ESD") for seed in (2, 1) for case in ("a b", "c")]
    cells = [sampled(tmp_path, *place, {} if place[2] == "c" else metrics) for place in places if place != ("ESD", 1, "c")]
    cells += [sampled(tmp_path, "ESD", 1, "c", metrics, picture=False)]
    paths = plot_samples(cells, tmp_path)
    assert [path.name for path in paths] == ["samples-a-b.png", "samples-c.png"]
    assert all(path.is_file() for path in paths)
    assert greys == {"samples-a-b.png": [100, 100], "samples-c.png": [100]}
    assert {"original", "ESD", "cat", "97", "dog"} <= texts["samples-a-b.png"]
    assert labels == {"samples-a-b.png": "class (right: % recognised)", "samples-c.png": ""}
    assert "ESD" not in texts["samples-c.png"]


def test_titles_of_narrow_grids_are_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    titles: list[str] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: titles.extend(axis.get_title() for axis in figure.axes))
    narrow = [sampled(tmp_path, row, 1, "c", {}, picture=False) for row in ("original", "ESD 0.0001 12", "SalUn, random mask")]
    for cell in narrow:
        Image.new("L", (9, 16)).save(cell.samples)
    plot_samples(narrow, tmp_path)
    assert titles == ["original", "ESD 0.0001\n12", "SalUn,\nrandom\nmask"]


def test_rows_without_samples_are_left_out_of_the_grids(tmp_path: Path) -> None:
    assert plot_samples([], tmp_path) == []
    assert not list(tmp_path.iterdir())
