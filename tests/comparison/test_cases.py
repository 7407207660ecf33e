"""Cases, and models that are trained first: what is run, where, in which order, and what is not run again.

The runs themselves are played by a stand-in that writes what a run leaves behind; test_diffusion.py has real ones.
"""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from salun_lightning.cli import main
from salun_lightning.comparison.plan import Cell, Plan
from salun_lightning.comparison.rows import ConfigFile, Row, all_rows
from salun_lightning.files import write_json

CONFIGS = Path(__file__).parents[2] / "configs"
ROWS = {
    "Retrain": "digits_diffusion/retrain",
    "original": "digits_diffusion/original",
    "ESD": "method/esd",
    "SalUn": "method/salun_diffusion",
}
CASES = {"three": {"data.forget.names": ["3"]}, "a 5": {"data.forget.names": ["5"]}}
SMALL: dict[str, Any] = {"seeds": [1], "cases": {}}
OPTIONS = {"seed_everything": "{seed}", "model.evaluation.weights": "{judge}"}


def files(*names: str, folder: Path = CONFIGS) -> list[ConfigFile]:
    return [ConfigFile(str(folder / f"{name}.yaml")) for name in names]


def row(*names: str, folder: Path = CONFIGS, **options: Any) -> Row:
    return Row(files(*names, folder=folder), options)


def judging(folder: Path = CONFIGS, **options: Any) -> Row:
    return row("digits", "digits/judge", folder=folder, **options)


def planned(folder: Path = CONFIGS, **kwargs: Any) -> Plan:
    task = files("digits_diffusion", folder=folder)
    plan = Plan(Path("out"), kwargs.get("options", OPTIONS), kwargs.get("arguments", []), task)
    plan.add_first(kwargs.get("first", {"judge": judging(folder)}))
    rows = {name: row(file, folder=folder) for name, file in ROWS.items()}
    plan.add(rows, kwargs.get("seeds", [1, 2]), kwargs.get("cases", CASES))
    return plan


def by_place(plan: Plan) -> dict[tuple[str, int, str], Cell]:
    return {(cell.row, cell.seed, cell.case): cell for cell in plan.cells}


def test_each_seed_is_repeated_for_each_case() -> None:
    cells = by_place(planned())
    assert cells.keys() == {(name, seed, case) for name in ROWS for seed in (1, 2) for case in CASES}
    for (_, seed, case), cell in cells.items():
        assert cell.run == (seed, case)
        assert f"--seed_everything {seed} " in cell.command
        assert f"--data.forget.names {shlex.quote(json.dumps(CASES[case]['data.forget.names']))}" in cell.command
    assert len({cell.key for cell in cells.values()}) == len(cells)


def test_every_cell_has_a_folder_of_its_own() -> None:
    plan = planned()
    cells = by_place(plan)
    assert cells["SalUn", 2, "a 5"].folder == Path("out/salun/seed-2-a-5")
    assert cells["original", 1, "three"].folder == Path("out/original/seed-1-three")
    assert plan.first[0].folder == Path("out/judge")
    folders = [cell.folder for cell in (*plan.first, *plan.cells)]
    assert len(set(folders)) == len(folders)
    for cell in plan.cells:
        assert f"--trainer.default_root_dir {cell.folder}" in cell.command


@pytest.mark.parametrize("cases", [{"猫": {}, "犬": {}}, {"a b": {}, "a-b": {}}, {"+": {}, "-": {}}])
def test_cases_that_would_share_a_folder_are_told_apart_or_refused(cases: dict[str, dict[str, Any]]) -> None:
    """They would wipe out each other's results without a word."""
    try:
        plan = planned(cases=cases)
    except ValueError as error:
        assert "folder" in str(error)  # noqa: PT017
    else:
        assert len({cell.folder for cell in plan.cells}) == len(plan.cells)


def test_a_model_trained_first_that_is_called_like_a_row_is_refused_or_kept_apart() -> None:
    """Its folder holds the folders of that row: training it again would wipe those out."""
    try:
        plan = planned(first={"judge": judging(), "SalUn": judging()})
    except ValueError as error:
        assert "SalUn" in str(error)  # noqa: PT017
    else:
        assert not any(first.folder in cell.folder.parents for first in plan.first for cell in plan.cells)


