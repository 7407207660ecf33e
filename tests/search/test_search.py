"""The whole command, small: what it finds, writes and keeps, and that comparisons take it."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from salun_lightning import ImageClassifier
from salun_lightning.cli import main
from salun_lightning.comparison.plan import Plan
from salun_lightning.comparison.rows import ConfigFile, Row
from salun_lightning.comparison.schedule import CellsFailed
from salun_lightning.configurations import SHIPPED

SPACE = {"model.optimizer.lr": {"low": 0.001, "high": 0.1, "log": True}, "model.method.order": ["sequential", "mixed"]}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A method, and a comparison of three cases, two of which have no files of their own."""
    monkeypatch.chdir(tmp_path)
    network = {"class_path": "SmallResNet", "init_args": {"num_classes": 10, "width": 8, "stages": 1}}
    write(tmp_path / "network.yaml", network)
    options = {"model.network": str(tmp_path / "network.yaml"), "trainer.max_epochs": 1, "trainer.limit_train_batches": 2}
    write(tmp_path / "labels.yaml", {"model.method": "RandomLabel", "search": SPACE})
    write(tmp_path / "ascent.yaml", {"model.method": "GradientAscent", "search": {"model.optimizer.lr": [0.003]}})
    write(tmp_path / "tenth.yaml", {"data.forget": {"class_path": "ForgetRandom", "init_args": {"fraction": 0.1}}})
    comparison = {
        "task": "digits",
        "seeds": [1],
        "options": options,
        "cases": {
            "tenth": {"config": "tenth.yaml", "options": {"data.forget.seed": "{seed}"}},
            "memorised": {},
            "batches of 64": {"data.batch_size": 64},
        },
        "rows": {
            "original": {"config": "digits/original", "cases": {"tenth": {"trainer.max_epochs": 2}}},
            "Retrain": "digits/retrain",
            "Labels": "labels.yaml",
        },
    }
    write(tmp_path / "small.yaml", comparison)
    return tmp_path


def write(path: Path, content: Any) -> None:
    path.write_text(yaml.safe_dump(content, sort_keys=False))


def search(*words: str) -> Any:
    return main(["search", "-c", "small.yaml", "--seeds", "100", *words])


def trials(out: str) -> list[str]:
    return re.findall(r"^\[ *\d+/\d+\] .*", out, flags=re.MULTILINE)


