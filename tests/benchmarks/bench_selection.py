"""Selecting the largest half of all scores: time at 86 M weights, memory at 866 M (10 times ViT-B/16; 3.5 GB of scores).

BENCHMARK_COPIES=1 measures the memory at 86 M.

Counterpart: argsort of the argsort of the concatenation, with a mask of int64, as in the released code.
"""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from measuring import medians, report, seconds
from torch import Tensor
from torchvision.models import vit_b_16

from salun_lightning.saliency import SaliencyMask
from salun_lightning.saliency.selection import top_k_masks

Select = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def vit_b_scores(copies: int = 1) -> dict[str, Tensor]:
    """Scores of the shapes of ViT-B/16 (152 tensors, 86.6 M weights), each tensor on a scale of its own."""
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in vit_b_16().named_parameters()}
    scales = torch.logspace(-8, 0, len(shapes))[torch.randperm(len(shapes))].tolist()
    return {
        f"{copy}.{name}": torch.empty(shape).uniform_(0, scale)
        for copy in range(copies)
        for (name, shape), scale in zip(shapes.items(), scales, strict=True)
    }


def ours(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(top_k_masks(scores, sum(score.numel() for score in scores.values()) // 2))


def naive(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    everything = torch.cat([-score.flatten() for score in scores.values()])
    ranks = torch.argsort(torch.argsort(everything))
    masks, start = {}, 0
    for name, score in scores.items():
        rank = ranks[start : start + score.numel()]
        mask = torch.zeros_like(rank)
        mask[rank < len(everything) // 2] = 1
        masks[name] = mask.reshape(score.shape)
        start += score.numel()
    return masks


def packed(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    return SaliencyMask.from_scores(scores, 0.5).state_dict()["bits"]


def extra_memory(way: Select, copies: int) -> tuple[float, float]:
    """Peak bytes a weight beyond the scores, and seconds."""
    way({"": torch.rand(1 << 20)})  # what torch allocates once and for all
    scores = vit_b_scores(copies)
    before = _process_memory("VmRSS")
    taken = seconds(lambda: way(scores))
    return (_process_memory("VmHWM") - before) / sum(score.numel() for score in scores.values()), taken


def _process_memory(field: str) -> int:
    # getrusage would count the peak of the process that started this one
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def in_own_process(way: Select, copies: int) -> tuple[float, float]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(extra_memory, way, copies).result()


@pytest.mark.benchmark
def test_time_of_selection() -> None:
    scores = vit_b_scores()
    counts = [sum(int(mask.sum()) for mask in way(scores).values()) for way in (ours, naive)]
    assert counts[0] == counts[1]
    fast, whole, slow = medians(3, lambda: ours(scores), lambda: packed(scores), lambda: naive(scores))
    report("selection, 86.6 M weights", f"{fast:.3f} s", f"{slow:.2f} s", f"{slow / fast:.1f}x", ">= 30x")
    report("selection and packing, 86.6 M weights", f"{whole:.3f} s", f"{slow:.2f} s", f"{slow / whole:.1f}x", "none")
    assert slow / fast >= 30


@pytest.mark.benchmark
def test_memory_of_selection() -> None:
    copies = int(os.environ.get("BENCHMARK_COPIES", "10"))
    slow, _ = in_own_process(naive, 1)  # at 866 M weights it would take 38 GB
    peaks = []
    for kind, way in (("mask of bytes", ours), ("mask of bits", packed)):
        memory, taken = in_own_process(way, copies)
        peaks.append(memory)
        name = f"extra a weight, {86.6 * copies:.0f} M weights, {kind}"
        report(name, f"{memory:.2f} B, {taken:.1f} s", f"{slow:.1f} B at 86.6 M", f"{slow / memory:.1f}x", "<= 2.5 B")
    assert max(peaks) <= 2.5
