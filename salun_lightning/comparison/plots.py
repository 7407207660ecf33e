"""The plots of a comparison."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from salun_lightning.comparison.paired import Results, Table
from salun_lightning.comparison.plan import Cell, slug
from salun_lightning.evidence.gaps import average_gap, finite

_PERCENT = {"UA", "RA", "TA", "MIA", "acc", "inside", "other", "pairs"}


def plot(summary: Mapping[str, Any], results: Results, table: Table, out: Path) -> list[Path]:
    """Draw the comparison; returns the files that were written."""
    return _drawn({"comparison.png": lambda plt: _draw_metrics(plt, summary, results, table)}, out)


def plot_samples(cells: Sequence[Cell], out: Path) -> list[Path]:
    """Draw what the models generate from the same noise, side by side, for the first seed; returns the files."""
    drawings = {}
    for case in dict.fromkeys(cell.case for cell in cells):
        seed = min(cell.seed for cell in cells if cell.case == case)
        shown = [cell for cell in cells if cell.run == (seed, case) and cell.samples.is_file()]
        if shown:
            name = f"samples-{slug(case)}.png" if case else "samples.png"
            drawings[name] = lambda plt, shown=shown: _draw_samples(plt, shown)
    return _drawn(drawings, out)


def _drawn(drawings: Mapping[str, Callable[[Any], None]], out: Path) -> list[Path]:
    if not drawings:
        return []
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    paths = []
    for name, draw in drawings.items():
        draw(plt)
        plt.gcf().savefig(out / name, dpi=130, bbox_inches="tight")  # that of pyplot would draw it once more
        plt.close()
        paths.append(out / name)
    return paths


def _draw_metrics(plt: Any, summary: Mapping[str, Any], results: Results, table: Table) -> None:
    reference, noise_floor = table.reference, table.noise_floor
    rows = [row for row in summary if row not in (reference, *noise_floor)]
    names = [*table.metrics, *(["gap"] if table.gap else [])]
    size = (3 * len(names), 0.55 * len(rows) + 1.6)
    _, (axes,) = plt.subplots(1, len(names), figsize=size, sharey=True, squeeze=False)
    colours = {row: f"C{i}" for i, row in enumerate(rows)}
    for axis, name in zip(axes, names, strict=True):
        for y, row in enumerate(rows):
            if name not in summary[row]:
                continue
            points = [_figure(name, results, row, run, table) for other, run in results if other == row]
            points = [point for point in points if point is not None]
            axis.plot(points, [y] * len(points), "o", color=colours[row], alpha=0.35, markersize=6)
            axis.plot(summary[row][name]["mean"], y, "D", color=colours[row], markersize=7)
        axis.grid(axis="x", alpha=0.3)
        axis.set_title(
            "avg. gap (lower is better)" if name == "gap" else f"{name}  [%]" if name in _PERCENT else name, fontsize=11
        )
        mark = summary.get((*noise_floor, "")[0], {}).get("gap") if name == "gap" else summary.get(reference, {}).get(name)
        if mark:
            label = "noise floor" if name == "gap" else reference
            axis.axvline(mark["mean"], color="black", linewidth=1, label=label)
            axis.axvspan(mark["mean"] - mark["std"], mark["mean"] + mark["std"], color="black", alpha=0.1)
            axis.legend(fontsize=8, loc="best")
        if name == "gap":
            axis.set_xlim(left=0)
    axes[0].set_yticks(range(len(rows)), rows)
    axes[0].invert_yaxis()


def _figure(name: str, results: Results, row: str, run: Any, table: Table) -> float | None:
    measured = finite(results[row, run]["metrics"])
    if name != "gap":
        return measured.get(name)
    paired = results.get((table.reference, run))
    return None if paired is None else average_gap(measured, paired["metrics"], table.metrics)


def _draw_samples(plt: Any, cells: Sequence[Cell]) -> None:
    """A panel for each model, a row for each class; the same place is the same noise."""
    results, pictures = [cell.result or {} for cell in cells], [plt.imread(cell.samples) for cell in cells]
    names, forgotten = results[0]["sampled_classes"], results[0]["forgotten_classes"]
    tall, wide = pictures[0].shape[:2]
    height = tall / len(names)
    panel, gap = 0.32 * wide / height, 0.6  # inches
    size = ((panel + gap) * len(cells), 0.32 * len(names) + 0.6)
    _, (axes,) = plt.subplots(1, len(cells), figsize=size, squeeze=False, gridspec_kw={"wspace": gap / panel})
    for axis, cell, picture, result in zip(axes, cells, pictures, results, strict=True):
        axis.imshow(picture, cmap="gray", interpolation="nearest", aspect="auto")
        axis.set_title(fill(cell.row, max(10, round(9 * (panel + gap)))), fontsize=10)  # nine letters to an inch
        axis.set_xticks([])
        axis.set_yticks([(i + 0.5) * height - 0.5 for i in range(len(names))], names if axis is axes[0] else [])
        axis.tick_params(length=0, labelsize=9)
        for i, name in enumerate(names):
            accuracy = result["metrics"].get(f"acc/{name}")
            if accuracy is not None:
                style = {"color": "red", "weight": "bold"} if name in forgotten else {}
                place = (1.03, 1 - (i + 0.5) / len(names))
                axis.text(*place, f"{accuracy:.0f}", transform=axis.transAxes, fontsize=8, va="center", **style)
        for spine in axis.spines.values():
            spine.set_visible(False)
    for label in axes[0].get_yticklabels():
        if label.get_text() in forgotten:
            label.set(color="red", weight="bold")
    if any(axis.texts for axis in axes):
        axes[0].set_ylabel("class (right: % recognised)", fontsize=9)