def test_what_is_found_is_written_and_taken_by_comparisons(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = search("--methods", "labels.yaml", "ascent.yaml", "--trials", "2")
    out = capsys.readouterr().out
    assert len(trials(out)) == 2 * (2 + 2)
    assert [(one["method"], one["request"]) for one in found] == [
        (method, request) for method in ("labels", "ascent") for request in ("tenth", "memorised, batches of 64")
    ]
    files = ["tenth/tuned/labels.yaml", "digits/tuned/labels.yaml", "tenth/tuned/ascent.yaml", "digits/tuned/ascent.yaml"]
    assert [str(Path(one["file"]).relative_to(folder)) for one in found if Path(one["file"]).is_absolute()] == files[::2]
    for one, file in zip(found, files, strict=True):
        text = (folder / file).read_text()
        assert text.startswith(f"# Smallest avg. gap of 2 trials, pilot seed 100: {one['gap']:.2f}; default settings: ")
        assert yaml.safe_load(text) == one["options"]
        assert one["gap"] <= one["default"]
        assert ("These are all settings" in text) == (one["method"] == "ascent")
    assert (folder / files[1]).read_text().splitlines()[1] == (
        "# Written by: search -c small.yaml --methods labels --trials 2 --seeds 100 --cases memorised 'batches of 64'"
    )
    assert not list((folder / "runs/search/small/trials").glob("*/*"))  # the figures are in the journal
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.yaml")}
    assert search("--methods", "labels.yaml", "ascent.yaml", "--trials", "2") == found
    assert trials(capsys.readouterr().out) == []
    assert {path: path.stat().st_mtime_ns for path in before} == before

    with pytest.raises(
        ValueError, match=r"Seed 100 is one of those that the values of '.*tenth/tuned/labels\.yaml' were searched w"
    ):
        main(["compare", "-c", "small.yaml", "--tuned", "true", "--only", "Labels", "--seeds", "[1, 100]"])
    report = main(["compare", "-c", "small.yaml", "--tuned", "true", "--only", "Labels"])
    commands = {cell["case"]: cell["command"] for cell in report["cells"] if cell["row"] == "Labels"}
    assert "--config tenth.yaml --config labels.yaml --config tenth/tuned/labels.yaml" in commands["tenth"]
    assert "--config labels.yaml --config digits/tuned/labels.yaml" in commands["memorised"]


@pytest.mark.parametrize("default", [[1], []])
def test_a_list_is_searched_as_one_value(folder: Path, capsys: pytest.CaptureFixture[str], default: list[int]) -> None:
    steps = {"class_path": "MultiStepLR", "init_args": {"milestones": default}}
    content = {"model.method": "GradientAscent", "model.lr_scheduler": steps}
    write(folder / "steps.yaml", {**content, "search": {"model.lr_scheduler.milestones": [[1, 2]]}})
    (one,) = search("--methods", "steps.yaml", "--trials", "2", "--cases", "tenth")
    tried = {line.rpartition("  ")[2] for line in trials(capsys.readouterr().out)}
    assert tried == {f"milestones {default}", "milestones [1, 2]"}
    assert yaml.safe_load(Path(one["file"]).read_text()) == one["options"]
    assert one["options"]["model.lr_scheduler.milestones"] in (default, [1, 2])


def test_a_request_tries_what_was_found_for_its_task(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "digits" / "tuned").mkdir(parents=True)
    write(folder / "digits" / "tuned" / "labels.yaml", {"model.optimizer.lr": 0.7, "model.method.order": "mixed"})
    search("--methods", "labels.yaml", "--trials", "3", "--cases", "tenth")
    assert [re.sub(r".*  lr ", "", line) for line in trials(capsys.readouterr().out)[:2]] == [
        '0.01, order "sequential"',
        '0.7, order "mixed"',
    ]


def test_a_request_tries_what_ships_for_its_task(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where nothing of it lies in the working directory."""
    shipped = yaml.safe_load((SHIPPED / "digits" / "tuned" / "salun.yaml").read_text())
    search("--methods", "salun", "--trials", "2", "--cases", "tenth")
    second = trials(capsys.readouterr().out)[1]
    assert f'lr {shipped["model.optimizer.lr"]}, order "{shipped["model.method.order"]}"' in second


def test_a_search_that_was_stopped_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--methods", "labels.yaml", "--trials", "4", "--cases", "memorised"]
    whole = search(*words, "--out", "whole")
    expected = trials(capsys.readouterr().out)
    step, steps = ImageClassifier.training_step, []

    def stopped(self: ImageClassifier, batch: Any) -> Any:
        if type(self.method).__name__ == "RandomLabel":
            steps.append(1)
            if len(steps) == 5:  # in the third trial
                raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(ImageClassifier, "training_step", stopped)
    with pytest.raises(SystemExit):  # which Lightning makes of it
        search(*words)
    assert trials(capsys.readouterr().out) == expected[:2]
    assert search(*words) == whole
    assert trials(capsys.readouterr().out) == expected[2:]


def test_a_method_whose_default_settings_fail(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The others are searched."""
    write(folder / "esd.yaml", {"model.method": "ESD", "search": {"model.optimizer.lr": [0.1]}})
    write(folder / "ascent.yaml", {"model.method": "GradientAscent", "search": {"model.optimizer.lr": [0.1, 1e30]}})
    with pytest.raises(CellsFailed, match="esd, memorised: the default settings fail: ESD is a method for diffusion models"):
        search("--methods", "esd.yaml", "ascent.yaml", "--trials", "2", "--cases", "memorised")
    assert len(trials(capsys.readouterr().out)) == 1 + 2
    assert not (folder / "digits/tuned/esd.yaml").exists()
    assert yaml.safe_load((folder / "digits/tuned/ascent.yaml").read_text())["model.optimizer.lr"] in {0.01, 0.1}


def test_what_somebody_else_wrote_is_set_aside(folder: Path) -> None:
    (folder / "digits/tuned").mkdir(parents=True)
    (folder / "digits/tuned/ascent.yaml").write_text("# The rate of the paper.\nmodel.optimizer.lr: 5.0\n")
    words = ["--methods", "ascent.yaml", "--cases", "memorised"]
    with pytest.warns(UserWarning, match="was set aside as .* because the search has found other values"):
        search(*words, "--trials", "1")
    assert (folder / "digits/tuned/ascent.yaml").read_text().startswith("# Smallest avg. gap of 1 trials")
    search(*words, "--trials", "2")  # its own it replaces
    assert len(list((folder / "digits/tuned").glob("*.aside-*"))) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods", "nothing"], "There is no method 'nothing'"),
        (["--methods", "method/esd"], "Method 'esd': It has no search space. Add a line"),
        (["--methods", "ascent.yaml", "--trials", "0"], "'trials' is 0. Give at least 1."),
        (["--methods", "ascent.yaml", "ascent.yaml"], "Name at least one, and each only once."),
        (["--methods", "ascent.yaml", "--cases", "none"], "There is no case 'none'. The cases are: tenth, memorised, "),
        (["--methods", "typo.yaml"], "Method 'typo': Its search space names 'model.optimizer.rate', which is no option"),
        (["--methods", "wrong.yaml"], "Row 'wrong': The arguments of 'fit' are not accepted: "),
        (["--methods", "ascent.yaml", "-c", "nothing"], "There is no configuration 'nothing'"),
        (["--methods", "ascent.yaml", "-c", "compare/digits_diffusion"], "This comparison has no avg. gap"),
    ],
)
def test_bad_input(folder: Path, words: list[str], said: str) -> None:
    write(folder / "typo.yaml", {"model.method": "GradientAscent", "search": {"model.optimizer.rate": [1]}})
    write(folder / "wrong.yaml", {"model.methd": "GradientAscent", "search": {"model.optimizer.lr": [1]}})
    with pytest.raises(ValueError, match=re.escape(said)):
        search(*words)
    assert not list((folder / "runs").rglob("last.ckpt"))


def test_a_task_without_original_models_is_refused(folder: Path) -> None:
    write(folder / "task.yaml", {"data.batch_size": 8})
    with pytest.raises(ValueError, match=r"There is no '.*/task/original.yaml', which tells how that model is trained"):
        main(["search", "-c", "task.yaml", "--methods", "ssd"])


def test_where_good_values_are_looked_for_is_no_part_of_a_run(folder: Path) -> None:
    quick = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.accelerator=cpu"]
    main(["fit", "-c", "digits", "-c", "labels.yaml", "-c", "digits/original", *quick, "--trainer.default_root_dir=run"])
    assert "search" not in yaml.safe_load((folder / "run/config.yaml").read_text())
    cells = {}
    for name, space in {"one": SPACE, "another": {"model.optimizer.lr": [1.0]}}.items():
        write(folder / "labels.yaml", {"model.method": "RandomLabel", "search": space})
        plan = Plan(folder / name, {}, task=[ConfigFile("digits")])
        plan.add({"original": Row(ConfigFile("digits/original")), "Labels": Row(ConfigFile("labels.yaml"))}, [1], {})
        cells[name] = [cell.key for cell in plan.cells]
    assert cells["one"] == cells["another"]
