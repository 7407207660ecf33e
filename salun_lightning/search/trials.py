"""The trials of one method, kept in a journal that any number of processes share."""

import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from salun_lightning.files import digest
from salun_lightning.search.space import Range, Space, grid, planned, size, spread, wider

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial, Trial

WORST = 100.0
"""The avg. gap of a model that diverged, and of settings that are refused: there is none larger."""


def open_journal(path: Path) -> "optuna.storages.BaseStorage":
    """The journal of all trials.

    It is locked like the cells of a comparison, by the operating system: what a process held that was killed is free.

    Args:
        path: The file.

    Raises:
        ModuleNotFoundError: Optuna is not installed.
    """
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("'search' needs Optuna. Install it: pip install 'salun_lightning[search]'.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock")
    with lock:
        _mend(path)
    return optuna.storages.JournalStorage(JournalFileBackend(str(path), lock_obj=lock))  # type: ignore[arg-type]  # it has what is called


def _mend(path: Path) -> None:
    """Take away half a line, which a machine that lost its power may leave: the next one would be appended to it."""
    if path.is_file():
        content = path.read_bytes()
        whole = content.rpartition(b"\n")
        if whole[2]:
            path.write_bytes(whole[0] + whole[1])


@dataclass
class Claimed:
    """A trial that this process runs.

    Attributes:
        trial: Optuna's.
        number: Which one it is of those that count, from 1.
        options: The settings that are tried.
        folder: Where its cells lie.
        lock: Held while it is run.
    """

    trial: "Trial"
    number: int
    options: dict[str, Any]
    folder: Path
    lock: FileLock


