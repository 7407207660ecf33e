"""The table and the figures of a comparison."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from statistics import fmean, stdev
from typing import Any

from salun_lightning.evidence.gaps import METRICS, average_gap, finite

Results = Mapping[tuple[str, Any], dict[str, Any]]
"""What each cell measured, by row and run (seed and case)."""

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
        noise_floor: The rows that repeat the reference with other seeds; in the table the first stands for all.
        metrics: The columns, as ``test`` names them.
        gap: Whether the average gap over them is a column.
    """

    reference: str = "Retrain"
    noise_floor: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=lambda: list(METRICS))
    gap: bool = True


def summarise(results: Results, table: Table) -> dict[str, dict[str, dict[str, float]]]:
    """Mean, standard deviation and number of runs of each figure of each row.

    ``gap`` is the mean absolute difference of the metrics to those of the reference. ``cost`` and ``time`` are the passes and
    the seconds of training, as fractions of the reference's. Each figure is computed for each run that has both models, and
    then averaged. The rows of the noise floor become one row: its gap is that of all pairs of models that were retrained for
    the same run, the reference among them.
    """
    rows: dict[str, dict[str, list[float]]] = {}
    for (row, run), result in results.items():
        name = table.noise_floor[0] if row in table.noise_floor else row
        figures = rows.setdefault(name, {name: [] for name in (*table.metrics, "gap", "cost", "time")})
        measured = finite(result["metrics"])
        for metric in table.metrics:
            if metric in measured:
                figures[metric].append(measured[metric])
        paired = results.get((table.reference, run))
        if paired is None:
            continue
        for name, counted in (("cost", "passes"), ("time", "seconds")):
            if result.get(counted) and paired.get(counted):
                figures[name].append(result[counted] / paired[counted])
        if row not in table.noise_floor:
            figures["gap"] += _gap(measured, paired["metrics"], table)
    if table.noise_floor and table.noise_floor[0] in rows:
        pairs = retrained_pairs(results, table)
        rows[table.noise_floor[0]]["gap"] = [gap for pair in pairs for gap in _gap(*pair, table)]
    return {
        row: {
            name: {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else 0.0, "runs": len(values)}
            for name, values in figures.items()
            if values
        }
        for row, figures in rows.items()
    }