def test_the_original_is_trained_once_for_each_seed() -> None:
    cells = by_place(planned())
    for seed in (1, 2):
        trained, tested = cells["original", seed, "three"], cells["original", seed, "a 5"]
        assert trained.trained is None
        assert tested.trained is trained
        for case in CASES:
            for name in ("ESD", "SalUn"):
                assert cells[name, seed, case].original is trained
                assert f"--model.original {trained.checkpoint}" in cells[name, seed, case].command
            assert cells["Retrain", seed, case].original is None
            assert cells["Retrain", seed, case].trained is None
        command = shlex.split(tested.command)
        assert command[:3] == ["python", "train.py", "test"]
        assert command[-2:] == ["--ckpt_path", str(trained.checkpoint)]
        assert command[command.index("--data.forget.names") + 1] == '["5"]'
        assert shlex.split(trained.command)[:3] == ["python", "train.py", "fit"]


def test_another_training_set_has_an_original_of_its_own() -> None:
    """What is forgotten does not change what the original model is trained on; wrong labels do."""
    request = {"data.forget": "ForgetIndices", "data.forget.positions": [1, 2]}
    cases = {**CASES, "some": request, "wrong": {"data.wrong_labels.fraction": 0.1}, "wrong three": {**CASES["three"]}}
    cases["wrong three"] |= cases["wrong"]
    cells = by_place(planned(seeds=[1], cases=cases))
    right, wrong = cells["original", 1, "three"], cells["original", 1, "wrong"]
    assert (right.trained, wrong.trained) == (None, None)
    for case in cases:
        trained = wrong if case.startswith("wrong") else right
        assert cells["original", 1, case].trained in (None, trained)
        assert cells["SalUn", 1, case].original is trained
    assert cells["original", 1, "some"].trained is right
    assert cells["original", 1, "wrong three"].trained is wrong


def test_options_of_a_case_go_over_the_common_ones_and_those_of_a_row_over_both() -> None:
    plan = Plan(Path("out"), {"trainer.max_steps": 1, "seed_everything": "{seed}"})
    cases = {"x": {"trainer.max_steps": 2, "data.batch_size": 8}}
    plan.add({"Retrain": row("digits", "digits/retrain", **{"data.batch_size": 16})}, [7], cases)
    assert "--trainer.max_steps 2 --seed_everything 7 --data.batch_size 16" in plan.cells[0].command


def test_a_row_may_have_options_for_single_cases() -> None:
    plan = Plan(Path("out"), OPTIONS, [], files("digits_diffusion"))
    plan.add_first({"judge": judging()})
    of_case = {"a 5": {"trainer.max_steps": 7}}
    own = Row(files("digits_diffusion/retrain"), {"trainer.max_steps": 5}, cases=of_case)
    rows, _, _ = all_rows({"Retrain": own}, "Retrain", 1, {})
    plan.add(rows, [1], CASES)
    steps = {(cell.row, cell.case): cell.arguments[cell.arguments.index("--trainer.max_steps") + 1] for cell in plan.cells}
    assert steps == {(name, case): "7" if case == "a 5" else "5" for name in ("Retrain", "Retrain again") for case in CASES}
    with pytest.raises(ValueError, match=r"^Row 'Retrain' names the case 'a 5', which is not among 'cases'\.$"):
        plan.add(rows, [1], {"three": CASES["three"]})


def test_a_row_may_be_for_some_cases_alone() -> None:
    plan = Plan(Path("out"), OPTIONS, [], files("digits_diffusion"))
    plan.add_first({"judge": judging()})
    rows = {"Retrain": row("digits_diffusion/retrain"), "SalUn": Row(files("digits_diffusion/retrain"), only=["a 5"])}
    plan.add(rows, [1], CASES)
    assert [(cell.row, cell.case) for cell in plan.cells] == [("Retrain", "three"), ("Retrain", "a 5"), ("SalUn", "a 5")]
    with pytest.raises(ValueError, match=r"^Row 'SalUn' names the case 'a 5', which is not among 'cases'\.$"):
        plan.add(rows, [1], {"three": CASES["three"]})


def test_placeholders_of_models_trained_first() -> None:
    plan = planned(first={"encoder": judging(), "judge": judging(**{"model.original": "{encoder}"})})
    encoder, judge = plan.first
    assert encoder.checkpoint == Path("out/encoder/checkpoints/last.ckpt")
    assert f"--model.original {encoder.checkpoint}" in judge.command
    assert all(f"--model.evaluation.weights {judge.checkpoint}" in cell.command for cell in plan.cells)
    assert not any("{" in cell.command for cell in (*plan.first, *plan.cells))


