"""The command ``search``."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from salun_lightning.cli import program
from salun_lightning.comparison.command import parsed_comparison
from salun_lightning.comparison.plan import Cell, Plan, slug
from salun_lightning.comparison.rows import ConfigFile, Row, all_rows, row_called, row_of
from salun_lightning.comparison.schedule import CellsFailed, Schedule
from salun_lightning.configurations import beside, find
from salun_lightning.evidence.gaps import METRICS, average_gap, finite
from salun_lightning.search.method import MethodSearch, Pilot, Request
from salun_lightning.search.trials import open_journal


def search(
    config: str | list[str],
    methods: str | list[str],
    trials: int = 20,
    seeds: int | list[int] | None = None,
    cases: str | list[str] | None = None,
    out: Path | None = None,
    threads: int | None = None,
    arguments: list[str] | None = None,
) -> list[dict[str, Any]]:
    """Look for the options with which methods come closest to a retrained model, on seeds that comparisons leave out.

    Looked for is the smallest avg. gap (UA, RA, TA, MIA) to the retrained model of the same seed, as a mean over the seeds. The
    options, and where values are looked for, stand under ``search`` in the configuration of a method. The best ones are written
    to ``<task>/tuned/<method>.yaml``, those for a request to ``<task>/<request>/tuned/``. The first trial has the default
    settings; that of a request is followed by one with what was found for the task before, if anything was.

    Any number of processes may run the same command, also on several machines that share the folder. One that was killed goes
    on where it was.

    Args:
        config: A task, and a request if there is one (``digits``, ``digits/one_class``): what is original and retrained is then
            ``<task>/original`` and ``<task>/retrain``. Or a comparison (``compare/digits_requests``), which says all this, and
            whose cases are the requests.
        methods: Configurations of methods, such as ``ssd``.
        trials: How many settings are tried of each method, for each request. With a larger number, the same command goes on.
        seeds: The pilot seeds, by default 100 and 101.
        cases: Of a comparison, the cases that are searched for; by default all. Those without files of their own share the
            values that are found.
        out: Where journal and models lie; by default ``runs/search/`` and the names of the configurations.
        threads: The number of threads each model computes with; by default those of the comparison, or 1.
        arguments: Further arguments of ``fit``; on the command line, all that follows ``--``.

    Returns:
        What was found: ``method``, ``request``, ``default`` and ``gap``, ``options``, and the ``file`` that holds them.

    Raises:
        ValueError: A name, a number or a search space is not known or not possible. Nothing was trained.
        CellsFailed: Of some methods the default settings fail. The others were searched.
    """
    given = {"config": _listed(config), "methods": _listed(methods), "seeds": _listed([100, 101] if seeds is None else seeds)}
    if cases is not None:
        given["cases"] = _listed(cases)
    for name, values in given.items():
        if not values or len(set(values)) < len(values):
            raise ValueError(f"'{name}' is {values}. Name at least one, and each only once.")
    for name, number in {"trials": trials, "threads": threads}.items():
        if number is not None and number < 1:
            raise ValueError(f"'{name}' is {number}. Give at least 1.")
    files = [_found(name, "compare") for name in given["config"]]
    found = {file.stem: file for file in (_found(name, "method") for name in given["methods"])}
    out = Path("runs", "search", "-".join(slug(file.stem) for file in files)) if out is None else out
    journal = open_journal(out / "journal.log")
    comparison = _comparison(files, out)
    sources = _cases(comparison, given.get("cases"))
    rows, reference = _rows(comparison, found, list(sources))
    plan = Plan(out, comparison["options"], [*comparison["arguments"], *(arguments or [])], row_of(comparison["task"]).files)
    plan.add_first({name: row_of(model) for name, model in comparison["first"].items()})
    plan.add({name: row for name, row in rows.items() if name in {"original", reference}}, given["seeds"], sources)
    command = " ".join(["search", *(word for name in given["config"] for word in ("-c", name))])
    pilot = Pilot(
        plan,
        given["seeds"],
        reference,
        comparison["metrics"],
        threads or comparison["threads"],
        trials,
        command,
        arguments or [],
    )
    requests = _requests(plan, sources)
    searches = [MethodSearch(name, rows[name], found[name], request, pilot, journal) for name in found for request in requests]
    plan.reader.save()
    _train_first(plan, pilot)
    _run_all(searches)
    for one in searches:
        print(one.summary)
    if failed := [one for one in searches if one.trials.error is not None]:
        raise CellsFailed(
            " ".join(f"{one.name}: the default settings fail: {str(one.trials.error).rstrip('.')}." for one in failed)
            + " The same command tries them again."
        )
    return [one.result for one in searches if one.result is not None]


def _listed(values: Any) -> list[Any]:
    return list(values) if isinstance(values, list | tuple) else [values]


def _found(name: str, folder: str) -> Path:
    """A configuration by its name: of a method, or of a task before that of a comparison."""
    places, what = (["", folder], "configuration") if folder == "compare" else ([folder, ""], folder)
    file = next((file for place in places if (file := find(name, place)) is not None), None)
    if file is None:
        raise ValueError(f"There is no {what} '{name}'. '{program()} configs' lists those that ship.")
    return file.absolute()


def _comparison(files: list[Path], out: Path) -> dict[str, Any]:
    """What ``compare`` would be called with: what is in a comparison, or what a task and a request come to."""
    found: dict[str, Any] = {"rows": {}, "task": [ConfigFile(str(file)) for file in files]}
    if any("rows" in (yaml.safe_load(file.read_text(encoding="utf-8")) or {}) for file in files):
        words = [word for file in files for word in ("--config", str(file))]
        found = parsed_comparison([*words, "--out", str(out), "--seeds", "[0]"])
        if not found["gap"]:
            raise ValueError("This comparison has no avg. gap, which is what is searched for. Give one of classifiers.")
    else:
        for row, name in {"original": "original", "Retrain": "retrain"}.items():
            file = beside(files, name)
            if file is None:
                missing = files[0].with_suffix("") / f"{name}.yaml"
                raise ValueError(
                    f"There is no '{missing}', which tells how that model is trained. Write it, or give a comparison."
                )
            found["rows"][row] = ConfigFile(str(file))
    defaults = {
        "options": {},
        "arguments": [],
        "task": [],
        "first": {},
        "cases": {"": Row()},
        "metrics": list(METRICS),
        "threads": 1,
    }
    return {"reference": "Retrain", **found, **{name: found.get(name) or value for name, value in defaults.items()}}


def _cases(comparison: Mapping[str, Any], asked: list[str] | None) -> dict[str, Any]:
    known = {str(name): source for name, source in comparison["cases"].items()}
    return known if asked is None else {name: known[name] for name in (row_called(str(case), known, "case") for case in asked)}


def _rows(comparison: Mapping[str, Any], methods: Mapping[str, Path], cases: list[str]) -> tuple[dict[str, Row], str]:
    """The rows of the comparison and of the methods, with their seeds, and the name of the retrained model."""
    sources = {**comparison["rows"], **{name: Row(ConfigFile(str(file))) for name, file in methods.items()}}
    rows, reference, _ = all_rows(sources, comparison["reference"], 0, comparison["options"])
    return {
        name: replace(row, cases={case: row.cases[case] for case in cases if case in row.cases}) for name, row in rows.items()
    }, reference


def _requests(plan: Plan, cases: Mapping[str, Any]) -> list[Request]:
    """The cases by the last of their configurations, beside which the values that are found are written."""
    requests: dict[str, Request] = {}
    for name, source in cases.items():
        own = [*plan.task, *row_of(source).files]
        if not own:
            raise ValueError("There is no task. Give one, such as 'digits'.")
        requests.setdefault(str(own[-1]), Request(Path(own[-1]), {})).cases[name] = source
    return list(requests.values())


def _train_first(plan: Plan, pilot: Pilot) -> None:
    """The original and retrained models of the pilot seeds."""

    def report(cell: Cell, result: dict[str, Any], note: str) -> None:
        result = pilot.figures.of(cell, result)
        measured = finite(result["metrics"])
        if cell.row == pilot.reference and result["metrics"]:
            if missing := [name for name in pilot.metrics if name not in measured]:
                raise ValueError(f"{cell.name}: it has no {', '.join(missing)}. What is searched for is the gap of these.")
            pilot.wanted[cell.run] = measured
        columns = "  ".join(f"{name} {measured[name]:6.2f}" for name in pilot.metrics if name in measured)
        paired = pilot.wanted.get(cell.run)
        gap = average_gap(measured, paired, pilot.metrics) if paired else None
        print(f"{cell.name:<32} {columns}{'' if gap is None else f'  gap {gap:6.2f}'}  {note}", flush=True)

    cells = sorted(plan.cells, key=lambda cell: cell.row != pilot.reference)  # the gap of the original models can then be shown
    schedule = Schedule([*plan.first, *cells], pilot.threads, report)
    schedule.run()
    if schedule.failed:
        raise CellsFailed(" ".join(f"{cell.name}: {result['error']}." for cell, result in schedule.failed.items()))


def _run_all(searches: list[MethodSearch]) -> None:
    """Run trials until there is none left, beside other processes: each prefers a method that none of the others is at."""
    pending = list(searches)
    while pending:
        for one in sorted(pending, key=lambda one: len(one.trials.running())):
            claimed = one.trials.claim()
            if claimed is not None:
                one.run(claimed)
                break
            if one.trials.finished:
                one.conclude()
                pending.remove(one)
        else:
            if pending:
                pending[0].trials.wait()


def search_command(args: list[str]) -> list[dict[str, Any]]:
    """Parse the options of ``search`` and run it."""
    parser = ArgumentParser(
        prog=f"{program()} search",
        description="Look for the options with which methods come closest to a retrained model, on pilot seeds.",
        exit_on_error=False,  # whoever called says what is wrong
    )
    parser.add_argument("-c", "--config", action="append", required=True, help="A task (and a request), or a comparison.")
    parser.add_argument("--methods", nargs="+", type=str, required=True, help="Configurations of methods, such as ssd.")
    parser.add_argument("--trials", type=int, default=20, help="How many settings are tried of each method.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[100, 101], help="The pilot seeds.")
    parser.add_argument("--cases", nargs="+", type=str, default=None, help="Cases of the comparison; by default all.")
    parser.add_argument("--out", type=Path, default=None, help="Where journal and models lie; default: runs/search/NAME.")
    parser.add_argument("--threads", type=int, help="The number of threads each model computes with.")
    own, further = (args[: args.index("--")], args[args.index("--") + 1 :]) if "--" in args else (args, [])
    return search(**parser.parse_args(own).as_dict(), arguments=further)
