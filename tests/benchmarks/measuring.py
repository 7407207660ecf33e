"""Timing in turns, and the one line that a benchmark prints. BENCHMARK_REPETITIONS=1 makes a quick look of any benchmark."""

import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch


def repetitions(usual: int) -> int:
    return int(os.environ.get("BENCHMARK_REPETITIONS", usual))


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def medians(usual: int, *works: Callable[[], Any]) -> list[float]:
    """Median seconds of each piece of work, done in turns: a slow spell of the machine then falls on all of them."""
    rounds = [[seconds(work) for work in works] for _ in range(repetitions(usual))]
    return [median(times) for times in zip(*rounds, strict=True)]


def has_bf16() -> bool:
    """Whether the processor computes in bf16; else torch emulates it, many times slower."""
    return any(there for name, there in torch.cpu.get_capabilities().items() if "bf16" in name)


def report(name: str, ours: str, naive: str, ratio: str, target: str) -> None:
    print(f"\n{name:<46} ours {ours:<16} naive {naive:<16} {ratio:<14} target {target}", end="", flush=True)
