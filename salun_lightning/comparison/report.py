"""The table, the figures and the plots of a comparison."""

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

METRICS = ("UA", "RA", "TA", "MIA")

Results = Mapping[tuple[str, int], dict[str, Any]]


def summarise(results: Results, reference: str) -> dict[str, dict[str, dict[str, float]]]:
    """Mean, standard deviation and number of seeds of each figure of each row.

    ``gap`` is the mean over UA, RA, TA and MIA of the absolute difference to the reference of the same seed, in percentage
    points; ``cost`` is the training time as a fraction of the reference's. Both are paired: computed seed by seed, for the
    seeds that have both, and then averaged.

    Args:
        results: What each cell measured, by row and seed.
        reference: The row that gaps are measured against.
    """
    rows: dict[str, dict[str, list[float]]] = {}
    for (row, seed), result in results.items():
        figures = rows.setdefault(row, {name: [] for name in (*METRICS, "gap", "cost")})
        for name in METRICS:
            figures[name].append(result["metrics"][name])
        paired = results.get((reference, seed))
        if paired is not None:
            figures["gap"].append(average_gap(result["metrics"], paired["metrics"]))
            figures["cost"].append(result["seconds"] / paired["seconds"])
    return {
        row: {
            name: {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else 0.0, "seeds": len(values)}
            for name, values in figures.items()
            if values
        }
        for row, figures in rows.items()
    }


def average_gap(metrics: Mapping[str, float], reference: Mapping[str, float]) -> float:
    """Mean absolute difference of UA, RA, TA and MIA, in percentage points (Fan et al., ICLR 2024).

    Example:
        >>> average_gap({"UA": 1, "RA": 100, "TA": 98, "MIA": 4}, {"UA": 3, "RA": 100, "TA": 99, "MIA": 5})
        1.0
    """
    return fmean(abs(metrics[name] - reference[name]) for name in METRICS)