@pytest.mark.parametrize("common", [{}, {"seed_everything": "{seed}"}])
def test_every_retrained_model_has_a_seed_of_its_own(common: dict[str, Any]) -> None:
    """With the original's initialisation it would be closer to the original than a model that never saw it."""
    sources: dict[str, Any] = {"FT": files("method/finetune"), "Retrain": files("digits/retrain")[0], "original": judging()}
    rows, reference, floor = all_rows(sources, "retrain", 2, common)
    assert list(rows) == ["FT", "Retrain", "Retrain again", "Retrain again 2", "original"]
    assert (reference, floor) == ("Retrain", ["Retrain again", "Retrain again 2"])
    seeds = {name: {**common, **row.options}["seed_everything"] for name, row in rows.items()}
    assert seeds == {
        "FT": "{seed}",
        "Retrain": "{seed}" if common else "{seed+1000}",  # whoever says so shares the seed
        "Retrain again": "{seed+2000}",
        "Retrain again 2": "{seed+3000}",
        "original": "{seed}",
    }
    assert all(rows[name].files == rows["Retrain"].files == files("digits/retrain") for name in floor)


def test_a_row_called_like_a_repetition_of_the_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="'noise_floor' makes a row called 'Retrain again'"):
        all_rows({"Retrain": Row(), "Retrain again": Row()}, "Retrain", 1, {})


def test_a_grid_is_a_row_for_each_combination() -> None:
    grid = {"model.optimizer.lr": [0.1, 1.0], "saliency.ratio": [0.5]}
    rows, _, _ = all_rows({"Retrain": Row(), "A": Row(files("digits"), {"x": 1}, grid)}, "Retrain", 0, {})
    assert list(rows) == ["Retrain", "A 0.1 0.5", "A 1.0 0.5"]
    assert rows["A 1.0 0.5"].options == {"seed_everything": "{seed}", "x": 1, "model.optimizer.lr": 1.0, "saliency.ratio": 0.5}


def test_files_of_task_case_and_row_are_given_in_that_order() -> None:
    plan = Plan(Path("out"), {}, [], files("digits"))
    rows: dict[str, Any] = {"Retrain": row("digits/retrain")}
    plan.add(rows, [1], {"a class": files("digits/one_class")[0], "more": row("digits/one_class", **{"data.batch_size": 8})})
    given = "--config configs/digits.yaml --config configs/digits/one_class.yaml --config configs/digits/retrain.yaml"
    assert all(given in cell.command for cell in plan.cells)
    assert [("--data.batch_size 8" in cell.command) for cell in plan.cells] == [False, True]


def test_other_seeds_are_an_offset_away() -> None:
    plan = Plan(Path("out"), {"seed_everything": "{seed+1000}", "data.split_seed": "{seed-1}"})
    plan.add({"Retrain": row("digits", "digits/retrain")}, [7], {})
    assert "--seed_everything 1007 --data.split_seed 6" in plan.cells[0].command


@pytest.mark.parametrize(
    ("called", "shown"), [("/usr/bin/salun-lightning", "salun-lightning fit"), ("x.py", "python train.py fit")]
)
def test_commands_are_shown_as_the_program_was_called(monkeypatch: pytest.MonkeyPatch, called: str, shown: str) -> None:
    monkeypatch.setattr("sys.argv", [called])
    assert by_place(planned(**SMALL))["Retrain", 1, ""].command.startswith(shown)


def test_further_arguments_reach_what_is_trained_first() -> None:
    plan = planned(arguments=["--trainer.max_steps=3"], **SMALL)
    assert all("--trainer.max_steps=3" in cell.command for cell in (*plan.first, *plan.cells))


def keys(plan: Plan) -> dict[Any, str]:
    return {(cell.row, cell.run): cell.key for cell in (*plan.first, *plan.cells)}


@pytest.mark.parametrize("file", ["digits/judge.yaml", "digits.yaml"])
def test_another_first_model_is_another_comparison(tmp_path: Path, file: str) -> None:
    folder = Path(shutil.copytree(CONFIGS, tmp_path / "configs"))
    before = keys(planned(folder, **SMALL))
    assert keys(planned(folder, **SMALL)) == before
    text = (folder / file).read_text()
    changed = text.replace("max_epochs: 30", "max_epochs: 31").replace("width: 16", "width: 8")
    (folder / file).write_text(changed + "\n")
    assert changed != text
    after = keys(planned(folder, **SMALL))
    assert before.keys() == after.keys()
    assert not [place for place in before if before[place] == after[place]]


