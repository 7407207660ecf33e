"""The figures of the table, against figures worked out by hand."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import ttest_1samp

from salun_lightning.comparison.paired import Table
from salun_lightning.comparison.plots import plot
from salun_lightning.comparison.report import gaps_by_case, markdown, summarise
from salun_lightning.evidence.gaps import average_gap

TABLE = Table("Retrain", ["Retrain again"])
FOUR = ["UA", "RA", "TA", "MIA"]


def cell(row: str, seed: int, figures: tuple[float, float, float, float], seconds: float, case: str = "") -> dict[str, Any]:
    return {
        "row": row,
        "seed": seed,
        "case": case,
        "metrics": dict(zip(("UA", "RA", "TA", "MIA"), figures, strict=True)),
        "seconds": seconds,
        "passes": 1000 * seconds,
        "threads": 1,
        "state": "finished",
        "command": f"python train.py fit {row} {seed}" + (f" {case}" if case else ""),
    }


def keyed(cells: list[dict[str, Any]]) -> dict[tuple[str, Any], dict[str, Any]]:
    """As the report takes them: by row and run."""
    return {(c["row"], (c["seed"], c["case"])): deepcopy(c) for c in cells}


@pytest.fixture
def results() -> dict[tuple[str, Any], dict[str, Any]]:
    cells = [
        cell("Retrain", 1, (5, 100, 94, 12), 10),
        cell("Retrain", 2, (7, 100, 92, 14), 20),
        cell("Retrain again", 1, (6, 100, 94, 13), 10),
        cell("SalUn", 1, (3, 99, 93, 14), 2),
        cell("SalUn", 2, (11, 98, 93, 13), 2),
        cell("SalUn", 3, (50, 50, 50, 50), 2),  # no retrained model of this seed
    ]
    return keyed(cells)


def test_gaps_are_paired_by_seed(results: Any) -> None:
    summary = summarise(results, TABLE)
    # seed 1: (2 + 1 + 1 + 2) / 4 = 1.5; seed 2: (4 + 2 + 1 + 1) / 4 = 2; their sample deviation is 0.5 / sqrt(2)
    assert summary["SalUn"]["gap"] == {"mean": 1.75, "std": pytest.approx(0.5 / 2**0.5), "runs": 2}
    assert summary["SalUn"]["time"]["mean"] == pytest.approx((0.2 + 0.1) / 2)
    assert summary["SalUn"]["UA"]["runs"] == 3
    assert summary["Retrain"]["gap"]["mean"] == 0
    assert summary["Retrain again"]["gap"] == {"mean": 0.5, "std": 0.0, "runs": 1}
    assert average_gap(results["SalUn", (1, "")]["metrics"], results["Retrain", (1, "")]["metrics"], FOUR) == 1.5


def test_gap_of_means_is_not_mean_of_gaps() -> None:
    results = keyed(
        [
            cell("Retrain", 1, (0, 0, 0, 0), 1),
            cell("Retrain", 2, (0, 0, 0, 0), 1),
            cell("SalUn", 1, (4, 4, 4, 4), 1),
            cell("SalUn", 2, (-4, -4, -4, -4), 1),
        ]
    )
    assert summarise(results, TABLE)["SalUn"]["gap"]["mean"] == 4


def test_table(results: Any) -> None:
    table = markdown(summarise(results, TABLE), results, TABLE).splitlines()
    assert table[2].startswith("| Retrain | 6.00 ± 1.41 | 100.00 ± 0.00 |")
    assert "| 0 | - | 1.000 ± 0.000 | 1.000 ± 0.000 |" in table[2]
    assert table[3].startswith("| Retrain again (noise floor) | 6.00 ± 0.00 |")
    # only the run of seed 1 has a second retrained model: 1.5 - 0.5, and no interval
    assert "| 1.75 ± 0.35 | 1.00 | 0.150 ± 0.071 | 0.150 ± 0.071 |" in table[4]
    assert "- SalUn: `python train.py fit SalUn 1`" in table


def test_differences_are_paired_by_run() -> None:
    """Each seed has another level, which the differences within seeds do not see."""
    table = Table("Retrain", ["Retrain again", "Retrain a third time"], metrics=["UA"])
    level, floor = {1: 0.0, 2: 30.0, 3: 60.0}, {1: (2, 4), 2: (0, 6), 3: (0, 0)}
    gaps = {"near": {1: 3.0, 2: 4.1, 3: 0.2}, "also near": {1: 3.5, 2: 3.9, 3: 0.9}, "far": {1: 9.0, 2: 11.0, 3: 8.0}}
    cells = [cell("Retrain", seed, (level[seed], 0, 0, 0), 1) for seed in level]
    for seed, further in floor.items():
        cells += [cell(row, seed, (level[seed] + ua, 0, 0, 0), 1) for row, ua in zip(table.noise_floor, further, strict=True)]
    cells += [cell(row, seed, (level[seed] - gap, 0, 0, 0), 1) for row, of_row in gaps.items() for seed, gap in of_row.items()]
    summary = summarise(keyed(cells), table)
    between = {seed: (a + b + abs(a - b)) / 3 for seed, (a, b) in floor.items()}
    for row, of_row in gaps.items():
        for name, other in (("above_floor", between), ("above_best", gaps["near"])):
            if other is of_row:
                assert name not in summary[row]
                continue
            found = ttest_1samp([of_row[seed] - other[seed] for seed in level], 0.0).confidence_interval(0.95)
            mean = sum(of_row[seed] - other[seed] for seed in level) / 3
            expected = {"mean": mean, "low": float(found.low), "high": float(found.high), "runs": 3}
            assert summary[row][name] == pytest.approx(expected, abs=1e-9)
    text = markdown(summary, keyed(cells), table)
    assert "| avg. gap | above the floor | cost |" in text
    assert "| far | " in text
    low, high = (summary["far"]["above_floor"][end] for end in ("low", "high"))
    assert f"| 7.11 [{low:.2f}, {high:.2f}] |" in text
    assert "near has the smallest avg. gap. Not shown to be worse" in text
    assert "does not lie above 0: also near." in text


def test_a_gap_near_the_floor_of_its_case_is_marked() -> None:
    table = Table("Retrain", ["Retrain again"], metrics=["UA"])
    cells = []
    for case in ("easy", "hard"):
        for seed in (1, 2, 3):
            cells.append(cell("Retrain", seed, (50, 0, 0, 0), 1, case))
            cells.append(cell("Retrain again", seed, (50 + seed, 0, 0, 0), 1, case))
            cells.append(cell("SalUn", seed, (50 + (5 - seed if case == "easy" else 40 + seed), 0, 0, 0), 1, case))
    columns, rows = gaps_by_case(keyed(cells), table)
    assert columns == ["easy", "hard"]
    assert rows[2] == ["SalUn", "3.00 ± 1.00 ≈", "42.00 ± 1.00"]  # 4 - 1, 3 - 2, 2 - 3 reach 0
    assert " ≈ marks a gap that is not shown to be above the floor of its case." in markdown(
        summarise(keyed(cells), table), keyed(cells), table
    )
    of_case = markdown(summarise(keyed(cells), table), keyed(cells), table).split("\n## hard\n")[1]
    assert "| SalUn | 92.00 ± 1.00 | 42.00 ± 1.00 | 40.00 [40.00, 40.00] |" in of_case
    assert "from each other: 2.00 ± 1.00 over 3 pairs." in of_case
    once = keyed([each for each in cells if each["seed"] == 3])
    assert gaps_by_case(once, table)[1][2] == ["SalUn", "2.00 ± 0.00", "43.00 ± 0.00"]  # one run has no interval


def test_the_best_row_is_one_that_was_measured_in_every_run() -> None:
    cells = []
    for case, level in (("easy", 0), ("hard", 30)):
        for seed in (1, 2, 3):
            cells += [cell("Retrain", seed, (50, 0, 0, 0), 1, case), cell("SalUn", seed, (51 + level + seed, 0, 0, 0), 1, case)]
            cells += [cell("only easy", seed, (55 + seed, 0, 0, 0), 1, case)] * (case == "easy")
    table = Table("Retrain", metrics=["UA"])
    summary = summarise(keyed(cells), table)
    assert summary["only easy"]["gap"]["mean"] < summary["SalUn"]["gap"]["mean"]
    assert summary["only easy"]["above_best"] == pytest.approx({"mean": 4, "low": 4, "high": 4, "runs": 3})
    assert "SalUn has the smallest avg. gap." in markdown(summary, keyed(cells), table)


def test_cases_of_a_seed_are_no_runs_of_their_own() -> None:
    """They share the original model, so they tell less than as many seeds."""
    table = Table("Retrain", ["Retrain again"], metrics=["UA"])
    gaps = {"easy": (1, 2, 1), "hard": (20, 22, 24)}
    cells = []
    for case, of_case in gaps.items():
        for seed, gap in enumerate(of_case):
            cells += [cell("Retrain", seed, (50, 0, 0, 0), 1, case), cell("Retrain again", seed, (51, 0, 0, 0), 1, case)]
            cells.append(cell("SalUn", seed, (50 + gap, 0, 0, 0), 1, case))
    found = summarise(keyed(cells), table)["SalUn"]["above_floor"]
    expected = ttest_1samp([10.5 - 1, 12 - 1, 12.5 - 1], 0.0).confidence_interval(0.95)
    assert found == pytest.approx({"mean": 32 / 3, "low": float(expected.low), "high": float(expected.high), "runs": 3})


def test_a_row_without_a_reference_has_no_gap(results: Any) -> None:
    alone = {key: result for key, result in results.items() if key[0] == "SalUn"}
    assert markdown(summarise(alone, Table("Retrain")), alone, Table("Retrain")).splitlines()[2].endswith("| - | - | - |")


def test_plots_show_every_row(results: Any, tmp_path: Path) -> None:
    from matplotlib import pyplot as plt

    drawn: dict[str, list[str]] = {}
    close, plt.close = plt.close, lambda: drawn.update({str(len(drawn)): _texts(plt.gcf())}) or close()
    try:
        paths = plot(summarise(results, TABLE), results, TABLE, tmp_path)
    finally:
        plt.close = close
    assert [path.name for path in paths] == ["comparison.png"]
    assert all(path.stat().st_size > 5_000 for path in paths)
    assert {"SalUn", "UA  [%]", "MIA  [%]", "noise floor"} <= set(drawn["0"])


def _texts(figure: Any) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text)]


CASED = [
    cell("original", 1, (0, 100, 95, 0), 8, "cat"),
    cell("original", 1, (1, 100, 95, 0), 8, "dog"),
    cell("Retrain", 1, (10, 100, 94, 12), 10, "cat"),
    cell("Retrain", 1, (90, 100, 94, 12), 20, "dog"),
    cell("Retrain", 2, (50, 100, 94, 12), 40, "dog"),
    cell("SalUn", 1, (14, 100, 94, 12), 1, "cat"),
    cell("SalUn", 1, (82, 100, 94, 12), 1, "dog"),
    cell("SalUn", 2, (38, 100, 94, 12), 1, "dog"),
    cell("SalUn", 2, (0, 0, 0, 0), 1, "cat"),  # no retrained model of this seed and case
]


def test_gaps_are_paired_by_seed_and_case() -> None:
    summary = summarise(keyed(CASED), TABLE)
    # 4 / 4 = 1, 8 / 4 = 2 and 12 / 4 = 3; with another case's retrained model they would be ten times as large
    assert summary["SalUn"]["gap"] == {"mean": pytest.approx(2), "std": pytest.approx(1), "runs": 3}
    assert summary["SalUn"]["time"]["mean"] == pytest.approx((1 / 10 + 1 / 20 + 1 / 40) / 3)
    assert summary["SalUn"]["UA"]["runs"] == 4
    assert summary["original"]["time"]["mean"] == pytest.approx((8 / 10 + 8 / 20) / 2)


def test_gaps_of_each_case_stand_side_by_side() -> None:
    results = keyed(
        [
            cell("Retrain", 1, (5, 100, 94, 12), 10, "three"),
            cell("Retrain", 1, (9, 100, 94, 12), 10, "five"),
            cell("Retrain again", 1, (9, 100, 94, 20), 10, "five"),
            cell("SalUn", 1, (9, 100, 94, 12), 10, "three"),
            cell("FT", 1, (9, 100, 94, 14), 10, "five"),
        ]
    )
    columns, rows = gaps_by_case(results, TABLE)
    assert columns == ["three", "five"]
    assert rows == [
        ["Retrain", "0", "0"],
        ["SalUn", "1.00 ± 0.00", "-"],
        ["Retrain again (noise floor)", "-", "2.00 ± 0.00"],
        ["FT", "-", "0.50 ± 0.00"],
    ]
    assert "\n| | three | five |\n" in markdown(summarise(results, TABLE), results, TABLE)
    alone = {place: result for place, result in results.items() if result["case"] == "five"}
    assert gaps_by_case(alone, TABLE) == ([], [])
    assert gaps_by_case(results, Table(gap=False)) == ([], [])


def test_a_row_that_diverged_in_part_is_marked_beside_its_cases() -> None:
    """The mean of the seeds that are left would look better than it is."""
    results = keyed(
        [
            *(cell("Retrain", seed, (5, 100, 94, 12), 10, case) for seed in (1, 2) for case in ("three", "five")),
            *(cell("GA", seed, (9, 100, 94, 12), 10, case) for seed in (1, 2) for case in ("three", "five")),
        ]
    )
    for result in results.values():
        if result["row"] == "GA" and result["seed"] == 2:
            result |= {"state": "diverged", "metrics": {}}
    assert [name for name, *_ in gaps_by_case(results, TABLE)[1]] == ["Retrain", "GA (2 of 4 diverged)"]


def test_the_caption_names_seeds_and_cases() -> None:
    results = keyed(CASED)
    table = markdown(summarise(results, TABLE), results, TABLE)
    assert "Mean ± standard deviation over the seeds 1, 2 and the cases cat, dog, in percent" in table
    assert "One row again by itself (seed 1, cat):" in table
    assert "- SalUn: `python train.py fit SalUn 1 cat`" in table
    assert "fit SalUn 1 dog" not in table


def test_without_cases_the_caption_names_none(results: Any) -> None:
    table = markdown(summarise(results, TABLE), results, TABLE)
    assert "over the seeds 1, 2, 3, in percent (avg. gap: percentage points)." in table
    assert "case" not in table
    assert "One row again by itself (seed 1):" in table


def test_other_columns_without_a_gap() -> None:
    table = Table("Retrain", metrics=["entropy", "FID"], gap=False)
    results = keyed([cell("Retrain", 1, (0, 0, 0, 0), 10), cell("ESD", 1, (0, 0, 0, 0), 5)])
    for result, fid in zip(results.values(), (3.0, 4.5), strict=True):
        result["metrics"] = {"entropy": 0.25, "FID": fid, "acc/cat": 1.0}
    summary = summarise(results, table)
    assert summary["ESD"].keys() == {"entropy", "FID", "cost", "time"}
    lines = markdown(summary, results, table).splitlines()
    assert lines[0] == "| | entropy | FID | cost | run time |"
    assert lines[3] == "| ESD | 0.25 ± 0.00 | 4.50 ± 0.00 | 0.500 ± 0.000 | 0.500 ± 0.000 |"
    text = "\n".join(lines)
    assert "gap" not in text
    assert "percentage points" not in text
    assert "entropy: of the classifier's answer" in text
    assert "FID: distance of generated images" in text
    assert "UA: unlearning accuracy" not in text


def test_the_gap_is_over_the_columns_alone() -> None:
    table = Table("Retrain", metrics=["UA", "TA"])
    results = keyed(CASED)
    assert summarise(results, table)["SalUn"]["gap"]["mean"] == pytest.approx(4)  # 4 / 2, 8 / 2 and 12 / 2
    assert "mean absolute difference of UA and TA to the Retrain model" in markdown(summarise(results, table), results, table)


def test_a_gap_over_one_column_reads_well() -> None:
    table = Table("Retrain", metrics=["UA"])
    results = keyed(CASED)
    assert "mean absolute difference of UA to the Retrain model" in markdown(summarise(results, table), results, table)


@pytest.mark.parametrize("gap", [True, False])
def test_a_figure_that_a_run_lacks_is_left_out(gap: bool) -> None:
    """A model that retains nothing has no FID: the other rows are reported all the same."""
    table = Table("Retrain", metrics=["UA", "FID"], gap=gap)
    results = keyed(CASED)
    for (row, _), result in results.items():
        if row != "SalUn":
            result["metrics"]["FID"] = 3.0
    lines = markdown(summarise(results, table), results, table).splitlines()
    cells = next(line for line in lines if line.startswith("| SalUn")).split(" | ")
    assert cells[2] == "-"
    assert cells[1].startswith("33.50 ± ")


def generators(*counts: tuple[float, float, str]) -> dict[tuple[str, Any], dict[str, Any]]:
    results = keyed([cell(f"row {i}", 1, (0, 0, 0, 0), 1, "cat") for i in range(len(counts))])
    for result, (generated, real, features) in zip(results.values(), counts, strict=True):
        result["metrics"] |= {"FID": 1.0, "num_generated": generated, "num_real": real}
        result["features"] = features
    return results


DIFFER = "Rows were measured with different numbers of images or features: their FID cannot be compared."


def caption(results: dict[tuple[str, Any], dict[str, Any]], **kwargs: Any) -> list[str]:
    table = Table("row 0", metrics=["FID"], gap=False)
    return markdown(summarise(results, table), results, table, **kwargs).splitlines()


def test_numbers_of_images_and_features_are_told() -> None:
    lines = caption(generators((900, 1300, "Judge"), (900, 1300, "Judge")))
    assert "FID of 900 generated images against 1300 of the training set, features: Judge." in lines
    assert sum(line.startswith("FID of") for line in lines) == 1
    assert DIFFER not in lines


@pytest.mark.parametrize("other", [(800, 1300, "Judge"), (900, 1299, "Judge"), (900, 1300, "Inception")])
def test_rows_that_cannot_be_compared_are_told(other: tuple[float, float, str]) -> None:
    lines = caption(generators((900, 1300, "Judge"), other))
    assert DIFFER in lines
    assert sum(line.startswith("FID of") for line in lines) == 2
    assert f"FID of {other[0]} generated images against {other[1]} of the training set, features: {other[2]}." in lines


def test_cases_may_differ_in_their_images() -> None:
    """There are more images of one class than of another."""
    results = generators((900, 1300, "Judge"), (900, 1300, "Judge"))
    dogs = {(row, (1, "dog")): {**result, "case": "dog"} for (row, _), result in results.items()}
    for result in dogs.values():
        result["metrics"] = {**result["metrics"], "num_real": 1200}
    lines = caption({**results, **dogs})
    assert DIFFER not in lines
    assert [line[:46] for line in lines if line.startswith("FID of")] == [
        "FID of 900 generated images against 1200 of th",
        "FID of 900 generated images against 1300 of th",
    ]


def test_the_fid_of_real_test_images_stands_beside_that_of_the_rows() -> None:
    results = generators((900, 1300, "Judge"), (900, 1300, "Judge"))
    for result in results.values():
        result["metrics"] |= {"FID_real": 2.3141, "num_test": 323.0}
    lines = caption(results)
    place = lines.index("FID of 900 generated images against 1300 of the training set, features: Judge.")
    assert lines[place + 1] == (
        "Real test images in their place: FID 2.31 (323 images; with fewer it grows). It does not rank rows that are"
        " not above that."
    )
    assert sum(line.startswith("Real test images") for line in lines) == 1


def test_classifiers_have_no_line_on_images(results: Any) -> None:
    table = markdown(summarise(results, TABLE), results, TABLE)
    assert "FID" not in table
    assert DIFFER not in table


def test_the_accuracy_of_the_judge_is_told() -> None:
    first = {"judge": {"metrics": {"TA": 97.456, "UA": 3.0}}, "encoder": {"metrics": {"loss": 1.0}}}
    lines = caption(generators((1, 1, "Judge")), first=first)
    assert "The model called judge: TA 97.46 (accuracy on the test set, in percent)." in lines
    assert not any("encoder" in line for line in lines)


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Collects the texts of each figure that is drawn from now on."""
    from matplotlib import pyplot as plt

    figures: list[list[str]] = []
    close = plt.close

    def noted() -> None:
        figures.append(_texts(plt.gcf()))
        close()

    monkeypatch.setattr(plt, "close", noted)
    return figures