def markdown(summary: Mapping[str, Any], results: Results, reference: str, noise_floor: str | None) -> str:
    """The table, and the ``fit`` command behind each row."""
    seeds = sorted({seed for _, seed in results})
    lines = [
        "| | UA | RA | TA | MIA | avg. gap | run time |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row, figures in summary.items():
        name = f"{row} (noise floor)" if row == noise_floor else row
        gap = "0" if row == reference else _cell(figures, "gap", 2)
        cells = [*(_cell(figures, metric, 2) for metric in METRICS), gap, _cell(figures, "cost", 3)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Mean ± standard deviation over the seeds {', '.join(map(str, seeds))}, in percent (avg. gap: percentage points).",
        f"The closer to {reference}, the better. avg. gap: mean absolute difference of UA, RA, TA and MIA to the {reference}"
        f" model of the same split and seed. Run time: as a fraction of {reference}'s, the saliency pass included.",
    ]
    if noise_floor in summary:
        lines.append(
            f"The noise floor is how far a second {reference} model, which differs in its seed only, is from the first: a gap"
            " below it says nothing."
        )
    lines += ["", f"One row again by itself (seed {seeds[0]}):", ""]
    for (row, seed), result in results.items():
        if seed == seeds[0]:
            lines.append(f"- {row}: `{result['command']}`")
    return "\n".join(lines) + "\n"


def _cell(figures: Mapping[str, Any], name: str, digits: int) -> str:
    if name not in figures:
        return "-"
    return f"{figures[name]['mean']:.{digits}f} ± {figures[name]['std']:.{digits}f}"


def plot(summary: Mapping[str, Any], results: Results, reference: str, noise_floor: str | None, out: Path) -> list[Path]:
    """Draw the comparison; returns the files that were written."""
    import matplotlib as mpl

    mpl.use("Agg")
    drawings: dict[str, Callable[[Any], None]] = {
        "comparison.png": lambda plt: _draw_metrics(plt, summary, results, reference, noise_floor),
        "confidence.png": lambda plt: _draw_confidence(plt, results, reference, noise_floor),
    }
    if any("mask_density" in result for result in results.values()):
        drawings["mask.png"] = lambda plt: _draw_masks(plt, results)
    from matplotlib import pyplot as plt

    paths = []
    for name, draw in drawings.items():
        draw(plt)
        plt.savefig(out / name, dpi=130, bbox_inches="tight")
        plt.close()
        paths.append(out / name)
    return paths


def _draw_metrics(plt: Any, summary: Mapping[str, Any], results: Results, reference: str, noise_floor: str | None) -> None:
    rows = [row for row in summary if row not in (reference, noise_floor)]
    _, axes = plt.subplots(1, 5, figsize=(15, 0.55 * len(rows) + 1.6), sharey=True)
    colours = {row: f"C{i}" for i, row in enumerate(rows)}
    for axis, name in zip(axes, (*METRICS, "gap"), strict=True):
        for y, row in enumerate(rows):
            if name not in summary[row]:
                continue
            points = [
                average_gap(result["metrics"], results[reference, seed]["metrics"])
                if name == "gap"
                else result["metrics"][name]
                for (other, seed), result in results.items()
                if other == row and (name != "gap" or (reference, seed) in results)
            ]
            axis.plot(points, [y] * len(points), "o", color=colours[row], alpha=0.35, markersize=6)
            axis.plot(summary[row][name]["mean"], y, "D", color=colours[row], markersize=7)
        axis.grid(axis="x", alpha=0.3)
        axis.set_title("avg. gap (lower is better)" if name == "gap" else f"{name}  [%]", fontsize=11)
        mark = summary.get(noise_floor or "", {}).get("gap") if name == "gap" else summary.get(reference, {}).get(name)
        if mark:
            label = "noise floor" if name == "gap" else reference
            axis.axvline(mark["mean"], color="black", linewidth=1, label=label)
            axis.axvspan(mark["mean"] - mark["std"], mark["mean"] + mark["std"], color="black", alpha=0.1)
            axis.legend(fontsize=8, loc="best")
        if name == "gap":
            axis.set_xlim(left=0)
    axes[0].set_yticks(range(len(rows)), rows)
    axes[0].invert_yaxis()


def _draw_confidence(plt: Any, results: Results, reference: str, noise_floor: str | None) -> None:
    """How sure the models are of what they were to forget: 1 - p, because all that differs lies close to p = 1."""
    _, axis = plt.subplots(figsize=(7, 4.5))
    rows = dict.fromkeys(row for row, _ in results if row != noise_floor)
    for row in rows:
        doubts = sorted(
            max(1 - p, 1e-7) for (other, _), result in results.items() if other == row for p in result["forget_confidence"]
        )
        heights = [(i + 1) / len(doubts) for i in range(len(doubts))]
        style = {"color": "black", "linewidth": 2.5} if row == reference else {"linewidth": 1.3}
        axis.step(doubts, heights, where="post", label=row, **style)
    axis.set_xscale("log")
    axis.set_xlabel("1 - probability of the true class, on the forget set")
    axis.set_ylabel("fraction of the forget set at most as unsure")
    axis.set_title(f"Forgetting as if never seen: the closer to {reference}, the better", fontsize=11)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)


def _draw_masks(plt: Any, results: Results) -> None:
    """Where in the network the weights lie that may move."""
    masked = {row: result["mask_density"] for (row, _), result in results.items() if "mask_density" in result}
    layers = list(next(iter(masked.values())))
    _, axis = plt.subplots(figsize=(max(6, 0.28 * len(layers)), 4))
    for i, (row, density) in enumerate(masked.items()):
        width = 0.8 / len(masked)
        axis.bar([x + i * width for x in range(len(layers))], [density[layer] for layer in layers], width, label=row)
    axis.set_xticks([x + 0.4 - 0.4 / len(masked) for x in range(len(layers))], layers, rotation=90, fontsize=7)
    axis.set_ylabel("fraction of the weights that may move")
    axis.set_title("Saliency mask by layer, input to output (last seed)", fontsize=11)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=9, loc="lower left", framealpha=1)
