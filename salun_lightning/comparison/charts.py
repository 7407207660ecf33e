"""The drawings of the page, as places on a canvas that its template draws."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from salun_lightning.comparison.paired import Results, Table, gaps_by_run, retrained_pairs
from salun_lightning.evidence.gaps import gaps

WIDTH = 340
_MARGIN, _ROW, _NUMBERS = 12, 20, 44
_LETTER, _LETTERS = 6, 20  # the width of a letter, and how many of a label are shown
_SUREST = 1e-7  # below it, float32 knows no difference to certainty
_POINTS = 80  # of a curve


def gap_panels(results: Results, table: Table) -> list[dict[str, Any]]:
    """A panel for each figure: how far each run of each row is from its retrained model, and the noise floor."""
    names = [*table.metrics, *(["gap"] if table.gap else [])]
    rows = dict.fromkeys(row for row, _ in results if row not in (table.reference, *table.noise_floor))
    panels = []
    for name in names:
        distances = {row: _distances(results, table, row, name) for row in rows}
        distances = {row: values for row, values in distances.items() if values}
        if distances:
            panels.append(_panel(name, distances, _noise(results, table, name)))
    return panels


def _distances(results: Results, table: Table, row: str, name: str) -> list[float]:
    if name == "gap":
        return [gap for of_run in gaps_by_run(results, table).get(row, {}).values() for gap in of_run]
    found: list[float] = []
    for (other, run), result in results.items():
        paired = results.get((table.reference, run))
        if other == row and paired is not None:
            found += gaps(result["metrics"], paired["metrics"], [name]).values()
    return found


def _noise(results: Results, table: Table, name: str) -> float | None:
    """How far models that were retrained for the same run are from each other, as a mean over all pairs."""
    if name == "gap":
        found = [gap for floor in table.noise_floor[:1] for gap in _distances(results, table, floor, name)]
    else:
        pairs = [pair for of_run in retrained_pairs(results, table).values() for pair in of_run]
        found = [abs(gap) for one, other in pairs for gap in gaps(one["metrics"], other["metrics"], [name]).values()]
    return fmean(found) if found else None


def _panel(name: str, distances: Mapping[str, Sequence[float]], noise: float | None) -> dict[str, Any]:
    values = [value for of_row in distances.values() for value in of_row] + [noise or 0.0]
    low = 0.0 if name == "gap" else min(0.0, *values, -(noise or 0.0))
    high = max(0.0, *values)
    room = 0.04 * (high - low) or 1.0
    low, high = (low if name == "gap" else low - room), high + room

    left = _MARGIN + _LETTER * min(_LETTERS, max(map(len, distances)))  # labels stand beside the dots

    def place(value: float) -> float:
        return round(left + (WIDTH - left - _MARGIN - _NUMBERS) * (value - low) / (high - low), 1)

    rows = [
        {
            "row": row,
            "label": row if len(row) <= _LETTERS else f"{row[: _LETTERS - 1].rstrip()}…",
            "mean": f"{fmean(of_row):{'' if name == 'gap' else '+'}.2f}",
            "y": _ROW * i + 14,
            "points": [place(value) for value in of_row],
            "at": place(fmean(of_row)),
        }
        for i, (row, of_row) in enumerate(distances.items())
    ]
    band = None if noise is None else (place(0 if name == "gap" else -noise), place(noise))
    return {
        "title": "avg. gap" if name == "gap" else name,
        "noise": None if noise is None else f"{noise:.2f}",
        "height": _ROW * len(rows) + 30,
        "bottom": _ROW * len(rows) + 8,
        "rows": rows,
        "band": band,
        "zero": place(0),
        "ticks": [(place(tick), f"{tick:g}") for tick in ticks(low, high)],
    }


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers in a range, not many more than asked for.

    Example:
        >>> ticks(-1.2, 9.1)
        [0.0, 2.0, 4.0, 6.0, 8.0]
    """
    rough = (high - low) / about
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= 0.8 * rough)
    return [round(step * i, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


CURVES_HEIGHT = 170


def curve(confidences: Sequence[float]) -> str:
    """How the confidence of samples is distributed: for each doubt, 1 - p, the fraction that is at most as unsure.

    Doubts are drawn on a logarithmic scale from 1e-7 to 1, because all that differs lies close to p = 1.

    Args:
        confidences: Probabilities of the true class, sorted or not; NaN is left out.

    Returns:
        The points of a line in SVG.
    """
    doubts = sorted(max(1 - p, _SUREST) for p in confidences if not math.isnan(p))
    if not doubts:
        return ""
    count = min(_POINTS, len(doubts))
    ranks = [round(i * (len(doubts) - 1) / max(count - 1, 1)) for i in range(count)]
    places = [(doubt_at(doubts[rank]), _height_at((rank + 1) / len(doubts))) for rank in ranks]
    return " ".join(f"{x},{y}" for x, y in [(places[0][0], _height_at(0)), *places, (doubt_at(1), _height_at(1))])


def doubt_at(doubt: float) -> float:
    """Where a doubt lies on the canvas."""
    return round(WIDTH - _MARGIN + (WIDTH - 2 * _MARGIN - 18) * math.log10(doubt) / -math.log10(_SUREST), 1)


def _height_at(fraction: float) -> float:
    return round(8 + (CURVES_HEIGHT - 36) * (1 - fraction), 1)


def strips(cells: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Where in the network the weights may move, and where they did, a strip of tensors for each row.

    Args:
        cells: The result of a cell of each row; those count that hold ``mask_density`` or ``moved`` by tensor.
    """
    layers = list(dict.fromkeys(layer for cell in cells.values() for key in _STRIPS for layer in cell.get(key, {})))
    changes = [value or 0.0 for cell in cells.values() for value in cell.get("moved", {}).values()]
    most = {"mask_density": 1.0, "moved": max(changes, default=0.0)}
    found = [
        {
            "row": row,
            "what": what.format(most=100 * most[key]),
            "values": [cell[key].get(layer) for layer in layers],
            "shades": [round((cell[key].get(layer) or 0) / (most[key] or 1), 3) for layer in layers],
        }
        for row, cell in cells.items()
        for key, what in _STRIPS.items()
        if cell.get(key)
    ]
    return {"layers": layers, "strips": found, "side": round(WIDTH * 2 / max(len(layers), 1), 3)}


_STRIPS = {
    "mask_density": "may move (full: every weight)",
    "moved": "size of the change (full: {most:.2g} % of the original weights)",
}
