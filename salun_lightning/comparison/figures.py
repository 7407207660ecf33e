"""The figures of cells: what a test measured, and what follows from the predictions that it recorded."""

import hashlib
from pathlib import Path
from typing import Any

import salun_lightning
from salun_lightning.comparison.plan import Cell
from salun_lightning.files import read_json

_MEASURES = Path(salun_lightning.__file__).parent / "evidence" / "measures.py"


class Figures:
    """Computes figures, and remembers them by ``results.json``.

    What that file tells of the same predictions is not computed again, so that a second start imports neither torch nor
    scikit-learn, which takes seconds.

    Args:
        out: The folder of the comparison.
    """

    def __init__(self, out: Path) -> None:
        report = read_json(out / "results.json")
        entries = [*report.get("cells", []), *report.get("first", [])]
        self._known = {entry["source"]: entry["metrics"] for entry in entries if entry.get("source")}
        self._measures = hashlib.sha256(_MEASURES.read_bytes()).hexdigest()  # another definition gives other figures

    def of(self, cell: Cell, result: dict[str, Any]) -> dict[str, Any]:
        """The result of a cell with all its figures.

        Args:
            cell: The cell.
            result: What it recorded.
        """
        if not result.get("predictions"):
            return result
        found = cell.predictions.stat()
        parts = (self._measures, str(cell.predictions.resolve()), cell.key, found.st_size, found.st_mtime_ns)
        source = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
        if source not in self._known:
            self._known[source] = {**result["metrics"], **_computed(cell, result)}
        return {**result, "metrics": self._known[source], "source": source}


def _computed(cell: Cell, result: dict[str, Any]) -> dict[str, float]:
    from salun_lightning.evidence.measures import figures, judged
    from salun_lightning.evidence.predictions import Predictions

    predictions = Predictions.load(cell.predictions)
    names = result["class_names"]
    forgotten = [names.index(name) for name in result["forgotten_classes"]]
    return {**figures(predictions), **judged(predictions, forgotten, names)}
