"""The trials of a method: which settings come next, and what becomes of those whose process was killed."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from salun_lightning.search.space import Choices, Range, Space, grid, reaching, read_space, spread
from salun_lightning.search.trials import WORST, Claimed, Trials, open_journal

ROOT = Path(__file__).parents[2]
SPACE: Space = {"lr": Range(1e-3, 0.1, log=True), "order": Choices(("mixed", "paired"))}
DEFAULTS = {"lr": 0.01, "order": "mixed"}


def trials(folder: Path, budget: int = 12, space: Space = SPACE, **defaults: Any) -> Trials:
    """As another process would open them."""
    return Trials(open_journal(folder / "journal.log"), "a method", space, [defaults or DEFAULTS], budget, folder / "trials")


def gap(options: dict[str, Any], best: float = 0.03) -> float:
    return abs(math.log10(options["lr"] / best)) + (options.get("order") == "mixed")


def run(opened: Trials, limit: int = 100, best: float = 0.03) -> list[dict[str, Any]]:
    """The settings that are tried, one after another."""
    tried = []
    while len(tried) < limit and (claimed := opened.claim()) is not None:
        opened.end(claimed, [gap(claimed.options, best)], 1, {})
        tried.append(claimed.options)
    return tried


def test_the_default_settings_come_first_and_then_spread_ones(tmp_path: Path) -> None:
    tried = run(trials(tmp_path))
    assert len(tried) == 12
    assert tried[0] == DEFAULTS
    assert tried[1:6] == [spread(SPACE, number) for number in range(5)]
    opened = trials(tmp_path)
    assert opened.finished
    assert opened.claim() is None
    assert opened.default_gap == gap(DEFAULTS)
    assert opened.best is not None
    assert opened.best.value == min(map(gap, tried)) < gap(DEFAULTS)
    assert gap(min(tried[6:], key=gap)) <= gap(min(tried[:6], key=gap))  # TPE has learned something
    assert not list((tmp_path / "trials").iterdir())


def test_what_is_known_comes_second_also_from_outside_the_range(tmp_path: Path) -> None:
    known = [DEFAULTS, {"lr": 0.9, "order": "paired"}]
    space = reaching(SPACE, known)
    assert space == {"lr": Range(1e-3, 0.9, log=True), "order": Choices(("mixed", "paired"))}
    opened = Trials(open_journal(tmp_path / "journal.log"), "a method", space, known, 12, tmp_path / "trials")
    tried = run(opened, best=0.8)
    assert tried[:2] == known
    assert (len(tried), opened.first[0], opened.best.value) == (12, DEFAULTS, min(gap(options, 0.8) for options in tried))


def test_a_larger_budget_goes_on_from_the_trials_that_are_there(tmp_path: Path) -> None:
    few = run(trials(tmp_path, 6))
    more = run(trials(tmp_path, 10))
    assert (len(few), len(more)) == (6, 4)
    assert not any(options in few for options in more)
    assert more != [spread(SPACE, number) for number in range(2, 6)]  # what there is to learn from is learned from


def test_values_that_no_range_can_hold_leave_it_as_it_is() -> None:
    assert reaching({"lr": SPACE["lr"]}, [{"lr": "high"}, {"lr": -1.0}, {"lr": 0.05}]) == {"lr": SPACE["lr"]}
    assert reaching({"order": SPACE["order"]}, [{"order": "all"}]) == {"order": Choices(("mixed", "paired", "all"))}


def test_it_depends_on_nothing_but_what_is_there(tmp_path: Path) -> None:
    """Neither on when a process was started, nor on random numbers that others draw."""
    whole = run(trials(tmp_path / "whole"))
    parts = [options for _ in range(12) for options in run(trials(tmp_path / "parts"), limit=1)]
    assert parts == whole
    other = Trials(open_journal(tmp_path / "parts" / "journal.log"), "another", SPACE, [DEFAULTS], 12, tmp_path / "other")
    tried = run(other)
    assert tried[:6] == whole[:6]
    assert tried[6:] != whole[6:]


def test_what_another_process_runs_is_not_run_here(tmp_path: Path) -> None:
    first, second = trials(tmp_path, budget=3), trials(tmp_path, budget=3)
    claimed = [first.claim(), second.claim(), first.claim()]
    assert [one.number for one in claimed if one] == [1, 2, 3]
    assert second.claim() is None
    assert not second.finished
    assert len(second.running()) == 3
    for one in claimed:
        assert one is not None
        second.end(one, [1.0], 1, {})
    assert second.finished
    assert first.finished


def test_a_killed_trial_is_tried_again_and_does_not_count(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from tests.search.test_trials import trials;"
        "opened = trials(Path(sys.argv[1]), budget=3); held = opened.claim(), opened.claim();"
        "print(held, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert process.stdout is not None
    process.stdout.readline()
    opened = trials(tmp_path, budget=3)
    other = opened.claim()
    assert other is not None
    assert other.number == 3  # it lives
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    opened.end(other, [1.0], 1, {})
    opened.wait()  # for nobody
    assert run(opened) == [DEFAULTS, spread(SPACE, 0)]
    assert opened.finished
    assert len(opened.counted()) == 3


def test_processes_share_a_journal(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.search.test_trials import run, trials; run(trials(Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    opened = trials(tmp_path)
    tried = [trial.user_attrs["options"] for trial in opened.counted()]
    assert len(tried) == 12
    assert len({str(options) for options in tried}) == 12
    assert opened.finished


def test_a_small_space_is_tried_out(tmp_path: Path) -> None:
    space: Space = {"order": Choices(("mixed", "paired")), "epochs": Range(1, 3, whole=True)}
    opened = trials(tmp_path, 20, space, order="paired", epochs=2)
    tried = []
    while (claimed := opened.claim()) is not None:
        tried.append(claimed.options)
        opened.end(claimed, [float(claimed.options["epochs"])], 1, {})
    assert tried[0] == {"order": "paired", "epochs": 2}
    assert sorted(map(str, tried)) == sorted(map(str, grid(space)))
    assert opened.finished
    assert opened.at_edge == []  # there is no epoch 0 to try


def test_settings_are_not_tried_twice(tmp_path: Path) -> None:
    space: Space = {"lr": Choices(tuple(range(1, 11)))}
    opened = trials(tmp_path, 9, space, lr=1)
    tried = run(opened, best=3)
    assert len(tried) == len({options["lr"] for options in tried}) == 9


def test_a_range_is_widened_once_and_paid_from_the_same_budget(tmp_path: Path) -> None:
    space: Space = {"lr": SPACE["lr"]}
    opened = trials(tmp_path, 20, space, lr=0.01)
    tried = run(opened, best=0.5)
    assert len(tried) == 20
    assert opened.widened == ["lr"]
    assert opened.space_now == {"lr": Range(1e-3, 1.0, log=True)}
    assert max(options["lr"] for options in tried) > 0.1
    assert opened.at_edge == []
    assert trials(tmp_path, 20, space, lr=0.01).widened == ["lr"]
    opened = trials(tmp_path / "far", 20, space, lr=0.01)
    run(opened, best=1e6)
    assert opened.space_now == {"lr": Range(1e-3, 1.0, log=True)}  # no further
    assert opened.best is not None
    assert opened.at_edge == (["lr"] if opened.best.params["lr"] > 0.7 else [])


def failing(opened: Trials) -> Claimed:
    claimed = opened.claim()
    assert claimed is not None
    opened.end(claimed, [], 2, {}, "No.")
    return claimed


def test_what_fails_counts_and_is_tried_again_when_the_command_is(tmp_path: Path) -> None:
    opened = trials(tmp_path, budget=3)
    run(opened, limit=1)
    failed = failing(opened)
    run(opened)
    assert opened.finished
    assert opened.best is not None
    assert opened.best.value < WORST
    opened = trials(tmp_path, budget=3)
    assert not opened.finished
    assert run(opened) == [failed.options]


def test_what_failed_is_not_tried_again_by_a_process_that_comes_later(tmp_path: Path) -> None:
    """Both count alike, so that the budget is one for all of them."""
    first = trials(tmp_path, budget=4)
    run(first, limit=1)
    failed = failing(first)
    running = first.claim()
    assert running is not None
    second = trials(tmp_path, budget=4)
    assert len(first.counted()) == len(second.counted()) == 3
    tried = run(second)
    assert len(tried) == 1
    assert failed.options not in tried
    first.end(running, [1.0], 1, {})
    assert first.finished
    assert second.finished


def test_what_is_known_may_be_written_in_another_way(tmp_path: Path) -> None:
    """10.0 in a file is the 10 of the space."""
    space: Space = {"weight": Choices((1, 10, 50))}
    known = [{"weight": 1}, {"weight": 10.0}]
    opened = Trials(open_journal(tmp_path / "journal.log"), "a method", reaching(space, known), known, 3, tmp_path / "trials")
    tried = []
    while (claimed := opened.claim()) is not None:
        opened.end(claimed, [1.0], 1, {})
        tried.append(claimed.options["weight"])
    assert sorted(tried) == [1, 10, 50]


def test_choices_that_are_lists() -> None:
    space = read_space({"rates": [[0.1, 1.0], [0.2]]}, {"rates": [0.1, 1.0]})
    assert space == {"rates": Choices(([0.1, 1.0], [0.2]))}


def test_where_the_default_settings_fail_no_others_are_tried(tmp_path: Path) -> None:
    opened = trials(tmp_path)
    failing(opened)
    assert opened.claim() is None
    assert opened.finished
    assert opened.error == "No."
    assert opened.best is None
    opened = trials(tmp_path)
    assert opened.error is None
    assert run(opened, limit=1) == [DEFAULTS]


def test_a_trial_that_was_given_up_counts_and_is_not_the_best(tmp_path: Path) -> None:
    opened = trials(tmp_path, budget=2)
    for gaps in ([3.0, 3.0], [0.5]):
        claimed = opened.claim()
        assert claimed is not None
        opened.end(claimed, gaps, 2, {"figures": []})
    assert opened.finished
    assert opened.best is not None
    assert opened.best.value == 3


def test_half_a_line_is_taken_away(tmp_path: Path) -> None:
    run(trials(tmp_path, budget=2))
    journal = tmp_path / "journal.log"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code":4,"wor')
    opened = trials(tmp_path, budget=3)
    assert journal.read_bytes().startswith(whole)
    assert len(run(opened)) == 1
    assert trials(tmp_path, budget=3).finished


def test_without_optuna(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"'search' needs Optuna. Install it: pip install 'salun_lightning\[search\]'"
    ):
        open_journal(tmp_path / "journal.log")
