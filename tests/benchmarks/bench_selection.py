"""Selecting the largest half of all scores: time at 86 M weights, memory at 866 M (10 times ViT-B/16; 3.5 GB of scores).

Counterpart: argsort of the argsort of the concatenation, with a mask of int64, as in the released code.
"""

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


def extra_memory(copies: int, *ways: Select) -> list[tuple[float, float]]:
    """For each way: peak bytes a weight beyond the scores, and seconds. Name the way that needs most last: peaks only grow."""
    for way in ways:
        way({"": torch.rand(1 << 20)})  # what torch allocates once and for all
    scores = vit_b_scores(copies)
    total = sum(score.numel() for score in scores.values())
    before = _process_memory("VmRSS")
    measured = []
    for way in ways:
        taken = seconds(lambda way=way: way(scores))
        measured.append(((_process_memory("VmHWM") - before) / total, taken))
    return measured


def _process_memory(field: str) -> int:
    # getrusage would count the peak of the process that started this one
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def in_own_process(copies: int, *ways: Select) -> list[tuple[float, float]]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(extra_memory, copies, *ways).result()


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
    ((slow, _),) = in_own_process(1, naive)  # at 866 M weights it would take 38 GB
    (in_bits, taken_packed), (in_bytes, taken) = in_own_process(10, packed, ours)
    for name, memory, duration, target in (
        ("selection, 866 M weights, mask of bytes", in_bytes, taken, "<= 2.5 B"),
        ("selection and packing, 866 M weights", in_bits, taken_packed, "none"),
    ):
        figures = f"{memory:.2f} B, {duration:.1f} s"
        report(f"{name}, a weight", figures, f"{slow:.1f} B at 86.6 M", f"{slow / memory:.1f}x", target)
    assert in_bytes <= 2.5
