"""A process that runs cells in silence, beside the one that was called. That one tells of all of them."""

import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import DEVNULL, Popen
from threading import Thread

from salun_lightning.comparison.plan import Cell
from salun_lightning.comparison.schedule import Schedule


@contextmanager
def helpers(count: int, cells: list[Cell], threads: int) -> Iterator[None]:
    """Further processes that run cells, as long as there are any. What fails in one is run again by this process.

    Args:
        count: How many.
        cells: The cells.
        threads: The number of threads that a cell computes with.
    """
    running: list[Popen[bytes]] = []
    places = os.pathsep.join(place for place in sys.path if place)
    try:
        for _ in range(count if len(cells) > 1 else 0):
            with tempfile.TemporaryFile() as work:  # not a pipe: nobody waits for a process that does not read it
                work.write(pickle.dumps((os.getpid(), cells, threads)))
                work.seek(0)
                command, environment = [sys.executable, "-m", __name__], {**os.environ, "PYTHONPATH": places}
                running.append(Popen(command, stdin=work, stdout=DEVNULL, stderr=DEVNULL, env=environment))
        yield
    finally:
        for helper in running:  # if all went well, there is nothing left for them
            helper.terminate()
        for helper in running:
            helper.wait()


def main() -> None:
    """Run the cells that the process that started this one has written."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # that process is told, too, and ends this one
    parent, cells, threads = pickle.load(sys.stdin.buffer)
    Thread(target=_end_with, args=(parent,), daemon=True).start()
    Schedule(cells, threads, lambda *_: None).run()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