@pytest.mark.parametrize("where", ["options", "cases", "arguments"])
def test_a_file_that_an_option_names_counts_too(tmp_path: Path, where: str) -> None:
    data = tmp_path / "data.yaml"
    named = {"data": str(data)}
    given: dict[str, Any] = {
        where: {"options": named, "cases": {"other": named}, "arguments": [f"--data={data}"]}[where],
    }
    content = yaml.safe_load((CONFIGS / "digits_diffusion.yaml").read_text())["data"]
    data.write_text(yaml.safe_dump(content))
    before = keys(planned(first={}, **{"options": {}, **SMALL, **given}))
    data.write_text(yaml.safe_dump(content).replace("64", "32"))
    after = keys(planned(first={}, **{"options": {}, **SMALL, **given}))
    assert not [place for place in before if before[place] == after[place]]


def test_another_original_is_another_model_of_all_that_start_from_it(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(CONFIGS, tmp_path / "configs"))
    before = keys(planned(folder, **SMALL))
    with (folder / "digits_diffusion/original.yaml").open("a") as file:
        file.write("saliency.ratio: 1.0\n")
    after = keys(planned(folder, **SMALL))
    assert {name for name, run in before if before[name, run] != after[name, run]} == {"original", "ESD", "SalUn"}


def test_another_case_beside_leaves_the_others_alone() -> None:
    before, after = keys(planned()), keys(planned(cases={**CASES, "8": {"data.forget.names": ["8"]}}))
    assert all(after[place] == key for place, key in before.items())
    assert len(after) == len(before) + 8


@pytest.fixture
def config(tmp_path: Path) -> Path:
    settings = {
        "task": "digits_diffusion",
        "out": str(tmp_path / "out"),
        "seeds": [1, 2],
        "cases": CASES,
        "options": OPTIONS,
        "metrics": ["UA", "FID"],
        "gap": False,
        "first": {"judge": ["digits", "digits/judge"]},
        "rows": ROWS,
    }
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def change(config: Path, **settings: Any) -> None:
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), **settings}, sort_keys=False))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """The cells that a stand-in ran, in order."""
    cells: list[Cell] = []

    def run(cell: Cell) -> dict[str, Any]:
        for needed in (cell.original, cell.trained):
            assert needed is None or needed.result is not None
        cells.append(cell)
        if cell.trained is None:
            cell.checkpoint.parent.mkdir(parents=True)
            torch.save({}, cell.checkpoint)
        metrics = {"UA": 10.0 * cell.seed + len(cell.case), "FID": 2.0, "num_generated": 9.0, "num_real": 9.0}
        write_json(
            cell.folder / "result.json",
            {
                "key": cell.key,
                "row": cell.row,
                "seed": cell.seed,
                "case": cell.case,
                "command": cell.command,
                "metrics": {"TA": 97.5} if cell.row == "judge" else metrics,
                "state": "finished",
                "seconds": 2.0,
                "passes": 6,
                "threads": 1,
                "features": "Judge",
                "forget_confidence": [],
                "sampled_classes": [],
                "forgotten_classes": [],
            },
        )
        return cell.result or {}

    monkeypatch.setattr("salun_lightning.comparison.cells.run", run)
    return cells


def places(cells: list[Cell]) -> list[tuple[str, int, str]]:
    return [(cell.row, cell.seed, cell.case) for cell in cells]


def compare(config: Path, *arguments: str) -> dict[str, Any]:
    report: dict[str, Any] = main(["compare", f"--config={config}", *arguments])
    return report


def test_everything_is_run_once_in_an_order_that_works(config: Path, ran: list[Cell]) -> None:
    report = compare(config)
    assert places(ran)[0] == ("judge", 0, "")
    assert places(ran)[1:5] == [("original", seed, case) for seed in (1, 2) for case in CASES]
    assert sorted(places(ran)[1:]) == sorted((name, seed, case) for name in ROWS for seed in (1, 2) for case in CASES)
    assert [result["row"] for result in report["first"]] == ["judge"]
    assert report["summary"]["SalUn"]["UA"] == {
        "mean": pytest.approx(15 + 4),
        "std": pytest.approx((104 / 3) ** 0.5),
        "runs": 4,
    }
    assert "gap" not in report["summary"]["SalUn"]
    table = (config.parent / "out" / "table.md").read_text()
    assert table.startswith("| | UA | FID | cost | run time |")
    assert "The model called judge: TA 97.50" in table
    assert "the seeds 1, 2 and the cases three, a 5" in table
    assert [line.split(" | ")[0] for line in table.splitlines()[2:6]] == [f"| {name}" for name in ROWS]


