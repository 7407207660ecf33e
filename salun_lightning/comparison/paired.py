"""The gaps of a comparison, run by run: of methods to the retrained model, and of retrained models to each other."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from statistics import fmean
from typing import Any

from salun_lightning.evidence.gaps import METRICS, average_gap, paired_interval

Results = Mapping[tuple[str, Any], dict[str, Any]]
"""What each cell measured, by row and run (seed and case)."""


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


def gaps_by_run(results: Results, table: Table) -> dict[str, dict[Any, list[float]]]:
    """The average gaps of each row in each run: one, or that of each two models of the noise floor.

    They are measured to the reference; the noise floor is how far the models are from each other that were retrained for the
    same run, the reference among them. Empty if the table has no gap.
    """
    found: dict[str, dict[Any, list[float]]] = {}
    for (row, run), result in results.items():
        paired = results.get((table.reference, run))
        if paired is not None and row not in table.noise_floor:
            found.setdefault(row, {})[run] = _gap(result, paired, table)
    for run, pairs in retrained_pairs(results, table).items():
        for floor in table.noise_floor[:1] if pairs else ():
            found.setdefault(floor, {})[run] = [gap for pair in pairs for gap in _gap(*pair, table)]
    return {row: {run: gaps for run, gaps in of_row.items() if gaps} for row, of_row in found.items()}


def retrained_pairs(results: Results, table: Table) -> dict[Any, list[tuple[dict[str, Any], dict[str, Any]]]]:
    """For each run, what each two models measured that were retrained for it."""
    retrained: dict[Any, list[dict[str, Any]]] = {}
    for (row, run), result in results.items():
        if row in (table.reference, *table.noise_floor):
            retrained.setdefault(run, []).append(result)
    return {run: [*combinations(models, 2)] for run, models in retrained.items()}


def _gap(one: Mapping[str, Any], other: Mapping[str, Any], table: Table) -> list[float]:
    """The average gap of two models, if it is asked for and they have one."""
    gap = average_gap(one["metrics"], other["metrics"], table.metrics) if table.gap else None
    return [] if gap is None else [gap]


def best_row(results: Results, table: Table) -> str | None:
    """The row with the smallest average gap, of those that were measured in all runs of the reference."""
    gaps = {row: of_row for row, of_row in gaps_by_run(results, table).items() if row not in table.noise_floor}
    runs = gaps.pop(table.reference, {}).keys()
    whole = {row: of_row for row, of_row in gaps.items() if of_row and of_row.keys() >= runs}
    means = {row: fmean(gap for found in of_row.values() for gap in found) for row, of_row in whole.items()}
    return min(means, key=means.__getitem__, default=None)


def above(results: Results, table: Table, other: str | None) -> dict[str, dict[str, float]]:
    """How much larger the gap of each row is than that of another row, or than the noise floor, in the same run.

    The cases of a seed are no runs of their own: what is compared is their mean.

    Returns:
        For each row that has runs in common with the other one, the interval of
        :func:`~salun_lightning.evidence.gaps.paired_interval` over the seeds. Empty if the other row has no gap.
    """
    means = {row: {run: fmean(gaps) for run, gaps in of_row.items()} for row, of_row in gaps_by_run(results, table).items()}
    beside = means.get(other or "", {})
    seeds = {(row, run): result["seed"] for (row, run), result in results.items()}
    found: dict[str, dict[str, float]] = {}
    for row, of_row in means.items():
        by_seed: dict[int, list[float]] = {}
        for run in of_row.keys() & beside.keys():
            by_seed.setdefault(seeds[row, run], []).append(of_row[run] - beside[run])
        if by_seed and row not in (other, table.reference, *table.noise_floor):
            found[row] = paired_interval([fmean(of_seed) for of_seed in by_seed.values()])
    return found
