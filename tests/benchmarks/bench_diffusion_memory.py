"""Peak memory of the saliency pass and of unlearning a diffusion model, in bytes a weight.

On a GPU of 80 GB or more: a UNet of 924 million weights. On a CPU: one of 231 million, in a process of its own. Images are
small, so that weights and what belongs to them is nearly all there is. What must be there, at least, is computed beside it:

- saliency pass: the weights and their gradients, 8 bytes a weight in float32
- unlearning with AdamW: weights, gradients, two moments, the original bits and the mask that training holds, and the packed
  mask: 21.1; a method that refers to the original model keeps another copy of it: 25.1
"""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from lightning.pytorch import Callback, Trainer
from measuring import report
from typing_extensions import override

from salun_lightning import ClassDiffusion, ForgetClasses, ForgetRetainDataModule, Remap, SaliencyMask, SaliencyMasking
from salun_lightning.data import ImageTensors
from salun_lightning.saliency import saliency_scores

ON_GPU = torch.cuda.is_available()
CHANNELS = (384, 768, 1536, 1536) if ON_GPU else (192, 384, 768, 768)
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
SALIENCY, UNLEARNING = 8.0, 25.1


def small_images() -> ForgetRetainDataModule:
    images = ImageTensors(torch.randint(0, 256, (8, 4, 16, 16), dtype=torch.uint8), torch.arange(8) % 2)
    return ForgetRetainDataModule(ForgetClasses(0), images, images, batch_size=2)


def large_unet() -> ClassDiffusion:
    network = UNet2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=CHANNELS,
        down_block_types=("AttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("AttnUpBlock2D",) * 3,
        attention_head_dim=64,
        num_class_embeds=3,
    )
    return ClassDiffusion(
        network,
        DDPMScheduler(),
        null_class=2,
        method=Remap(),
        gradient_checkpointing=True,
        optimizer=lambda p: torch.optim.AdamW(p, fused=True),
    )


class SaliencyPeak(Callback):
    """Runs the saliency pass, and measures it, before anything else is there."""

    peak = 0.0

    @override
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        scores = saliency_scores(pl_module, trainer.datamodule.forget_dataloader(), strategy=trainer.strategy)
        SaliencyMask.from_scores(scores, 0.5)
        del scores
        self.peak = _peak()
        trainer.should_stop = True


def bytes_a_weight(what: str) -> tuple[float, int]:
    """Peak memory beyond what was there before the network, and the number of weights."""
    before = _peak()
    module = large_unet()
    peak = SaliencyPeak()
    callbacks: list[Callback] = [peak] if what == "saliency" else [SaliencyMasking(0.5)]
    if what == "saliency":
        module.method.needs_original = False
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    steps = 1 if what == "saliency" else 2
    trainer = Trainer(devices=1, max_steps=steps, limit_val_batches=0, limit_train_batches=steps, callbacks=callbacks, **quiet)
    trainer.fit(module, datamodule=small_images())
    weights = sum(weight.numel() for weight in module.network.parameters())
    return ((peak.peak if what == "saliency" else _peak()) - before) / weights, weights


def _peak() -> float:
    if ON_GPU:
        return float(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


@pytest.mark.benchmark
@pytest.mark.parametrize(("what", "least"), [("saliency", SALIENCY), ("unlearning", UNLEARNING)])
def test_memory(what: str, least: float) -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        measured, weights = pool.submit(bytes_a_weight, what).result()
    place = torch.cuda.get_device_name() if ON_GPU else "CPU"
    report(
        f"{what}, bytes a weight, {weights / 1e6:.0f} M on {place}",
        f"{measured:.1f}",
        f"{least:.1f} (least)",
        f"{measured / least:.2f}x",
        "<= 1.25x of the least",
    )
    assert least * 0.95 <= measured <= least * 1.25
