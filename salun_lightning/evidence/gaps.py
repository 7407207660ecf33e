"""How far the figures of two models are from each other. Imports nothing that takes time."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

METRICS = ("UA", "RA", "TA", "MIA")
"""The figures of classifiers (Fan et al., ICLR 2024), in percent."""


def finite(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """The figures that are numbers; a model that diverged has others, which JSON writes as null.

    Example:
        >>> finite({"UA": 1.0, "FID": None, "KID": float("nan")})
        {'UA': 1.0}
    """
    return {name: value for name, value in metrics.items() if value is not None and math.isfinite(value)}


def gaps(
    metrics: Mapping[str, float | None], reference: Mapping[str, float | None], names: Sequence[str] = METRICS
) -> dict[str, float]:
    """The figures of one model minus those of another, for UA, RA, TA and MIA in percentage points, where both are numbers.

    Example:
        >>> gaps({"UA": 1, "RA": 99}, {"UA": 3, "RA": 100})
        {'UA': -2, 'RA': -1}
    """
    measured, wanted = finite(metrics), finite(reference)
    return {name: measured[name] - wanted[name] for name in names if name in measured and name in wanted}


def average_gap(
    metrics: Mapping[str, float | None], reference: Mapping[str, float | None], names: Sequence[str] = METRICS
) -> float | None:
    """Mean absolute difference (Fan et al., ICLR 2024); None if a figure is missing.

    Example:
        >>> average_gap({"UA": 1, "RA": 100}, {"UA": 3, "RA": 100}, ["UA", "RA"])
        1.0
    """
    found = gaps(metrics, reference, names)
    return fmean(map(abs, found.values())) if len(found) == len(names) else None


def paired_interval(differences: Sequence[float]) -> dict[str, float]:
    """The mean of differences between pairs, and the ends of its 95 % interval (Student's t, over the pairs).

    Args:
        differences: One number for each pair, such as for each seed the gap of one method minus that of another.

    Returns:
        ``mean``, ``low``, ``high`` and ``runs``; a single pair has no ends.

    Example:
        >>> {name: round(value, 3) for name, value in paired_interval([1.0, 2.0, 3.0]).items()}
        {'mean': 2.0, 'low': -0.484, 'high': 4.484, 'runs': 3}
    """
    mean, count = fmean(differences), len(differences)
    if count < 2:
        return {"mean": mean, "runs": count}
    from scipy.special import stdtrit

    half = float(stdtrit(count - 1, 0.975)) * stdev(differences) / math.sqrt(count)
    return {"mean": mean, "low": mean - half, "high": mean + half, "runs": count}