def test_a_second_start_runs_nothing(config: Path, ran: list[Cell], capsys: pytest.CaptureFixture[str]) -> None:
    first = compare(config)
    ran.clear()
    capsys.readouterr()
    assert compare(config)["summary"] == first["summary"]
    assert not ran
    assert capsys.readouterr().out.count("was there") == 17


@pytest.mark.parametrize("finished", [0, 1, 3, 10])
def test_what_was_killed_goes_on(
    config: Path, ran: list[Cell], monkeypatch: pytest.MonkeyPatch, finished: int, capsys: pytest.CaptureFixture[str]
) -> None:
    from salun_lightning.comparison import cells

    run: Callable[[Cell], dict[str, Any]] = cells.run

    def killed(cell: Cell) -> dict[str, Any]:
        if len(ran) == finished:
            raise KeyboardInterrupt
        return run(cell)

    monkeypatch.setattr(cells, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        compare(config)
    monkeypatch.setattr(cells, "run", run)
    capsys.readouterr()
    compare(config)
    assert capsys.readouterr().out.count("was there") == finished
    assert len(set(places(ran))) == len(ran) == 17


def test_a_later_case_runs_alone(config: Path, ran: list[Cell]) -> None:
    compare(config)
    ran.clear()
    change(config, cases={**CASES, "8": {"data.forget.names": ["8"]}})
    report = compare(config)
    assert {case for _, _, case in places(ran)} == {"8"}
    assert len(ran) == 8
    assert all(cell.trained is not None for cell in ran if cell.row == "original")
    assert report["summary"]["SalUn"]["UA"]["runs"] == 6


def test_one_row_alone_brings_what_it_needs(config: Path, ran: list[Cell]) -> None:
    compare(config, "--only=salun", "--seeds=2")
    assert places(ran) == [("judge", 0, ""), ("original", 2, "three"), *(("SalUn", 2, case) for case in CASES)]
    ran.clear()
    compare(config, "--only=[SalUn, original]", "--seeds=2")
    assert places(ran) == [("original", 2, "a 5")]  # tested in the other case, now that its row is asked for


def test_one_row_that_starts_from_nothing_brings_no_original(config: Path, ran: list[Cell]) -> None:
    compare(config, "--only=Retrain", "--seeds=1")
    assert places(ran) == [("judge", 0, ""), *(("Retrain", 1, case) for case in CASES)]


def test_the_original_alone(config: Path, ran: list[Cell]) -> None:
    compare(config, "--only=original", "--seeds=[2]")
    assert places(ran) == [("judge", 0, ""), *(("original", 2, case) for case in CASES)]


def test_gaps_if_they_are_asked_for(config: Path, ran: list[Cell], capsys: pytest.CaptureFixture[str]) -> None:
    report = compare(config, "--gap=true", "--metrics=[UA]", "--seeds=1")
    assert report["summary"]["SalUn"]["gap"] == {"mean": 0, "std": 0, "runs": 2}
    assert "gap  0.00" in capsys.readouterr().out
    assert (config.parent / "out" / "table.md").read_text().startswith("| | UA | avg. gap | cost | run time |")


def test_numbers_may_name_cases(config: Path, ran: list[Cell]) -> None:
    change(config, cases={3: {"data.forget.names": ["3"]}}, seeds=1)
    compare(config)
    assert {case for row, _, case in places(ran) if row != "judge"} == {"3"}
    assert (config.parent / "out" / "salun" / "seed-1-3" / "result.json").is_file()


@pytest.mark.parametrize("gap", ["true", "false"])
def test_a_column_that_no_run_measures_is_told(config: Path, ran: list[Cell], gap: str) -> None:
    """A slip in a name: a sentence that tells what there is, before a finished table is overwritten."""
    table = config.parent / "out" / "table.md"
    table.parent.mkdir()
    table.write_text("the table of before")
    with pytest.raises(ValueError, match=r"No row measures FDI. 'metrics' may name: FID, UA, num_generated, num_real."):
        compare(config, "--metrics=[UA, FDI]", f"--gap={gap}", "--only=Retrain", "--seeds=1")
    assert table.read_text() == "the table of before"
    assert len(ran) == 2  # the judge, and the first row: from that on it is known


def test_only_some_cases_are_run(config: Path, ran: list[Cell]) -> None:
    compare(config, "--only_cases=A 5", "--only=SalUn", "--seeds=1")
    assert {cell.case for cell in ran if cell.row == "SalUn"} == {"a 5"}
    assert [cell.row for cell in ran] == ["judge", "original", "SalUn"]
    with pytest.raises(ValueError, match=r"There is no case 'four'. The cases are: three, a 5\."):
        compare(config, "--only_cases=four")
