"""The command ``compare``."""

import logging
import os
import platform
import time
import warnings
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

import salun_lightning
from salun_lightning.cli import program
from salun_lightning.comparison.plan import Cell, Plan, Row
from salun_lightning.comparison.plots import plot, plot_samples
from salun_lightning.comparison.report import METRICS, Table, average_gap, markdown, summarise
from salun_lightning.files import write_json, write_text


def compare(
    rows: dict[str, Row],
    out: Path,
    seeds: int | list[int],
    options: dict[str, Any],
    reference: str = "Retrain",
    noise_floor: str | None = None,
    only: str | list[str] | None = None,
    arguments: list[str] | None = None,
    cases: dict[str, dict[str, Any]] | None = None,
    first: dict[str, Row] | None = None,
    metrics: list[str] | None = None,
    gap: bool = True,
) -> dict[str, Any]:
    """Run methods x seeds against a paired retrained model, and report.

    Every cell (one row, one seed, one case) is one ``fit`` command with a folder of its own. A finished cell is not run again;
    a killed one goes on from its last epoch.

    Args:
        rows: The rows of the table by name, each a configuration of ``fit`` with overrides. Rows that start from an original
            model need a row called ``original``.
        out: Folder of the comparison.
        seeds: One or several seeds.
        options: Options of ``fit`` for every row; ``{seed}`` stands for the seed, ``{other_seed}`` for another one.
        reference: The row that gaps are measured against: the retrained model.
        noise_floor: The row that repeats the reference with another seed.
        only: Run only these rows (and the original models they start from); the table shows all that is there.
        arguments: Further arguments of ``fit`` for every row; on the command line, all that follows ``--``.
        cases: What each seed is repeated for, such as the class to forget: options of ``fit`` by name. The original model of a
            seed is trained once, and tested in each case.
        first: Models that are trained once before all else, such as the classifier that judges images, each a configuration of
            ``fit``. In the options ``{name}`` stands for the checkpoint.
        metrics: The columns of the table, as ``test`` names them; by default UA, RA, TA and MIA.
        gap: Whether the mean absolute difference of these to the reference is a column.

    Returns:
        What was written to ``results.json``.

    Raises:
        ValueError: ``only``, ``reference`` or ``noise_floor`` name no row.
    """
    seeds = [seeds] if isinstance(seeds, int) else seeds
    known = {name.lower(): name for name in rows}
    asked = list(rows) if only is None else [only] if isinstance(only, str) else only
    for name in (*asked, reference, noise_floor or reference):
        if name.lower() not in known:
            raise ValueError(f"There is no row '{name}'. The rows are: {', '.join(rows)}.")
    chosen = {known[name.lower()] for name in asked}
    plan = Plan(out, options, arguments or [])
    plan.add_first(first or {})
    plan.add(rows, seeds, cases or {})
    wanted = {cell for cell in plan.cells if cell.row in chosen}
    wanted |= {needed for cell in wanted for needed in (cell.original, cell.trained) if needed is not None}
    table = Table(reference, noise_floor, metrics or list(METRICS), gap)
    started = time.perf_counter()
    _run_all([*plan.first, *(cell for cell in plan.cells if cell in wanted)], table)
    return _report(list(rows), plan, table, time.perf_counter() - started)


def _run_all(cells: list[Cell], table: Table) -> None:
    results: dict[Any, dict[str, Any]] = {}
    for number, cell in enumerate(cells, start=1):
        result = cell.result
        note = "was there"
        if result is None:
            result = _run_quietly(cell)
            note = f"{result['seconds']:.1f} s" if cell.trained is None else "tested"
        results[cell.row, cell.run] = result
        measured = result["metrics"]
        figures = "  ".join(f"{name} {measured[name]:6.2f}" for name in table.metrics if name in measured)
        paired = results.get((table.reference, cell.run))
        distance = average_gap(measured, paired["metrics"], table.metrics) if paired and table.gap else None
        gap = "" if distance is None else f"  gap {distance:5.2f}"
        where = f"seed {cell.seed}" + (f", {cell.case}" if cell.case else "")
        print(f"[{number:3}/{len(cells)}] {cell.row:<24} {where}  {figures}{gap}  {note}", flush=True)


def _run_quietly(cell: Cell) -> dict[str, Any]:
    """Lightning describes each run at length; a comparison has many, and reports on them itself."""
    from salun_lightning.comparison.cells import run

    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning.*")
            return run(cell)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _report(order: list[str], plan: Plan, table: Table, seconds: float) -> dict[str, Any]:
    cells = sorted(plan.cells, key=lambda cell: order.index(cell.row))
    results = {(cell.row, cell.run): result for cell in cells if (result := cell.result) is not None}
    first = {cell.row: result for cell in plan.first if (result := cell.result) is not None}
    summary = summarise(results, table)
    text = markdown(summary, results, table, first)
    write_text(plan.out / "table.md", text)
    report = {
        "version": salun_lightning.__version__,
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), **_versions()},
        "seconds": seconds,
        "reference": table.reference,
        "noise_floor": table.noise_floor,
        "first": list(first.values()),
        "summary": summary,
        "cells": list(results.values()),
    }
    write_json(plan.out / "results.json", report)
    pictures = plot(summary, results, table, plan.out)
    pictures += plot_samples([cell for cell in cells if (cell.row, cell.run) in results], plan.out)
    print("\n" + text.split("\nOne row again")[0])
    print("wrote " + ", ".join(str(path) for path in (plan.out / "table.md", plan.out / "results.json", *pictures)))
    return report


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "torchvision", "lightning", "scikit-learn")}


def compare_command(args: list[str]) -> dict[str, Any]:
    """Parse the options of ``compare`` and run it."""
    parser = ArgumentParser(
        prog=f"{program()} compare",
        description="Run methods x seeds against a paired retrained model.",
        exit_on_error=False,  # whoever called says what is wrong
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file of the options below.")
    parser.add_function_arguments(compare)
    own, further = (args[: args.index("--")], args[args.index("--") + 1 :]) if "--" in args else (args, [])
    parsed = parser.parse_args(own)
    options = parser.instantiate_classes(parsed)
    options.pop("config", None)
    return compare(**{**options.as_dict(), **({"arguments": further} if further else {})})
