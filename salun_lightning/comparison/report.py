"""The table and the figures of a comparison."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

Results = Mapping[tuple[str, Any], dict[str, Any]]
"""What each cell measured, by row and run (seed and case)."""

METRICS = ("UA", "RA", "TA", "MIA")
"""The columns of a comparison of classifiers."""

_MEANING = {
    "UA": "UA: unlearning accuracy in percent, 100 minus the accuracy on what was forgotten.",
    "entropy": "entropy: of the classifier's answer to images of the forgotten class, in nats.",
    "acc": "acc: how many generated images of the other classes are recognised, in percent.",
    "FID": "FID: distance of generated images of the other classes to real ones.",
}


@dataclass
class Table:
    """What the table is made of.

    Args:
        reference: The row that gaps are measured against.
        noise_floor: The row that repeats the reference with another seed.
        metrics: The columns, as ``test`` names them.
        gap: Whether the average gap over them is a column.
    """

    reference: str = "Retrain"
    noise_floor: str | None = None
    metrics: list[str] = field(default_factory=lambda: list(METRICS))
    gap: bool = True


def summarise(results: Results, table: Table) -> dict[str, dict[str, dict[str, float]]]:
    """Mean, standard deviation and number of runs of each figure of each row.

    ``gap`` is the mean over the metrics of the absolute difference to the reference of the same run; ``cost`` is the training
    time as a fraction of the reference's. Both are paired: computed run by run, for the runs that have both, and then averaged.
    """
    rows: dict[str, dict[str, list[float]]] = {}
    for (row, run), result in results.items():
        figures = rows.setdefault(row, {name: [] for name in (*table.metrics, "gap", "cost")})
        for name in table.metrics:
            if name in result["metrics"]:
                figures[name].append(result["metrics"][name])
        paired = results.get((table.reference, run))
        if paired is not None:
            figures["cost"].append(result["seconds"] / paired["seconds"])
            gap = average_gap(result["metrics"], paired["metrics"], table.metrics)
            if table.gap and gap is not None:
                figures["gap"].append(gap)
    return {
        row: {
            name: {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else 0.0, "runs": len(values)}
            for name, values in figures.items()
            if values
        }
        for row, figures in rows.items()
    }


def average_gap(metrics: Mapping[str, float], reference: Mapping[str, float], names: list[str]) -> float | None:
    """Mean absolute difference, for UA, RA, TA and MIA in percentage points (Fan et al., ICLR 2024); None if one is missing.

    Example:
        >>> average_gap({"UA": 1, "RA": 100}, {"UA": 3, "RA": 100}, ["UA", "RA"])
        1.0
    """
    if not all(name in metrics and name in reference for name in names):
        return None
    return fmean(abs(metrics[name] - reference[name]) for name in names)


def markdown(summary: Mapping[str, Any], results: Results, table: Table, first: Mapping[str, Any] | None = None) -> str:
    """The table, what it says, and the command behind each row.

    Args:
        summary: What :func:`summarise` returned.
        results: What each cell measured.
        table: What the table is made of.
        first: What was measured of the models that were trained first, by name.
    """
    columns = [*table.metrics, *(["avg. gap"] if table.gap else []), "run time"]
    lines = ["| | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for row, figures in summary.items():
        name = f"{row} (noise floor)" if row == table.noise_floor else row
        cells = [_cell(figures, metric, 2) for metric in table.metrics]
        if table.gap:
            cells.append("0" if row == table.reference else _cell(figures, "gap", 2))
        lines.append(f"| {name} | {' | '.join([*cells, _cell(figures, 'cost', 3)])} |")
    lines += ["", *_caption(summary, results, table, first or {})]
    one = next(iter(results), ("", None))[1]
    lines += ["", f"One row again by itself ({_run_name(results, one)}):", ""]
    lines += [f"- {row}: `{result['command']}`" for (row, run), result in results.items() if run == one]
    return "\n".join(lines) + "\n"


def _caption(summary: Mapping[str, Any], results: Results, table: Table, first: Mapping[str, Any]) -> list[str]:
    seeds = sorted({result["seed"] for result in results.values()})
    cases = list(dict.fromkeys(result["case"] for result in results.values() if result.get("case")))
    over = f"{_counted('seed', seeds)}" + (f" and {_counted('case', cases)}" if cases else "")
    lines = [f"Mean ± standard deviation over {over}" + (", in percent (avg. gap: percentage points)." if table.gap else ".")]
    unknown = [name for name in table.metrics if not any(name in figures for figures in summary.values())]
    lines += [f"No row measured {_listed(unknown)}."] if unknown and summary else []
    lines += [_MEANING[name] for name in table.metrics if name in _MEANING and not table.gap]
    if table.gap:
        lines.append(
            f"The closer to {table.reference}, the better. avg. gap: mean absolute difference of"
            f" {_listed(table.metrics)} to the {table.reference} model of the same split and seed."
        )
    lines += _compared_images(results)
    lines += [
        f"The model called {name}: TA {result['metrics']['TA']:.2f} (accuracy on the test set, in percent)."
        for name, result in first.items()
        if "TA" in result["metrics"]
    ]
    lines.append(f"Run time: as a fraction of {table.reference}'s, the saliency pass included.")
    if table.noise_floor in summary:
        lines.append(
            f"The noise floor is how far a second {table.reference} model, which differs in its seed only, is from the first: a"
            " gap below it says nothing."
        )
    return lines


def _compared_images(results: Results) -> list[str]:
    """How many images the FID of each row is of, which must be as many in all rows of a run, and that of real test images."""
    lines = []
    by_run: dict[Any, set[tuple[float, float, str]]] = {}
    held_out: dict[tuple[float, float, str], dict[float, list[float]]] = {}
    for (_, run), result in results.items():
        measured = result["metrics"]
        if "num_generated" in measured:
            entry = measured["num_generated"], measured["num_real"], result["features"]
            by_run.setdefault(run, set()).add(entry)
            if measured.get("FID_real") is not None:
                held_out.setdefault(entry, {}).setdefault(measured["num_test"], []).append(measured["FID_real"])
    if any(len(entries) > 1 for entries in by_run.values()):
        lines.append("Rows were measured with different numbers of images or features: their FID cannot be compared.")
    for entry in sorted({entry for counts in by_run.values() for entry in counts}):
        generated, real, features = entry
        lines.append(f"FID of {generated:.0f} generated images against {real:.0f} of the training set, features: {features}.")
        for count, distances in sorted(held_out.get(entry, {}).items()):
            lines.append(
                f"Real test images in their place: FID {fmean(distances):.2f} ({count:.0f} images; with fewer it grows)."
                " It does not rank rows that are not above that."
            )
    return lines


def _counted(what: str, items: list[Any]) -> str:
    return f"the {what}{'s' if len(items) > 1 else ''} {', '.join(map(str, items))}"


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _run_name(results: Results, run: Any) -> str:
    for (_, other), result in results.items():
        if other == run:
            return f"seed {result['seed']}" + (f", {result['case']}" if result.get("case") else "")
    return "none was run"


def _cell(figures: Mapping[str, Any], name: str, digits: int) -> str:
    if name not in figures:
        return "-"
    return f"{figures[name]['mean']:.{digits}f} ± {figures[name]['std']:.{digits}f}"