def test_generators_are_plotted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = drawn(monkeypatch)
    table = Table("Retrain", metrics=["entropy", "UA"], gap=False)
    results = keyed([cell("Retrain", 1, (0, 0, 0, 0), 10), cell("ESD", 1, (7, 0, 0, 0), 5)])
    for result in results.values():
        result["metrics"]["entropy"] = 0.5
    paths = plot(summarise(results, table), results, table, tmp_path)
    assert [path.name for path in paths] == ["comparison.png"]
    assert {"ESD", "entropy", "UA  [%]", "Retrain"} <= set(figures[0])
    assert "avg. gap (lower is better)" not in figures[0]


@pytest.mark.parametrize("gap", [True, False])
def test_a_single_column_is_plotted(tmp_path: Path, gap: bool) -> None:
    table = Table("Retrain", metrics=["UA"], gap=gap)
    results = keyed([cell("Retrain", 1, (0, 0, 0, 0), 10), cell("ESD", 1, (7, 0, 0, 0), 5)])
    paths = plot(summarise(results, table), results, table, tmp_path)
    assert "comparison.png" in [path.name for path in paths]


@pytest.mark.parametrize("rows", [["Retrain"], ["SalUn"], ["original", "SalUn"]])
def test_part_of_the_rows_is_plotted(tmp_path: Path, rows: list[str]) -> None:
    results = {key: result for key, result in keyed(CASED).items() if key[0] in rows}
    paths = plot(summarise(results, TABLE), results, TABLE, tmp_path)
    assert [path.name for path in paths] == ["comparison.png"]


