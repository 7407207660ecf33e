"""Runs the cells of a comparison one after another, beside other processes that do the same."""

import logging
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from filelock import FileLock, Timeout

from salun_lightning.comparison.plan import Cell
from salun_lightning.files import set_aside, write_text
from salun_lightning.sentences import sentence

Report = Callable[[Cell, dict[str, Any], str], None]


class CellsFailed(RuntimeError):
    """Some cells of a comparison failed; the others were run and reported."""


class Schedule:
    """Runs cells, each once in all processes that share the folder.

    A cell that fails does not stop the others. A cell that another process runs at the moment is left for later; when nothing
    else is left, this process waits for it.

    Args:
        cells: The cells, those that others need before those.
        threads: The number of threads that a cell computes with.
        report: Called with each cell, its result and a note as soon as it is known.
    """

    def __init__(self, cells: Sequence[Cell], threads: int, report: Report) -> None:
        self.cells = list(cells)
        self.threads = threads
        self.report = report
        self._started = time.time()
        self.failed: dict[Cell, dict[str, Any]] = {}
        """What is known of the cells that failed, or that need one that did."""

    def run(self) -> None:
        """Run all cells to their end."""
        pending = self.cells
        while pending:
            left: list[Cell] = []
            for cell in pending:
                if not any(needed in left for needed in cell.needed) and self._end(cell):
                    continue
                left.append(cell)
            if left == pending:
                running = next((needed for needed in left[0].needed if needed.result is None), left[0])
                print(f"waiting for another process, which runs '{running.name}'", flush=True)
                with _lock(running):
                    pass
            pending = left
        self.failed = {cell: result for cell, result in self.failed.items() if cell.result is None}  # others may have done it

    def _end(self, cell: Cell) -> bool:
        """Whether the cell has come to its end, here or in another process."""
        result, note = cell.result, ""
        if result is None:
            at_hand = all([self._at_hand(needed) for needed in cell.needed])
            without = [needed for needed in cell.needed if needed in self.failed]
            if without:
                self._fail(cell, f"needs '{without[0].name}', which failed")
                return True
            if not at_hand:
                return False
            try:
                held = _lock(cell).acquire(blocking=False)
            except Timeout:
                return False
            with held:
                result = cell.result  # another process may have been faster
                if result is None:
                    result, note = self._run(cell)
        if result is not None:
            self.report(cell, result, note or self._whence(cell))
        return True

    def _whence(self, cell: Cell) -> str:
        """Where the result of a cell comes from that was not run here."""
        made = (cell.folder / "result.json").stat().st_mtime
        return "was there" if made < self._started else "run by another process"

    def _at_hand(self, needed: Cell) -> bool:
        """Whether the checkpoint of a cell that was run can be read. A damaged one is set aside and trained again."""
        from salun_lightning.comparison.cells import fault

        if needed in self.failed or needed.result is None:
            return False
        if fault(needed.checkpoint) is None:
            return True
        try:
            held = _lock(needed).acquire(blocking=False)
        except Timeout:
            return False
        with held:
            why = fault(needed.checkpoint)  # another process may have been faster
            if why is not None and needed.result is not None:
                set_aside(needed.folder / "result.json", f"of its checkpoint: {why}")
        return self._end(needed)

    def _run(self, cell: Cell) -> tuple[dict[str, Any] | None, str]:
        try:
            result = _run_quietly(cell, self.threads)
        except Exception as error:
            write_text(cell.folder / "error.txt", traceback.format_exc())
            parsed = "Does not validate" in str(error)  # the parser says it at length
            said = sentence(error, ["fit"]) if parsed else " ".join(str(error).split()) or type(error).__name__
            self._fail(cell, said.rstrip("."))
            return None, ""
        (cell.folder / "error.txt").unlink(missing_ok=True)
        return result, f"{result['seconds']:.1f} s" if cell.trained is None else "tested"

    def _fail(self, cell: Cell, error: str) -> None:
        facts = {"row": cell.row, "seed": cell.seed, "case": cell.case, "command": cell.command}
        self.failed[cell] = {**facts, "state": "failed", "error": error, "metrics": {}}
        self.report(cell, self.failed[cell], f"failed: {error}")


def _lock(cell: Cell) -> FileLock:
    """The lock of a cell lies beside its folder, which may be set aside."""
    cell.folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{cell.folder}.lock")


def _run_quietly(cell: Cell, threads: int) -> dict[str, Any]:
    """Lightning describes each run at length; a comparison has many, and reports on them itself."""
    import torch

    from salun_lightning.comparison.cells import run

    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels, others = [logger.level for logger in loggers], torch.get_num_threads()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    torch.set_num_threads(threads)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning.*")
            return run(cell)
    finally:
        torch.set_num_threads(others)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
