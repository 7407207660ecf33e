"""The command ``compare``."""

import os
import platform
import time
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

import salun_lightning
from salun_lightning.cli import program
from salun_lightning.comparison.figures import Figures
from salun_lightning.comparison.helper import helpers
from salun_lightning.comparison.paired import Results, Table
from salun_lightning.comparison.plan import Cell, Plan
from salun_lightning.comparison.plots import plot, plot_samples
from salun_lightning.comparison.report import markdown, summarise
from salun_lightning.comparison.rows import ConfigFile, Row, Source, all_rows, row_called, row_of
from salun_lightning.comparison.schedule import CellsFailed, Schedule
from salun_lightning.configurations import located
from salun_lightning.evidence.gaps import METRICS, average_gap, finite
from salun_lightning.files import as_json, read_json, write_text


def compare(
    rows: dict[str, Source],
    out: Path,
    seeds: int | list[int],
    task: ConfigFile | list[ConfigFile] | None = None,
    options: dict[str, Any] | None = None,
    reference: str = "Retrain",
    noise_floor: bool | int = 0,
    only: str | list[str] | None = None,
    only_cases: str | list[str] | None = None,
    arguments: list[str] | None = None,
    cases: dict[str, ConfigFile | list[ConfigFile] | Row | dict[str, Any]] | None = None,
    first: dict[str, Source] | None = None,
    metrics: list[str] | None = None,
    gap: bool = True,
    threads: int = 1,
    workers: int = 1,
    tuned: bool = False,
) -> dict[str, Any]:
    """Run methods x seeds against a paired retrained model, and report.

    Every cell (one row, one seed, one case) is one ``fit`` command with a folder of its own. A finished cell is not run again
    unless its settings, or what its files hold, have changed; a killed one goes on from its last epoch; one that fails does not
    stop the others. Several processes may share the work: each takes the cells that no other one runs.

    Args:
        rows: The rows of the table by name, each a configuration of ``fit``, a list of them, or both with options (``config``,
            ``options``). A configuration is a path, relative to the file that names it, or the name of one that ships. Rows
            that start from an original model need a row called ``original``.
        out: Folder of the comparison; on the command line ``runs/compare/`` and the name of the configuration.
        seeds: One or several seeds.
        task: The configuration, or several, that every row begins with.
        options: Options of ``fit`` for every row; ``{seed}`` stands for the seed, ``{seed+1000}`` for another one.
        reference: The row that gaps are measured against: the retrained model. Unless ``seed_everything`` is among the options
            it has a seed of its own, ``{seed+1000}``: it shall not share the initial weights of the original.
        noise_floor: How many more models are retrained, with seeds of their own. They become one row of the table: how far
            retrained models are from each other.
        only: Run only these rows (and the original models they start from); the table shows all that is there.
        only_cases: Likewise, only these cases.
        arguments: Further arguments of ``fit`` for every row; on the command line, all that follows ``--``.
        cases: What each seed is repeated for, such as the class to forget: configurations or options of ``fit`` by name. The
            original model of a seed is trained once, and tested in each case.
        first: Models that are trained once before all else, such as the classifier that judges images, each given like a row
            (without the task). In the options ``{name}`` stands for the checkpoint.
        metrics: The columns of the table, as ``test`` names them; by default UA, RA, TA and MIA.
        gap: Whether the mean absolute difference of these to the reference is a column.
        threads: The number of threads each cell computes with. Tiny networks are fastest with one.
        workers: How many cells are run at a time, each in a process of its own.
        tuned: Whether each row also takes what a search has found for its method and task, ``<task>/tuned/<method>``, where
            that is there. A case whose request has files of its own, such as ``digits/one_class/tuned/salun``, takes those.

    Returns:
        What was written to ``results.json``.

    Raises:
        ValueError: A name, a number or an option is not known or not possible. A finished table stays as it is.
        CellsFailed: Some cells failed. The others were run and reported.
    """
    if noise_floor < 0:
        raise ValueError(f"'noise_floor' is {noise_floor}. Give the number of further retrained models, or 0.")
    seeds, options = _listed(seeds), options or {}
    everything, reference, floor = all_rows(rows, reference, int(noise_floor), options)
    asked = list(everything) if only is None else _listed(only)
    asked_cases = [*(cases or {"": Row()})] if only_cases is None else _listed(only_cases)
    metrics = list(METRICS) if metrics is None else metrics
    for name, values in {"seeds": seeds, "only": asked, "only_cases": asked_cases, "metrics": metrics}.items():
        if not values or len(set(values)) < len(values):
            raise ValueError(f"'{name}' is {values}. Name at least one, and each only once.")
    for name, number in {"threads": threads, "workers": workers}.items():
        if number < 1:
            raise ValueError(f"'{name}' is {number}. A comparison needs at least one.")
    chosen = {row_called(name, everything) for name in asked}
    chosen_cases = {row_called(str(name), [str(case) for case in cases or [""]], "case") for name in asked_cases}
    plan = Plan(out, options, arguments or [], row_of(task or []).files, tuned)
    plan.add_first({name: row_of(model) for name, model in (first or {}).items()})
    plan.add(everything, seeds, cases or {})
    plan.reader.save()
    wanted = {cell for cell in plan.cells if cell.row in chosen and cell.case in chosen_cases}
    wanted |= {needed for cell in wanted for needed in cell.needed}
    table = Table(reference, floor, metrics, gap)
    started = time.perf_counter()
    cells = [*plan.first, *(cell for cell in plan.cells if cell in wanted)]
    figures = Figures(out)
    with helpers(workers - 1, cells, threads):
        failed = _run_all(cells, plan.first, table, threads, figures)
    report = _report(list(everything), plan, table, failed, figures, time.perf_counter() - started)
    if failed:
        raise CellsFailed(
            f"{len(failed)} of {len(cells)} cells failed. "
            + " ".join(f"{cell.name}: {result['error']}." for cell, result in failed.items())
            + " The same command runs them again; 'error.txt' in the folder of a cell tells where it failed."
        )
    return report


