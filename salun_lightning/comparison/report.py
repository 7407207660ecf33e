"""The table and the figures of a comparison."""

from collections import Counter
from collections.abc import Iterator, Mapping
from statistics import fmean, stdev
from typing import Any

from salun_lightning.comparison.paired import Results, Table, above, best_row, gaps_by_run
from salun_lightning.evidence.gaps import finite

_NEAR = " ≈"
_MEANING = {
    "UA": "UA: unlearning accuracy in percent, 100 minus the accuracy on what was forgotten.",
    "entropy": "entropy: of the classifier's answer to images of the forgotten class, in nats.",
    "acc": "acc: how many generated images of the other classes are recognised, in percent.",
    "FID": "FID: distance of generated images of the other classes to real ones.",
}


def summarise(results: Results, table: Table) -> dict[str, dict[str, dict[str, float]]]:
    """Mean, standard deviation and number of runs of each figure of each row.

    ``gap`` is the mean absolute difference of the metrics to those of the reference. ``cost`` and ``time`` are the passes and
    the seconds of training, as fractions of the reference's. Each figure is computed for each run that has both models, and
    then averaged. The rows of the noise floor become one row: its gap is that of all pairs of models that were retrained for
    the same run, the reference among them.

    ``above_floor`` and ``above_best`` are how much larger the gap of a row is than the noise floor, and than that of the row
    with the smallest mean, in the same run: mean, ends of the 95 % interval over the seeds, and their number (``runs``).
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
        for name, counted in (("cost", "passes"), ("time", "seconds")):
            if paired and result.get(counted) and paired.get(counted):
                figures[name].append(result[counted] / paired[counted])
    for row, of_row in gaps_by_run(results, table).items():
        rows[row]["gap"] = [gap for gaps in of_row.values() for gap in gaps]
    summary = {
        row: {
            name: {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else 0.0, "runs": len(values)}
            for name, values in figures.items()
            if values
        }
        for row, figures in rows.items()
    }
    for name, other in (("above_floor", next(iter(table.noise_floor), None)), ("above_best", best_row(results, table))):
        for row, interval in above(results, table, other).items():
            summary[row][name] = interval
    return summary


def table_rows(summary: Mapping[str, Any], results: Results, table: Table) -> tuple[list[str], list[list[str]]]:
    """The columns of the table, and each row with its name in front."""
    floor = any("above_floor" in figures for figures in summary.values())
    gap = ["avg. gap", *(["above the floor"] if floor else [])] if table.gap else []
    columns = [*table.metrics, *gap, "cost", "run time"]
    rows = []
    for row, figures in summary.items():
        cells = [_cell(figures, metric, 2) for metric in table.metrics]
        if table.gap:
            cells.append(_gap_cell(figures, row, table))
        if floor:
            cells.append(_interval(figures["above_floor"]) if "above_floor" in figures else "-")
        rows.append([_marked(row, results, table), *cells, _cell(figures, "cost", 3), _cell(figures, "time", 3)])
    return columns, rows


def case_tables(results: Results, table: Table) -> Iterator[tuple[str, list[str], list[list[str]], list[str]]]:
    """The table of each case: its name, what :func:`table_rows` has, and what it says in sentences."""
    for case, measured in _each_case(results).items():
        summary = summarise(measured, table)
        yield case, *table_rows(summary, measured, table), _levels(summary, measured, table)


def _each_case(results: Results) -> dict[str, Results]:
    """What was measured in each case; empty where there are no two."""
    cases: dict[str, None] = dict.fromkeys(result.get("case", "") for result in results.values())
    found: dict[str, Results] = {
        case: {place: result for place, result in results.items() if result.get("case", "") == case} for case in cases
    }
    return found if len(found) > 1 else {}


def gaps_by_case(results: Results, table: Table) -> tuple[list[str], list[list[str]]]:
    """The average gap of each row in each case: the columns, and the rows with their names in front.

    There are none where there are no two cases.
    """
    by_case = {case: summarise(measured, table) for case, measured in _each_case(results).items() if table.gap}
    names = list(dict.fromkeys(row for summary in by_case.values() for row in summary))
    rows = [
        [_marked(name, results, table), *(_gap_and_mark(summary.get(name, {}), name, table) for summary in by_case.values())]
        for name in names
    ]
    return [*by_case], rows


def _gap_and_mark(figures: Mapping[str, Any], row: str, table: Table) -> str:
    near = "above_floor" in figures and figures["above_floor"]["runs"] > 1 and figures["above_floor"]["low"] <= 0
    return _gap_cell(figures, row, table) + _NEAR * near


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
    for case, columns, rows, told in case_tables(results, table):
        lines += ["", f"## {case}", "", *_lines(columns, rows), "", *told]
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
    if any("above_floor" in figures for figures in summary.values()):
        lines.append(
            "above the floor: the avg. gap of a row minus the noise floor of the same run, and its 95 % interval (Student's t)"
            " over the seeds." + f"{_NEAR} marks a gap that is not shown to be above the floor of its case." * (len(cases) > 1)
        )
    return lines + _levels(summary, results, table)


def _levels(summary: Mapping[str, Any], results: Results, table: Table) -> list[str]:
    """Where the noise floor lies, and which rows cannot be told from the best one, in sentences."""
    lines = []
    floor = summary.get(table.noise_floor[0], {}).get("gap") if table.noise_floor else None
    if floor:
        lines.append(
            f"The noise floor is how far models that are retrained for the same run, with seeds of their own, are from each"
            f" other: {floor['mean']:.2f} ± {floor['std']:.2f} over {floor['runs']} pairs. A gap below it says nothing."
        )
    intervals = {row: figures["above_best"] for row, figures in summary.items() if "above_best" in figures}
    if any(interval["runs"] > 1 for interval in intervals.values()):
        near = [row for row, interval in intervals.items() if interval["runs"] > 1 and interval["low"] <= 0]
        lines.append(
            f"{best_row(results, table)} has the smallest avg. gap. Not shown to be worse, as the 95 % interval of the"
            f" difference in the same run does not lie above 0: {_listed(near) if near else 'none'}. (The smallest of many is"
            " in part the luckiest.)"
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


def _interval(found: Mapping[str, float]) -> str:
    return f"{found['mean']:.2f}" + (f" [{found['low']:.2f}, {found['high']:.2f}]" if found["runs"] > 1 else "")


def _cell(figures: Mapping[str, Any], name: str, digits: int) -> str:
    if name not in figures:
        return "-"
    return f"{figures[name]['mean']:.{digits}f} ± {figures[name]['std']:.{digits}f}"
