"""What stands above the values that a search has found: written there, and read by comparisons."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

WRITTEN = "# Written by: "
_SEEDS = re.compile(r"^# .* pilot seeds? ([\d, ]+):", flags=re.MULTILINE)


def heading(trials: int, seeds: Sequence[int], gap: float, default: float | None, command: str) -> list[str]:
    r"""The first lines of the file.

    Args:
        trials: How many settings were tried.
        seeds: The pilot seeds.
        gap: What the best of them came to.
        default: And the default settings.
        command: What found them.

    Example:
        >>> print(*heading(20, [100, 101], 4.231, None, "search -c digits --methods ssd"), sep="\n")
        # Smallest avg. gap of 20 trials, pilot seeds 100, 101: 4.23
        # Written by: search -c digits --methods ssd
    """
    plural, beside = "s" * (len(seeds) > 1), "" if default is None else f"; default settings: {default:.2f}"
    found = f"# Smallest avg. gap of {trials} trials, pilot seed{plural} {', '.join(map(str, seeds))}: {gap:.2f}{beside}"
    return [found, WRITTEN + command]


def check_seed(seed: int, files: Iterable[Path]) -> None:
    """Refuse a seed that such files were searched with: it would flatter.

    Raises:
        ValueError: It is one of those.
    """
    for file in files:
        pilots = _SEEDS.search(file.read_text(encoding="utf-8"))
        if pilots and str(seed) in pilots[1].split(", "):
            raise ValueError(
                f"Seed {seed} is one of those that the values of '{file}' were searched with: its figures would flatter. Give"
                " other seeds, or 'tuned: false'."
            )
