"""The file of a mask of 86.6 M weights: its size, and the time from bool tensors to the file and back, conversions included,
and on the disk, not only with the system (or the next way would wait for what this one left to write).

Counterparts: a pickled dictionary of int64 tensors, as the released code writes it; and bool tensors in a safetensors file.
"""

import os
from pathlib import Path

import pytest
import torch
from bench_selection import vit_b_scores
from measuring import medians, report
from safetensors.torch import load_file, save_file
from torch import Tensor

from salun_lightning.saliency import SaliencyMask

Masks = dict[str, Tensor]


def as_released(masks: Masks, path: Path) -> None:
    torch.save({name: mask.long() for name, mask in masks.items()}, path)
    to_disk(path)


def as_bytes(masks: Masks, path: Path) -> None:
    save_file(masks, path)
    to_disk(path)


def to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file)


def read_as_released(path: Path) -> Masks:
    return {name: mask.bool() for name, mask in torch.load(path).items()}


@pytest.mark.benchmark
def test_mask_file(tmp_path: Path) -> None:
    masks = {name: torch.rand(score.shape) < 0.5 for name, score in vit_b_scores().items()}
    ours, released, plain = (tmp_path / name for name in ("mask.safetensors", "with_0.5.pt", "plain.safetensors"))
    save, naive_save, plain_save, load, naive_load, plain_load = medians(
        5,
        lambda: SaliencyMask(masks).save(ours),
        lambda: as_released(masks, released),
        lambda: as_bytes(masks, plain),
        lambda: dict(SaliencyMask.load(ours)),
        lambda: read_as_released(released),
        lambda: load_file(plain),
    )
    for read in (dict(SaliencyMask.load(ours)), read_as_released(released), load_file(plain)):
        assert all(torch.equal(read[name], mask) for name, mask in masks.items())
    weights = sum(mask.numel() for mask in masks.values())
    bits, naive_bits, plain_bits = (path.stat().st_size * 8 / weights for path in (ours, released, plain))
    for kind, size, saving, loading in (
        ("int64", naive_bits, naive_save, naive_load),
        ("bool", plain_bits, plain_save, plain_load),
    ):
        report(f"mask file beside {kind}, bits a weight", f"{bits:.4f}", f"{size:.2f}", f"{size / bits:.1f}x", "<= 1.01")
        for name, own, other in (("save", save, saving), ("load", load, loading)):
            ratio = f"{other / own:.1f}x"
            report(f"mask file beside {kind}, {name}", f"{own * 1e3:.0f} ms", f"{other * 1e3:.0f} ms", ratio, "< 200 ms")
    assert bits <= 1.01
    assert max(save, load) < 0.2