def test_three_retrained_models_make_the_noise_floor() -> None:
    table = Table("Retrain", ["Retrain again", "Retrain a third time"], metrics=["UA", "TA"])
    cells = [
        cell(row, seed, (float(ua), 100, 90, 10), 1)
        for seed, figures in {1: (0, 2, 6), 2: (0, 0, 12)}.items()
        for row, ua in zip(("Retrain", *table.noise_floor), figures, strict=True)
    ]
    results = keyed(cells)
    summary = summarise(results, table)
    assert list(summary) == ["Retrain", "Retrain again"]
    # half the differences in UA: seed 1: 2, 6, 4; seed 2: 0, 12, 12
    assert summary["Retrain again"]["gap"] == {"mean": 3.0, "std": pytest.approx(2.5298, abs=1e-4), "runs": 6}
    assert summary["Retrain again"]["UA"] == {"mean": 5.0, "std": pytest.approx(5.2915, abs=1e-4), "runs": 4}
    text = markdown(summary, results, table)
    assert "| Retrain again (noise floor) | 5.00 ± 5.29 | 90.00 ± 0.00 | 3.00 ± 2.53 |" in text
    assert "from each other: 3.00 ± 2.53 over 6 pairs." in text
    assert "| Retrain a third time" not in text
    assert "- Retrain a third time: `" in text


