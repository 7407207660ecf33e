"""Images a second while SalUn unlearns with ResNet-18, data and masking included; on a GPU where there is one.

Counterpart: the plain loop of the released code: float32, contiguous memory, images transformed one by one in the same process,
gradients times a mask of int64. The same loop in bf16 with the channels last shows how much of the ratio is nothing else.
BENCHMARK_STEPS=5 makes a quick look on a CPU.
"""

import os
import time
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from measuring import has_bf16, repetitions, report
from PIL import Image
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from typing_extensions import override

from salun_lightning.data import ForgetRandom, ForgetRetainDataModule, ImageTensors
from salun_lightning.data.augment import RandomCropFlip
from salun_lightning.methods import RandomLabel
from salun_lightning.modules import ImageClassifier
from salun_lightning.networks import TorchvisionClassifier
from salun_lightning.saliency import SaliencyMasking

ON_GPU = torch.cuda.is_available()
BATCH, STEPS, WARM_UP = (256, 200, 20) if ON_GPU else (128, int(os.environ.get("BENCHMARK_STEPS", "10")), 2)
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


class Clock:
    """Counts images from the end of the warm-up on."""

    def __init__(self) -> None:
        self.batches = self.images = 0

    def count(self, images: int) -> None:
        self.batches += 1
        if self.batches > WARM_UP:
            self.images += images
        elif self.batches == WARM_UP:
            self.started = self._now()

    def images_per_second(self) -> float:
        return self.images / (self._now() - self.started)

    def _now(self) -> float:
        if ON_GPU:
            torch.cuda.synchronize()
        return time.perf_counter()


class Stopwatch(Callback):
    def __init__(self) -> None:
        self.clock = Clock()

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.clock.count(sum(len(part.targets) for part in batch.values()))

    @override
    def on_train_end(self, *_: Any) -> None:
        self.result = self.clock.images_per_second()


def ours(images: np.ndarray, targets: np.ndarray) -> float:
    tensors = ImageTensors(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(targets))
    data = ForgetRetainDataModule(
        ForgetRandom(0.1), train=tensors, test=tensors, train_transform=RandomCropFlip(), batch_size=BATCH
    )
    network = TorchvisionClassifier("resnet18", 10, cifar_stem=True)
    module = ImageClassifier(network, channels_last=True, method=RandomLabel())
    stopwatch = Stopwatch()
    trainer = Trainer(
        devices=1,
        precision="bf16-mixed",
        max_epochs=1,
        limit_val_batches=0,
        callbacks=[SaliencyMasking(0.5), stopwatch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    return stopwatch.result


class PILImages(Dataset):
    def __init__(self, images: np.ndarray, targets: np.ndarray) -> None:
        self.images, self.targets = images, targets
        self.transform = transforms.Compose(
            [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        )

    def __len__(self) -> int:
        return len(self.targets)

    @override
    def __getitem__(self, index: int) -> Any:
        return self.transform(Image.fromarray(self.images[index])), self.targets[index]


def naive(images: np.ndarray, targets: np.ndarray, bf16: bool = False) -> float:
    layout = torch.channels_last if bf16 else torch.contiguous_format
    network = TorchvisionClassifier("resnet18", 10, cifar_stem=True).to(DEVICE, memory_format=layout)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    masks = {name: (torch.rand_like(weight) < 0.5).long() for name, weight in network.named_parameters()}
    loader = DataLoader(PILImages(images, targets), batch_size=BATCH, shuffle=True, num_workers=0, pin_memory=ON_GPU)
    clock = Clock()
    for inputs, classes in loader:
        inputs, classes = inputs.to(DEVICE, memory_format=layout), classes.to(DEVICE)  # noqa: PLW2901
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=bf16):
            loss = functional.cross_entropy(network(inputs), classes)
        optimizer.zero_grad()
        loss.backward()
        for name, weight in network.named_parameters():
            weight.grad *= masks[name]
        optimizer.step()
        loss.item()  # printed there
        clock.count(len(classes))
    return clock.images_per_second()


@pytest.mark.benchmark
def test_throughput() -> None:
    if not ON_GPU and not has_bf16():
        pytest.skip("The processor has no bf16 instructions, and there is no GPU.")
    draw = np.random.RandomState(0)
    images = draw.randint(0, 256, (BATCH * STEPS, 32, 32, 3), dtype=np.uint8)
    targets = draw.randint(0, 10, BATCH * STEPS)
    rounds = [(ours(images, targets), naive(images, targets), naive(images, targets, bf16=True)) for _ in range(repetitions(3))]
    fast, slow, plain = (median(rates) for rates in zip(*rounds, strict=True))
    device = torch.cuda.get_device_name() if ON_GPU else "CPU"
    report(f"unlearning, images/s on {device}", f"{fast:.1f}", f"{slow:.1f}", f"{fast / slow:.2f}x", ">= 2.5x on a CPU")
    report("of which bf16 and channels last", f"{plain:.1f}", f"{slow:.1f}", f"{plain / slow:.2f}x", "none")
    report("beside that loop", f"{fast:.1f}", f"{plain:.1f}", f"{fast / plain:.2f}x", "none")
    assert fast / slow >= 2.5
