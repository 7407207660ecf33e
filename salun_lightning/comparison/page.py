"""One page to open: the table, and what stands behind it. A single file that loads nothing from anywhere."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import salun_lightning
from salun_lightning.comparison import charts
from salun_lightning.comparison.paired import Results, Table
from salun_lightning.comparison.plan import Cell
from salun_lightning.comparison.report import caption, case_tables, gaps_by_case, table_rows
from salun_lightning.evidence.predictions import Predictions
from salun_lightning.files import read_json, write_text

_SETS = ("forget", "retain", "test")


def write_page(
    path: Path,
    summary: Mapping[str, Any],
    results: Results,
    table: Table,
    cells: Sequence[Cell],
    first: Mapping[str, Any] | None = None,
    pictures: Sequence[Path] = (),
) -> Path:
    """Write the report as one HTML file.

    Args:
        path: The file.
        summary: What ``summarise`` returned.
        results: What each cell measured.
        table: What the table is made of.
        cells: The cells that were finished.
        first: What was measured of the models that were trained first, by name.
        pictures: Pictures of generated images.
    """
    said = {cell: Predictions.load(cell.predictions) for cell in cells if results[cell.row, cell.run].get("predictions")}
    columns, rows = table_rows(summary, results, table)
    cases, case_rows = gaps_by_case(results, table)
    one = next(iter(results))[1]
    runs: dict[str, dict[str, Any]] = {}
    for (row, _), result in results.items():
        runs.setdefault(row, result)
    content = {
        "title": f"Comparison {path.resolve().parent.name}",
        "version": salun_lightning.__version__,
        "columns": columns,
        "rows": rows,
        "cases": cases,
        "case_rows": case_rows,
        "case_tables": list(case_tables(results, table)),
        "kinds": [_kind(row, table) for row in summary],
        "caption": caption(summary, results, table, first or {}),
        "reference": table.reference,
        "gaps": charts.gap_panels(results, table),
        "confidence": _confidence(said, table),
        "where": charts.strips(runs),
        "images": _images(cells, said, table),
        "pictures": [(picture.stem, _embedded(picture.read_bytes())) for picture in pictures],
        "commands": [(row, result["command"]) for (row, run), result in results.items() if run == one],
        "width": charts.WIDTH,
        "curves_height": charts.CURVES_HEIGHT,
        "doubts": [(charts.doubt_at(10.0**power), power) for power in range(-7, 1)],
    }
    places = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=places, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    write_text(path, environment.get_template("page.html").render(content))
    return path


def _kind(row: str, table: Table) -> str:
    return "reference" if row == table.reference else "floor" if row in table.noise_floor else "row"


def _embedded(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _confidence(said: Mapping[Cell, Predictions], table: Table) -> list[dict[str, Any]]:
    """For each row, how sure its models are of samples of each set, all runs together."""
    pooled: dict[str, dict[str, list[float]]] = {}
    for cell, predictions in said.items():
        for name in _SETS:
            if name in predictions.sets and cell.row not in table.noise_floor:
                of_row = pooled.setdefault(cell.row, {})
                of_row.setdefault(name, []).extend(predictions.sets[name].confidences.tolist())
    retrained = charts.curve(pooled.get(table.reference, {}).get("forget", []))
    return [
        {
            "row": row,
            "retrained": "" if row == table.reference else retrained,
            "curves": [(name, charts.curve(values)) for name, values in sets.items()],
            "means": [(name, f"{fmean(values):.3f}") for name, values in sets.items()],
        }
        for row, sets in pooled.items()
    ]


def _images(cells: Sequence[Cell], said: Mapping[Cell, Predictions], table: Table) -> list[dict[str, Any]]:
    """For each row, in its first run, the images that lost most and least confidence against the original model."""
    shown: dict[str, dict[str, Any]] = {}
    for cell in cells:
        kept = read_json(cell.thumbnails) if cell.row not in shown and cell in said else {}
        if not kept or cell.original is None or cell.original not in said or cell.row in (table.reference, *table.noise_floor):
            continue
        retrained = next((said[other] for other in said if other.row == table.reference and other.run == cell.run), None)
        names = {"before": said[cell.original], "after": said[cell], "retrained": retrained}
        surenesses = {name: _by_index(predictions) for name, predictions in names.items()}
        groups = [("most", "Forgotten most"), ("least", "Forgotten least")]
        shown[cell.row] = {
            "name": cell.name,
            "groups": [
                (title, [_image(index, kept, surenesses) for index in kept[group]]) for group, title in groups if kept[group]
            ],
        }
    return list(shown.values())


def _by_index(predictions: Predictions | None) -> dict[int, tuple[float, int]]:
    """The confidence and the class of each training sample."""
    if predictions is None:
        return {}
    training = predictions.training
    values = zip(training.confidences.tolist(), training.targets.tolist(), strict=True)
    return dict(zip(training.indices.tolist(), values, strict=True))


def _image(index: int, kept: Mapping[str, Any], surenesses: Mapping[str, Mapping[int, tuple[float, int]]]) -> dict[str, Any]:
    known = {name: of[index] for name, of in surenesses.items() if index in of}
    return {
        "index": index,
        "source": f"data:image/png;base64,{kept['images'][str(index)]}",
        "label": kept["class_names"][known["after"][1]],
        **{name: f"{known[name][0]:.2f}" if name in known else "-" for name in surenesses},
    }
