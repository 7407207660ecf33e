"""The command ``compare``."""

import logging
import os
import platform
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

import salun_lightning
from salun_lightning.comparison.files import write_json, write_text
from salun_lightning.comparison.plan import Cell, Row, plan
from salun_lightning.comparison.report import METRICS, average_gap, markdown, plot, summarise


def compare(
    rows: dict[str, Row],
    out: Path,
    seeds: int | list[int],
    options: dict[str, Any],
    reference: str = "Retrain",
    noise_floor: str | None = None,
    only: str | list[str] | None = None,
    arguments: list[str] | None = None,
) -> dict[str, Any]:
    """Run methods x seeds against a paired retrained model, and report.

    Every cell (one row, one seed) is one ``fit`` command with a folder of its own. A finished cell is not run again; a killed
    one goes on from its last epoch.

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
    cells = plan(rows, seeds, options, out, arguments or [])
    wanted = {cell for cell in cells.values() if cell.row in chosen}
    wanted |= {cell.original for cell in wanted if cell.original is not None}
    started = time.perf_counter()
    _run_all([cell for cell in cells.values() if cell in wanted], reference)
    return _report(rows, cells.values(), reference, noise_floor, out, time.perf_counter() - started)


def _run_all(cells: list[Cell], reference: str) -> None:
    results: dict[tuple[str, int], dict[str, Any]] = {}
    for number, cell in enumerate(cells, start=1):
        result = cell.result
        note = "was there"
        if result is None:
            result = _run_quietly(cell)
            note = f"{result['seconds']:.1f} s"
        results[cell.row, cell.seed] = result
        figures = "  ".join(f"{name} {result['metrics'][name]:6.2f}" for name in METRICS)
        paired = results.get((reference, cell.seed))
        gap = f"  gap {average_gap(result['metrics'], paired['metrics']):5.2f}" if paired else " " * 11
        print(f"[{number:3}/{len(cells)}] {cell.row:<24} seed {cell.seed}  {figures}{gap}  {note}", flush=True)


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


def _report(
    rows: Iterable[str],
    cells: Iterable[Cell],
    reference: str,
    noise_floor: str | None,
    out: Path,
    seconds: float,
) -> dict[str, Any]:
    order = list(rows)
    cells = sorted(cells, key=lambda cell: (order.index(cell.row), cell.seed))
    results = {(cell.row, cell.seed): result for cell in cells if (result := cell.result) is not None}
    summary = summarise(results, reference)
    table = markdown(summary, results, reference, noise_floor)
    write_text(out / "table.md", table)
    report = {
        "version": salun_lightning.__version__,
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), **_versions()},
        "seconds": seconds,
        "reference": reference,
        "noise_floor": noise_floor,
        "summary": summary,
        "cells": list(results.values()),
    }
    write_json(out / "results.json", report)
    pictures = plot(summary, results, reference, noise_floor, out)
    print("\n" + table.split("\nOne row again")[0])
    print("wrote " + ", ".join(str(path) for path in (out / "table.md", out / "results.json", *pictures)))
    return report


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "torchvision", "lightning", "scikit-learn")}


def compare_command(args: list[str]) -> dict[str, Any]:
    """Parse the options of ``compare`` and run it."""
    parser = ArgumentParser(prog="train.py compare", description="Run methods x seeds against a paired retrained model.")
    parser.add_argument("-c", "--config", action="config", help="YAML file of the options below.")
    parser.add_function_arguments(compare)
    own, further = (args[: args.index("--")], args[args.index("--") + 1 :]) if "--" in args else (args, [])
    parsed = parser.parse_args(own)
    options = parser.instantiate_classes(parsed)
    options.pop("config", None)
    return compare(**{**options.as_dict(), **({"arguments": further} if further else {})})
