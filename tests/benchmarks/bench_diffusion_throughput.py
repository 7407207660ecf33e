"""Training steps a second of a class-conditional diffusion model against a plain loop; on a GPU where there is one.

Both train the UNet of configs/cifar10_diffusion.yaml with bf16 autocast, Adam and clipping, on images that lie on the
device. On a CPU the UNet has a quarter of the channels.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from lightning.pytorch import Callback, Trainer
from measuring import repetitions, report
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from salun_lightning import ClassDiffusion, FineTune, ForgetClasses, ForgetRetainDataModule
from salun_lightning.data import ImageTensors

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
CHANNELS, BATCH, STEPS, WARM_UP = ((128, 256, 256, 256), 128, 220, 20) if ON_GPU else ((32, 64, 64, 64), 16, 14, 4)


def unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=32,
        layers_per_block=2,
        block_out_channels=CHANNELS,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=CHANNELS[1],
        dropout=0.1,
        num_class_embeds=11,
    )


class Clock(Callback):
    """Takes the time from the end of the warm-up on."""

    def __init__(self) -> None:
        self.steps = 0

    def tick(self) -> None:
        self.steps += 1
        if self.steps in (WARM_UP, STEPS):
            if ON_GPU:
                torch.cuda.synchronize()
            now = time.perf_counter()
            self.rate = (STEPS - WARM_UP) / (now - getattr(self, "started", now) or 1)
            self.started = now

    @override
    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self.tick()


def ours(images: Tensor, targets: Tensor) -> float:
    data = ImageTensors(images, targets)
    module = ClassDiffusion(unet(), DDPMScheduler(), null_class=10, label_dropout=0.1, method=FineTune("all"))
    clock = Clock()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        devices=1,
        max_steps=STEPS,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        limit_val_batches=0,
        callbacks=[clock],
        **quiet,
    )
    trainer.fit(module, datamodule=ForgetRetainDataModule(ForgetClasses(0), data, data, batch_size=BATCH))
    return clock.rate


def plain(images: Tensor, targets: Tensor) -> float:
    network, scheduler = unet().to(DEVICE), DDPMScheduler()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-4)
    images, targets = images.to(DEVICE), targets.to(DEVICE)
    clock = Clock()
    for step in range(STEPS):
        rows = slice(step * BATCH, (step + 1) * BATCH)
        clean = images[rows].float() / 127.5 - 1
        noise = torch.randn_like(clean)
        timesteps = torch.randint(1000, (BATCH,), device=DEVICE)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        labels = torch.where(torch.rand(BATCH, device=DEVICE) < 0.1, 10, targets[rows])
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = functional.mse_loss(network(noisy, timesteps, class_labels=labels).sample.float(), noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        clock.tick()
    return clock.rate


@pytest.mark.benchmark
def test_training_steps() -> None:
    images = torch.randint(0, 256, (BATCH * STEPS, 3, 32, 32), dtype=torch.uint8)
    targets = torch.arange(len(images)) % 10
    ways: tuple[Callable[[Tensor, Tensor], float], ...] = (ours, plain)
    rounds = [[way(images, targets) for way in ways] for _ in range(repetitions(3))]
    here, there = (median(rates) for rates in zip(*rounds, strict=True))
    place = torch.cuda.get_device_name() if ON_GPU else "CPU"
    report(f"diffusion training, steps/s on {place}", f"{here:.2f}", f"{there:.2f}", f"{here / there:.2f}x", ">= 0.95x")
    assert here / there >= 0.95
