"""The file of a mask of 86 M weights: its size, and the time from bool tensors to the file and back.

Counterpart: a pickled dictionary of int64 tensors, as the released code writes it.
"""

from pathlib import Path

import pytest
import torch
from bench_selection import vit_b_scores
from measuring import medians, report

from salun_lightning.saliency import SaliencyMask


@pytest.mark.benchmark
def test_mask_file(tmp_path: Path) -> None:
    masks = {name: torch.rand(score.shape) < 0.5 for name, score in vit_b_scores().items()}
    integers = {name: mask.long() for name, mask in masks.items()}
    path, naive_path = tmp_path / "mask.safetensors", tmp_path / "with_0.5.pt"
    mask = SaliencyMask(masks)
    pack_and_save, save, naive_save, load, load_and_unpack, naive_load = medians(
        5,
        lambda: SaliencyMask(masks).save(path),
        lambda: mask.save(path),
        lambda: torch.save(integers, naive_path),
        lambda: SaliencyMask.load(path),
        lambda: dict(SaliencyMask.load(path)),
        lambda: torch.load(naive_path),
    )
    assert all(torch.equal(tensor, masks[name]) for name, tensor in SaliencyMask.load(path).items())
    bits, naive_bits = (file.stat().st_size * 8 / mask.num_weights for file in (path, naive_path))
    report("mask file, bits a weight", f"{bits:.4f}", f"{naive_bits:.2f}", f"{naive_bits / bits:.0f}x", "<= 1.01")
    for name, ours, naive in (
        ("mask file, save", save, naive_save),
        ("mask file, save from bool tensors", pack_and_save, naive_save),
        ("mask file, load", load, naive_load),
        ("mask file, load to bool tensors", load_and_unpack, naive_load),
    ):
        report(name, f"{ours * 1e3:.0f} ms", f"{naive * 1e3:.0f} ms", f"{naive / ours:.1f}x", "< 200 ms")
    assert bits <= 1.01
    assert max(pack_and_save, load_and_unpack) < 0.2
