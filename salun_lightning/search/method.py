"""The search for the best settings of one method."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from filelock import FileLock

from salun_lightning.comparison.figures import Figures
from salun_lightning.comparison.plan import Cell, Plan, slug
from salun_lightning.comparison.rows import Row, Source
from salun_lightning.comparison.schedule import Schedule
from salun_lightning.comparison.tuned import WRITTEN, heading
from salun_lightning.configurations import beside, tuned_folder
from salun_lightning.evidence.gaps import average_gap
from salun_lightning.files import digest, set_aside, write_text
from salun_lightning.search.space import Choices, default_of, reaching, read_space, size
from salun_lightning.search.trials import WORST, Claimed, Trials

if TYPE_CHECKING:
    from optuna.storages import BaseStorage


@dataclass(frozen=True)
class Request:
    """What is to be forgotten; values that are found are for all its cases.

    Args:
        file: The configuration of it, or of the task.
        cases: The cases, by name.
    """

    file: Path
    cases: dict[str, Source | dict[str, Any]]

    @property
    def name(self) -> str:
        """How it is called in messages."""
        return ", ".join(filter(None, self.cases)) or self.file.stem


@dataclass
class Pilot:
    """What all methods are searched with.

    Args:
        plan: The original and retrained models.
        seeds: The pilot seeds.
        reference: The row of the retrained model.
        metrics: The metrics of the gap.
        threads: The number of threads each model computes with.
        trials: The budget of each method.
        command: The command, without the method.
        further: What follows ``--`` in it.
    """

    plan: Plan
    seeds: Sequence[int]
    reference: str
    metrics: list[str]
    threads: int
    trials: int
    command: str
    further: Sequence[str]
    wanted: dict[tuple[int, str], dict[str, float]] = field(default_factory=dict)
    """The metrics of the retrained models."""

    def __post_init__(self) -> None:
        self.figures = Figures(self.plan.out)


class MethodSearch:
    """The search of one method for one request.

    Args:
        method: Its name.
        row: Its row.
        file: Its configuration.
        request: What is to be forgotten.
        pilot: What all methods are searched with.
        journal: Where trials are recorded.

    Raises:
        ValueError: It has no search space, or ``fit`` does not accept its settings.
    """

    def __init__(self, method: str, row: Row, file: Path, request: Request, pilot: Pilot, journal: "BaseStorage") -> None:
        self.method, self.row, self.request, self.pilot = method, row, request, pilot
        self.name = f"{method}, {request.name}"
        self.file = tuned_folder(request.file) / f"{method}.yaml"
        self.result: dict[str, Any] | None = None
        found: Any = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("search")
        place = pilot.plan.out / "trials" / f"{slug(request.file.stem)}-{slug(method)}"
        cells = self.cells({}, place)
        values = {name.replace(".init_args", ""): value for name, value in cells[0].settings.items()}
        try:
            space = read_space(found, values)
        except ValueError as error:
            raise ValueError(f"Method '{method}': {error}") from error
        # what the trials of another day came to is only taken up if nothing has changed since
        wanted = [cell.key for cell in pilot.plan.cells if cell.row == pilot.reference and cell.case in request.cases]
        first = [{option: default_of(option, found[option], values) for option in space}]
        others = [task for task in pilot.plan.task if tuned_folder(task) != self.file.parent]
        for other in filter(None, (beside([task], f"tuned/{method}") for task in others)):  # found for the task: worth a trial
            there = yaml.safe_load(other.read_text(encoding="utf-8")) or {}
            first.append({option: there.get(option, value) for option, value in first[0].items()})
        space = reaching(space, first)
        choices = [part.values for part in space.values() if isinstance(part, Choices)]  # which Optuna wants to stay
        name = f"{self.name} {digest([[cell.key for cell in cells], wanted, found, pilot.metrics, choices])}"
        self.trials = Trials(journal, name, space, first, pilot.trials, place)

    def cells(self, options: Mapping[str, Any], folder: Path) -> list[Cell]:
        """The cells of a trial.

        Args:
            options: The settings that are tried.
            folder: Where the cells lie.
        """
        row = replace(self.row, options={**self.row.options, **options})
        return [
            self.pilot.plan.cell(self.method, row, seed, case, source, folder)
            for seed in self.pilot.seeds
            for case, source in self.request.cases.items()
        ]

    def run(self, claimed: Claimed) -> None:
        """Run a trial: its cells one after another, until it is certain that it will not be the best.

        No gap is below 0. So a trial is given up when the sum of its gaps, divided by the number of all its cells, is above
        the smallest mean that was found: the other cells cannot bring it below that. The default settings are not given up.
        """
        gaps: list[float] = []
        figures: list[dict[str, Any]] = []
        error, best, cells = None, self.trials.best, []
        try:
            cells = self.cells(claimed.options, claimed.folder)
            for cell in cells:
                schedule = Schedule([cell], self.pilot.threads, lambda *_: None)
                schedule.run()
                error = next((result["error"] for result in schedule.failed.values()), None)
                if error is not None or cell.result is None:
                    break
                metrics = self.pilot.figures.of(cell, cell.result)["metrics"]
                gap = average_gap(metrics, self.pilot.wanted[cell.run], self.pilot.metrics)
                gaps.append(WORST if gap is None else gap)
                kept = {name: metrics.get(name) for name in self.pilot.metrics}
                figures.append({"seed": cell.seed, "case": cell.case, "gap": gap, **kept})
                hopeless = best is not None and sum(gaps) / len(cells) > (best.value or 0)
                if hopeless and claimed.options != self.trials.first[0]:
                    break
        except ValueError as refused:
            error = str(refused)
        except BaseException:
            claimed.lock.release()  # whoever starts again finds it
            raise
        self.trials.end(claimed, gaps, len(cells), {"figures": figures}, error)
        self._report(claimed, gaps, len(cells), error)

    def _report(self, claimed: Claimed, gaps: list[float], of: int, error: str | None) -> None:
        if error is not None:
            outcome = f"failed: {error}"
        elif len(gaps) < of:
            outcome = f"gap {sum(gaps) / len(gaps):6.2f} of {len(gaps)}/{of}, given up"
        else:
            outcome = f"gap {sum(gaps) / of:6.2f}"
        best = self.trials.best
        smallest = "" if best is None else f"  best {best.value:6.2f}"
        settings = ", ".join(f"{option.rpartition('.')[2]} {json.dumps(value)}" for option, value in claimed.options.items())
        print(f"[{claimed.number:3}/{self.trials.budget}] {self.name:<28} {outcome}{smallest}  {settings}", flush=True)

    @property
    def summary(self) -> str:
        """What was found, in a line."""
        if self.result is None:
            return f"{self.name}: nothing was found."
        default = "-" if self.result["default"] is None else f"{self.result['default']:.2f}"
        return f"{self.name}: avg. gap {self.result['gap']:.2f}, default settings {default}; {self.result['file']}"

    def conclude(self) -> None:
        """Write the best settings to a file."""
        best, trials = self.trials.best, self.trials
        if best is None or best.value is None or best.value >= WORST:
            return
        options = best.user_attrs["options"]
        cases = [case for case in self.request.cases if case]
        words = ["--methods", self.method, "--trials", str(self.pilot.trials), "--seeds", *map(str, self.pilot.seeds)]
        words += ["--cases", *cases] if cases else []
        words += ["--", *self.pilot.further] if self.pilot.further else []
        command = f"{self.pilot.command} {shlex.join(words)}"
        # the same, whichever process writes them
        lines = heading(len(trials.counted()), self.pilot.seeds, best.value, trials.default_gap, command)
        if size(trials.space) <= self.pilot.trials:
            lines.append("# These are all settings of its search space.")
        if trials.widened:
            lines.append(f"# The range was widened, because the best lay at its end: {', '.join(trials.widened)}")
        if trials.at_edge:
            lines.append(f"# The best lies at an end of its range: {', '.join(trials.at_edge)}")
        text = "\n".join(lines) + "\n" + yaml.safe_dump(options, sort_keys=False)
        with FileLock(f"{trials.folder}.lock"):  # other processes come to the end at the same time
            before = self.file.read_text(encoding="utf-8") if self.file.is_file() else text
            if before != text and WRITTEN not in before:
                set_aside(self.file, "the search has found other values")
            if before != text or not self.file.is_file():
                write_text(self.file, text)
        self.result = {
            "method": self.method,
            "request": self.request.name,
            "trials": len(trials.counted()),
            "default": trials.default_gap,
            "gap": best.value,
            "options": options,
            "widened": trials.widened,
            "at_edge": trials.at_edge,
            "file": str(self.file),
        }