@dataclass
class Trials:
    """The trials of one method.

    Which settings come next depends on nothing but the settings and results that are there: first those of ``first``; then, up
    to half of the budget, settings that are spread evenly; then Optuna's TPE sampler, seeded with the name and the number of
    the trial. A space that has no more settings than the budget is tried out.

    After half of the budget, a range whose best value lies at one of its ends is widened there, once. That is paid from the
    same budget, so every method has the same.

    Args:
        journal: From :func:`open_journal`.
        name: The name of the method and request, with a digest of all that determines the results.
        space: What is tried.
        first: The settings that are tried first: the default ones, and others that are known.
        budget: The number of trials.
        folder: Where those that run lie.
    """

    journal: "optuna.storages.BaseStorage"
    name: str
    space: Space
    first: list[dict[str, Any]]
    budget: int
    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.folder}.lock"):
            self._drop_dead()
            if not self.running():  # no process is at it: what failed before is tried again
                failed = [trial.number for trial in self._all() if "error" in trial.user_attrs]
                self.study.set_user_attr("forgiven", failed)
        self.budget = int(min(self.budget, size(self.space)))

    @cached_property
    def study(self) -> "optuna.Study":
        """Optuna's study."""
        import optuna

        return optuna.create_study(storage=self.journal, study_name=self.name, load_if_exists=True)

    def _all(self) -> "list[FrozenTrial]":
        return self.study.get_trials(deepcopy=False)

    def counted(self) -> "list[FrozenTrial]":
        """The trials that count: those that came to an end, or are being run."""
        return self._begun(again=False)

    def _begun(self, again: bool) -> "list[FrozenTrial]":
        """The trials that have settings: those that count, or those whose settings are to be tried again."""
        forgiven = self.study.user_attrs.get("forgiven", [])
        begun = (trial for trial in self._all() if "options" in trial.user_attrs)
        return [trial for trial in begun if (trial.state.name == "FAIL" or trial.number in forgiven) == again]

    def running(self) -> "list[FrozenTrial]":
        """The trials that some process runs."""
        return [trial for trial in self.counted() if trial.state.name == "RUNNING"]

    @property
    def finished(self) -> bool:
        """Whether all trials have come to an end; also if there is no sense in trying more, because the default ones fail."""
        return not self.running() and (len(self.counted()) >= self.budget or self.error is not None)

    @property
    def error(self) -> str | None:
        """Why the default settings failed, if they did."""
        first = [trial for trial in self.counted() if trial.user_attrs["options"] == self.first[0]]
        return first[-1].user_attrs.get("error") if first else None

    @property
    def best(self) -> "FrozenTrial | None":
        """The trial with the smallest gap."""
        complete = [trial for trial in self.counted() if trial.state.name == "COMPLETE" and "error" not in trial.user_attrs]
        return min(complete, key=lambda trial: float(trial.value or 0), default=None)

    @property
    def default_gap(self) -> float | None:
        """The gap of the default settings."""
        gaps = [trial.value for trial in self.counted() if trial.user_attrs["options"] == self.first[0]]
        return gaps[-1] if gaps else None

    @property
    def at_edge(self) -> list[str]:
        """The options whose best value lies at an end of their range that could be widened."""
        best = self.best
        return [] if best is None else [*wider(self.space_now, best.user_attrs["options"])]

    @property
    def widened(self) -> list[str]:
        """The options whose range was widened."""
        return [option for option in self.space if self.space_now[option] != self.space[option]]

    @property
    def space_now(self) -> Space:
        """The space, with the ranges that were widened."""
        return {**self.space, **{name: Range(**ends) for name, ends in self.study.user_attrs.get("ranges", {}).items()}}

    def claim(self) -> Claimed | None:
        """A trial for this process; None if no more are to be started.

        Trials whose process was killed are started again.
        """
        with FileLock(f"{self.folder}.lock"):  # one process after another decides
            self._drop_dead()
            counted = self.counted()
            if len(counted) >= self.budget or self.error is not None:
                return None
            if 2 * len(counted) >= self.budget:
                self._widen()
            trial, options = self._next(counted)
            place = self._place(options)
            lock = FileLock(f"{place}.lock")
            lock.acquire()
            trial.set_user_attr("options", options)
            return Claimed(trial, len(counted) + 1, options, place, lock)

    def wait(self) -> None:
        """Wait for the end of a trial that another process runs."""
        for trial in self.running()[:1]:
            with FileLock(f"{self._place(trial.user_attrs['options'])}.lock"):
                pass

    def end(self, claimed: Claimed, gaps: list[float], of: int, facts: Mapping[str, Any], error: str | None = None) -> None:
        """Record what a trial came to, and remove its cells.

        Args:
            claimed: The trial.
            gaps: The gap of each cell that was run.
            of: The number of cells that belong to it; with fewer gaps, it was given up.
            facts: What is kept beside the gap.
            error: Why it failed, if it did.
        """
        from optuna.trial import TrialState

        for name, value in {**facts, **({} if error is None else {"error": error})}.items():
            claimed.trial.set_user_attr(name, value)
        if error is not None:
            self.study.tell(claimed.trial, WORST)  # so that what is refused is not tried again
        elif len(gaps) < of:
            claimed.trial.report(sum(gaps) / len(gaps), len(gaps))
            self.study.tell(claimed.trial, state=TrialState.PRUNED)
        else:
            self.study.tell(claimed.trial, sum(gaps) / of)
        if error is None:  # else somebody wants to read what is there
            shutil.rmtree(claimed.folder, ignore_errors=True)
        Path(claimed.lock.lock_file).unlink(missing_ok=True)
        claimed.lock.release()

    def _drop_dead(self) -> None:
        """Mark the trials whose process is no more."""
        for trial in self._all():
            place = self._place(trial.user_attrs["options"]) if "options" in trial.user_attrs else None
            if trial.state.name == "RUNNING" and (place is None or _is_free(place)):
                self._void(trial.number)

    def _next(self, counted: "list[FrozenTrial]") -> "tuple[Trial, dict[str, Any]]":
        """A new trial, and the settings it is to try."""
        tried = [trial.user_attrs["options"] for trial in counted]
        void = [trial.user_attrs["options"] for trial in self._begun(again=True)]
        even = planned(self.space, self.budget) if size(self.space) <= self.budget or 2 * len(counted) < self.budget else []
        for options in (*void, *self.first, *even):
            if options not in tried:
                return self._fixed(options), options
        space, random = self.space_now, Random(f"{self.name} {len(counted)}")
        self.study.sampler = _sampler(random.getrandbits(32))
        trial = self.study.ask({option: part.distribution() for option, part in space.items()})
        options = {option: part.sampled(trial.params[option]) for option, part in space.items()}
        if options not in tried:
            return trial, options
        self._void(trial)
        others = grid(space) if size(space) <= 10_000 else (spread(space, len(counted) + extra) for extra in range(100))
        options = random.choice([other for other in others if other not in tried])
        return self._fixed(options), options

    def _fixed(self, options: Mapping[str, Any]) -> "Trial":
        """A trial of these settings, for Optuna to learn from."""
        space = self.space_now
        drawn = {option: part.drawn(options[option]) for option, part in space.items()}
        self.study.enqueue_trial(drawn)
        while (trial := self.study.ask({option: part.distribution() for option, part in space.items()})).params != drawn:
            self._void(trial)  # a process was killed before it took what it had put there
        return trial

    def _void(self, trial: "Trial | int") -> None:
        from optuna.trial import TrialState

        self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)  # its process may have been faster

    def _widen(self) -> None:
        best, known = self.best, dict(self.study.user_attrs.get("ranges", {}))
        if best is not None and size(self.space) > self.budget:
            ranges = {**wider(self.space, best.user_attrs["options"]), **known}
            if ranges != known:
                self.study.set_user_attr("ranges", ranges)

    def _place(self, options: Mapping[str, Any]) -> Path:
        return self.folder / digest(options)


def _is_free(place: Path) -> bool:
    """Whether no process runs the trial of a place."""
    try:
        held = FileLock(f"{place}.lock").acquire(blocking=False)
    except Timeout:
        return False
    held.lock.release()
    return True


def _sampler(seed: int) -> "optuna.samplers.BaseSampler":
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="optuna.*")  # of what is called experimental in older versions
        from optuna.samplers import TPESampler

        return TPESampler(n_startup_trials=1, multivariate=True, constant_liar=True, seed=seed)