def retrained_pairs(results: Results, table: Table) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The figures of each two models that were retrained for the same run: how far they are apart is the noise floor."""
    retrained: dict[Any, list[dict[str, Any]]] = {}
    for (row, run), result in results.items():
        if row in (table.reference, *table.noise_floor):
            retrained.setdefault(run, []).append(result["metrics"])
    return [pair for models in retrained.values() for pair in combinations(models, 2)]


def _gap(one: Mapping[str, Any], other: Mapping[str, Any], table: Table) -> list[float]:
    """The average gap of two models, if it is asked for and they have one."""
    gap = average_gap(one, other, table.metrics) if table.gap else None
    return [] if gap is None else [gap]


def table_rows(summary: Mapping[str, Any], results: Results, table: Table) -> tuple[list[str], list[list[str]]]:
    """The columns of the table, and each row with its name in front."""
    columns = [*table.metrics, *(["avg. gap"] if table.gap else []), "cost", "run time"]
    rows = []
    for row, figures in summary.items():
        cells = [_cell(figures, metric, 2) for metric in table.metrics]
        if table.gap:
            cells.append(_gap_cell(figures, row, table))
        rows.append([_marked(row, results, table), *cells, _cell(figures, "cost", 3), _cell(figures, "time", 3)])
    return columns, rows


def gaps_by_case(results: Results, table: Table) -> tuple[list[str], list[list[str]]]:
    """The average gap of each row in each case: the columns, and the rows with their names in front.

    There are none where there are no two cases.
    """
    cases = list(dict.fromkeys(result.get("case", "") for result in results.values()))
    if len(cases) < 2 or not table.gap:
        return [], []
    by_case = [
        summarise({place: result for place, result in results.items() if result.get("case", "") == case}, table)
        for case in cases
    ]
    names = list(dict.fromkeys(row for summary in by_case for row in summary))
    return cases, [[name, *(_gap_cell(summary.get(name, {}), name, table) for summary in by_case)] for name in names]


def _gap_cell(figures: Mapping[str, Any], row: str, table: Table) -> str:
    return "0" if row == table.reference else _cell(figures, "gap", 2)


def markdown(summary: Mapping[str, Any], results: Results, table: Table, first: Mapping[str, Any] | None = None) -> str:
    """The table, what it says, and the command behind each row.

    Args:
        summary: What :func:`summarise` returned.
        results: What each cell measured.
        table: What the table is made of.
        first: What was measured of the models that were trained first, by name.
    """
    lines = _lines(*table_rows(summary, results, table))
    cases, rows = gaps_by_case(results, table)
    if cases:
        lines += ["", "avg. gap in each case:", "", *_lines(cases, rows)]
    lines += ["", *caption(summary, results, table, first or {})]
    one = next(iter(results), ("", None))[1]
    lines += ["", f"One row again by itself ({_run_name(results, one)}):", ""]
    lines += [f"- {row}: `{result['command']}`" for (row, run), result in results.items() if run == one]
    return "\n".join(lines) + "\n"


def _lines(columns: list[str], rows: list[list[str]]) -> list[str]:
    """A table in Markdown."""
    head = ["| | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    return head + [f"| {label} | {' | '.join(cells)} |" for label, *cells in rows]


def _marked(row: str, results: Results, table: Table) -> str:
    """The name of a row, with what went wrong in it."""
    merged = table.noise_floor if row in table.noise_floor else [row]
    states = Counter(result.get("state", "finished") for (name, _), result in results.items() if name in merged)
    marks = ["noise floor"] if row in table.noise_floor else []
    marks += [f"{states[state]} of {states.total()} {state}" for state in ("diverged", "failed") if states[state]]
    return f"{row} ({'; '.join(marks)})" if marks else row


def caption(summary: Mapping[str, Any], results: Results, table: Table, first: Mapping[str, Any]) -> list[str]:
    """What the table says, in sentences."""
    seeds = sorted({result["seed"] for result in results.values()})
    cases = list(dict.fromkeys(result["case"] for result in results.values() if result.get("case")))
    over = f"{_counted('seed', seeds)}" + (f" and {_counted('case', cases)}" if cases else "")
    lines = [f"Mean ± standard deviation over {over}" + (", in percent (avg. gap: percentage points)." if table.gap else ".")]
    lines += [f"Failed: {_place(row, result)}: {result['error']}." for (row, _), result in results.items() if "error" in result]
    lines += [_MEANING[name] for name in table.metrics if name in _MEANING and not table.gap]
    if table.gap:
        lines.append(
            f"The closer to {table.reference}, the better. avg. gap: mean absolute difference of"
            f" {_listed(table.metrics)} to the {table.reference} model of the same split."
        )
    lines += _compared_images(results)
    lines += [
        f"The model called {name}: TA {result['metrics']['TA']:.2f} (accuracy on the test set, in percent)."
        for name, result in first.items()
        if result["metrics"].get("TA") is not None
    ]
    lines.append(
        f"cost: passes of samples through networks while training, the saliency pass included, as a fraction of"
        f" {table.reference}'s: a forward pass counts 1, a backward pass 2."
    )
    threads = sorted({result["threads"] for result in results.values() if "threads" in result})
    with_threads = f", with {_listed([str(number) for number in threads])} thread{'s' * (threads != [1])}" if threads else ""
    lines.append(f"Run time: as a fraction of {table.reference}'s, the saliency pass included{with_threads}.")
    floor = summary.get(table.noise_floor[0], {}).get("gap") if table.noise_floor else None
    if floor:
        lines.append(
            f"The noise floor is how far models that are retrained for the same run, with seeds of their own, are from each"
            f" other: {floor['mean']:.2f} ± {floor['std']:.2f} over {floor['runs']} pairs. A gap below it says nothing."
        )
    return lines


def _compared_images(results: Results) -> list[str]:
    """How many images the FID of each row is of, which must be as many in all rows of a run, and that of real test images."""
    lines = []
    by_run: dict[Any, set[tuple[float, float, str]]] = {}
    held_out: dict[tuple[float, float, str], dict[float, list[float]]] = {}
    for (_, run), result in results.items():
        measured = result["metrics"]
        if measured.get("num_generated") is not None:
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


def _place(row: str, result: Mapping[str, Any]) -> str:
    return f"{row}, seed {result['seed']}" + (f", {result['case']}" if result.get("case") else "")


def _cell(figures: Mapping[str, Any], name: str, digits: int) -> str:
    if name not in figures:
        return "-"
    return f"{figures[name]['mean']:.{digits}f} ± {figures[name]['std']:.{digits}f}"