def _listed(values: Any) -> list[Any]:
    return values if isinstance(values, list) else [values]


def _run_all(cells: list[Cell], first: list[Cell], table: Table, threads: int, figures: Figures) -> dict[Cell, dict[str, Any]]:
    """Run the cells and print a line of each; returns what is known of those that failed."""
    results: dict[Any, dict[str, Any]] = {}

    def report(cell: Cell, result: dict[str, Any], note: str) -> None:
        result = figures.of(cell, result)
        measured = finite(result["metrics"])
        unknown = [name for name in table.metrics if name not in result["metrics"]]
        if unknown and result["metrics"] and not results and cell not in first:
            names = ", ".join(sorted(result["metrics"]))
            raise ValueError(f"No row measures {' and '.join(unknown)}. 'metrics' may name: {names}.")
        if cell not in first and result["metrics"]:
            results[cell.row, cell.run] = result
        columns = "  ".join(f"{name} {measured[name]:6.2f}" for name in table.metrics if name in measured)
        paired = results.get((table.reference, cell.run))
        distance = average_gap(measured, paired["metrics"], table.metrics) if paired and table.gap else None
        gap = "" if distance is None else f"  gap {distance:5.2f}"
        where = f"seed {cell.seed}" + (f", {cell.case}" if cell.case else "")
        state = "  diverged" if result["state"] == "diverged" else ""
        number = f"[{cells.index(cell) + 1:3}/{len(cells)}]"
        print(f"{number} {cell.row:<24} {where}  {columns}{gap}{state}  {note}", flush=True)

    schedule = Schedule(cells, threads, report)
    schedule.run()
    return schedule.failed


def _report(
    order: list[str], plan: Plan, table: Table, failed: dict[Cell, dict[str, Any]], figures: Figures, seconds: float
) -> dict[str, Any]:
    cells = sorted(plan.cells, key=lambda cell: order.index(cell.row))
    found = {
        cell: {**figures.of(cell, result), "command": cell.command}
        for cell in (*plan.first, *cells)
        if (result := cell.result or failed.get(cell)) is not None
    }
    results: Results = {(cell.row, cell.run): found[cell] for cell in cells if cell in found}
    first = {cell.row: found[cell] for cell in plan.first if cell in found}
    summary = summarise(results, table)
    report = {
        "version": salun_lightning.__version__,
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), **_versions()},
        "threads": sorted({result["threads"] for result in results.values() if "threads" in result}),
        "seconds": seconds,
        "reference": table.reference,
        "noise_floor": table.noise_floor,
        "first": list(first.values()),
        "summary": summary,
        "cells": list(results.values()),
    }
    if not any(of_row for of_row in summary.values()):  # a finished table is worth more
        return report
    text = markdown(summary, results, table, first)
    paths = [plan.out / "table.md", plan.out / "results.json"]
    before = read_json(paths[1])
    write_text(paths[0], text)
    write_text(paths[1], as_json(report))
    drawn = [plan.out / "report.html", plan.out / "comparison.png"]
    if as_json({**before, "seconds": 0}) != as_json({**report, "seconds": 0}) or not all(path.is_file() for path in drawn):
        from salun_lightning.comparison.page import write_page

        finished = [cell for cell in cells if cell.result is not None]
        samples = plot_samples(finished, plan.out)
        paths += [*plot(summary, results, table, plan.out), *samples]
        paths.append(write_page(drawn[0], summary, results, table, finished, first, samples))
    print("\n" + text.split("\nOne row again")[0])
    print("wrote " + ", ".join(map(str, paths)))
    print(f"The page to look at: {drawn[0]}")
    return report


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "torchvision", "lightning", "scikit-learn")}


def compare_command(args: list[str]) -> dict[str, Any]:
    """Parse the options of ``compare`` and run it."""
    return compare(**parsed_comparison(args))


def parsed_comparison(args: list[str]) -> dict[str, Any]:
    """What the options of ``compare`` on a command line come to: the arguments of :func:`compare`."""
    parser = ArgumentParser(
        prog=f"{program()} compare",
        description="Run methods x seeds against a paired retrained model.",
        exit_on_error=False,  # whoever called says what is wrong
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file of the options below.")
    parser.add_function_arguments(compare)
    own, further = (args[: args.index("--")], args[args.index("--") + 1 :]) if "--" in args else (args, [])
    own, files = located(own, "compare")
    if files:
        own = ["--out", str(Path("runs", "compare", files[-1].stem)), *own]
    parsed = parser.parse_args(own)
    options = parser.instantiate_classes(parsed)
    options.pop("config", None)
    return {**options.as_dict(), **({"arguments": further} if further else {})}
