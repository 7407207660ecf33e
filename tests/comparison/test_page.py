"""The page, as a browser reads it."""

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from salun_lightning.comparison.charts import curve, doubt_at, gap_panels, strips
from salun_lightning.comparison.page import write_page
from salun_lightning.comparison.paired import Table
from salun_lightning.comparison.plan import Cell
from salun_lightning.comparison.report import summarise, table_rows
from salun_lightning.evidence.measures import figures
from salun_lightning.evidence.predictions import PredictedSet, Predictions
from salun_lightning.files import write_json

TABLE = Table("Retrain", ["Retrain again"])
ROWS = ("original", "Retrain", "Retrain again", "<b>SalUn</b> & co", "GA")


class Page(HTMLParser):
    """The rows of the first table, the sections, all text, and all that is loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.sections: set[str] = set()
        self.texts: list[str] = []
        self.sources: list[str] = []
        self.tags: list[str] = []
        self._in_table = self._in_cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "data", "srcset", "action") and value]
        if tag == "section" and given.get("id"):
            self.sections.add(str(given["id"]))
        self._in_table |= tag == "table" and given.get("id") == "table"
        if self._in_table and tag == "tr":
            self.rows.append([])
        if self._in_table and tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_table &= tag != "table"
        self._in_cell &= tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.texts += [data.strip()] if data.strip() else []
        if self._in_table and self._in_cell:
            self.rows[-1][-1] += data


def parsed(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def predictions(sureness: float, seed: int) -> Predictions:
    """Of a model whose confidence in the forget set is about this high."""
    draw = torch.Generator().manual_seed(seed)
    sets = {}
    for name, start, count, scale in (("forget", 0, 12, sureness), ("retain", 12, 60, 6.0), ("test", 0, 30, 3.0)):
        targets = torch.arange(start, start + count) % 3
        logits = torch.randn(count, 3, generator=draw) + scale * torch.nn.functional.one_hot(targets, 3)
        sets[name] = PredictedSet(logits, targets, torch.arange(start, start + count))
    return Predictions(sets)


def finished(out: Path, name: str, seed: int, original: Cell | None) -> tuple[Cell, dict[str, Any]]:
    number = ROWS.index(name)
    cell = Cell(name, seed, "", out / f"{number}" / f"seed-{seed}", (), "key", original)
    said = predictions((8.0, 2.0, 1.5, 3.0, 7.0)[number], 10 * seed + number)
    said.save(cell.predictions)
    result = {
        "row": name,
        "seed": seed,
        "case": "",
        "command": f"python train.py fit {name}",
        "metrics": figures(said),
        "predictions": True,
        "seconds": 1.0 + number,
        "passes": 10,
        "threads": 1,
        "state": "finished",
    }
    if original is not None:
        result |= {"moved": {"stem.weight": 0.25, "head.bias": 0.5}, "mask_density": {"stem.weight": 0.125, "head.bias": 1.0}}
        picture = base64.b64encode(b"a picture").decode()
        kept = {"most": [3, 1], "least": [7, 2], "class_names": ["<i>cat</i>", "dog", "owl"]}
        write_json(cell.thumbnails, {**kept, "images": dict.fromkeys(["3", "1", "7", "2"], picture)})
    return cell, result


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, Any, dict[str, dict[str, Any]]]:
    out = tmp_path_factory.mktemp("out")
    cells: dict[Cell, dict[str, Any]] = {}
    for seed in (1, 2):
        original, result = finished(out, ROWS[0], seed, None)
        cells[original] = result
        cells |= dict(finished(out, name, seed, original if number > 2 else None) for number, name in enumerate(ROWS) if number)
    results = {(cell.row, cell.run): cells[cell] for cell in sorted(cells, key=lambda cell: ROWS.index(cell.row))}
    summary = summarise(results, TABLE)
    write_page(out / "report.html", summary, results, TABLE, list(cells))
    return parsed(out / "report.html"), results, summary


def test_its_values_are_those_of_the_table(made: Any) -> None:
    page, results, summary = made
    columns, rows = table_rows(summary, results, TABLE)
    assert page.rows == [["", *columns], *rows]
    assert len(rows) == len(ROWS)
    assert all(
        re.fullmatch(r"-?[\d.]+ ± [\d.]+|0|-|-?[\d.]+ \[-?[\d.]+, -?[\d.]+\]", value) for row in rows for value in row[1:]
    )


def test_each_case_has_a_table_of_its_own(tmp_path: Path) -> None:
    cells = {}
    for case, name in (("easy", ROWS[2]), ("easy", ROWS[3]), ("hard", ROWS[2]), ("hard", ROWS[4])):
        cell, result = finished(tmp_path / case, name, 1, None)
        cells[replace(cell, case=case)] = {**result, "case": case}
    results = {(cell.row, cell.run): result for cell, result in cells.items()}
    write_page(tmp_path / "report.html", summarise(results, TABLE), results, TABLE, list(cells))
    texts = parsed(tmp_path / "report.html").texts
    easy, hard = (texts.index(f"All figures of {case}") for case in ("easy", "hard"))
    for name, case, start, end in ((ROWS[3], "easy", easy, hard), (ROWS[4], "hard", hard, len(texts))):
        figures_of = results[name, (1, case)]["metrics"]
        place = texts[start:end].index(name)
        assert texts[start:end][place + 1] == f"{figures_of['UA']:.2f} ± 0.00"
    assert ROWS[4] not in texts[easy:hard]


def test_nothing_is_loaded_and_nothing_is_run(made: Any) -> None:
    page, _, _ = made
    assert page.sources
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "script" not in page.tags
    assert not any("@import" in text or "url(" in text for text in page.texts)


def test_names_of_users_are_text(made: Any) -> None:
    page, _, _ = made
    assert "i" not in page.tags
    assert "<i>cat</i>" in page.texts
    assert ROWS[3] in page.texts
    assert f"python train.py fit {ROWS[3]}" in page.texts


def test_every_part_is_there(made: Any) -> None:
    page, _, summary = made
    assert page.sections == {"gaps", "confidence", "where", "images"}
    gap = summary["GA"]["gap"]["mean"]
    assert f"{gap:.2f}" in page.texts
    assert f"noise floor {summary['Retrain again']['gap']['mean']:.2f}" in page.texts
    assert page.tags.count("img") == 2 * 4  # two rows, two images each way
    assert any(text.startswith("stem.weight: 0.25") for text in page.texts)


def test_the_images_tell_what_each_model_says(made: Any) -> None:
    page, _, _ = made
    number = ROWS.index("GA")
    said = [
        predictions(sureness, 10 + row).sets["forget"].confidences[3] for row, sureness in ((0, 8.0), (number, 7.0), (1, 2.0))
    ]
    place = page.texts.index("GA, seed 1")
    assert page.texts[place + 1 : place + 5] == [
        "Forgotten most",
        "<i>cat</i>",
        f"{said[0]:.2f} → {said[1]:.2f}",
        f"Retrain {said[2]:.2f}",
    ]


def result(row: str, seed: int, ua: float | None) -> dict[str, Any]:
    return {"row": row, "seed": seed, "metrics": {"UA": ua}}


def test_distances_are_paired_and_the_noise_floor_is_that_of_retrained_models() -> None:
    given = {"Retrain": (4.0, 10.0), "Retrain again": (6.0, 9.0), "GA": (1.0, 18.0), "FT": (None, None)}
    results = {(row, (seed, "")): result(row, seed, of[seed]) for row, of in given.items() for seed in (0, 1)}
    ua, gap = gap_panels(results, Table("Retrain", ["Retrain again"], ["UA"]))
    assert (ua["title"], gap["title"]) == ("UA", "avg. gap")
    assert [(row["label"], row["mean"]) for row in ua["rows"]] == [("GA", "+2.50")]  # -3 and 8
    assert [(row["label"], row["mean"]) for row in gap["rows"]] == [("GA", "5.50")]
    assert ua["noise"] == gap["noise"] == "1.50"  # 2 and 1
    scale = {float(label): place for place, label in ua["ticks"]}
    unit = (scale[4.0] - scale[0.0]) / 4
    (row,) = ua["rows"]
    assert scale[0.0] == ua["zero"]
    assert row["points"] == pytest.approx([scale[0.0] - 3 * unit, scale[0.0] + 8 * unit], abs=0.2)
    assert ua["band"] == pytest.approx([scale[0.0] - 1.5 * unit, scale[0.0] + 1.5 * unit], abs=0.2)
    assert gap["band"][0] == gap["zero"]


def test_a_long_label_is_cut_and_stands_beside_the_dots() -> None:
    names = ["Retrain", "FT", "A method whose name is long"]
    results = {(row, (0, "")): result(row, 0, float(10 * place)) for place, row in enumerate(names)}
    (panel,) = gap_panels(results, Table("Retrain", [], ["UA"], gap=False))
    assert [(row["row"], row["label"]) for row in panel["rows"]] == [("FT", "FT"), (names[2], "A method whose name…")]
    assert all(at > 6 * len("A method whose name…") for row in panel["rows"] for at in (*row["points"], row["at"]))


def test_a_curve_rises_where_the_doubts_are() -> None:
    points = [tuple(map(float, point.split(","))) for point in curve([0.9, 1.0, float("nan"), 0.999]).split()]
    xs = [x for x, _ in points]
    heights = [y for _, y in points]
    assert xs[1:4] == [pytest.approx(doubt_at(doubt), abs=0.11) for doubt in (1e-7, 1e-3, 1e-1)]
    assert heights == sorted(heights, reverse=True)
    assert heights[1] - heights[2] == pytest.approx(heights[2] - heights[3], abs=0.11)
    assert heights[3] == heights[4]
    assert curve([float("nan")]) == ""


def test_strips_are_relative_to_the_largest_change() -> None:
    found = strips({"FT": {"moved": {"a": 0.1, "b": 0.4}}, "GA": {"mask_density": {"a": 0.5, "c": 1.0}}, "Retrain": {}})
    assert found["layers"] == ["a", "b", "c"]
    assert [(strip["row"], strip["shades"]) for strip in found["strips"]] == [("FT", [0.25, 1.0, 0]), ("GA", [0.5, 0, 1.0])]
    assert "40 %" in found["strips"][0]["what"]