def test_the_cost_is_paired() -> None:
    results = keyed(CASED)
    for result in results.values():
        result["passes"] = {"original": 50, "Retrain": 40, "SalUn": 8}[result["row"]]
    assert summarise(results, TABLE)["SalUn"]["cost"] == {"mean": pytest.approx(0.2), "std": pytest.approx(0), "runs": 3}


def test_rows_that_failed_or_diverged_are_marked_and_plotted(results: Any, tmp_path: Path) -> None:
    results["SalUn", (1, "")] |= {"state": "diverged", "metrics": {"UA": 90.0, "RA": float("nan"), "TA": 1.0, "MIA": None}}
    failed = {"state": "failed", "error": "No memory", "metrics": {}, "command": "", "case": ""}
    results["SalUn", (2, "")] = {"row": "SalUn", "seed": 2, **failed}
    results["GA", (1, "")] = {"row": "GA", "seed": 1, **failed}
    summary = summarise(results, TABLE)
    assert summary["GA"] == {}
    assert summary["SalUn"]["UA"]["runs"] == 2
    assert "gap" not in summary["SalUn"]
    text = markdown(summary, results, TABLE)
    assert "| SalUn (1 of 3 diverged; 1 of 3 failed) | 70.00 ± 28.28 | 50.00 ± 0.00 |" in text
    assert "| GA (1 of 1 failed) | - | - | - | - | - | - | - |" in text
    assert "Failed: SalUn, seed 2: No memory." in text
    paths = plot(summary, results, TABLE, tmp_path)
    assert [path.name for path in paths] == ["comparison.png"]
