"""A run that was broken off and goes on ends where it would have ended."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from salun_lightning.data import ForgetRandom, ForgetRetainDataModule
from salun_lightning.methods import RandomLabel
from salun_lightning.modules import ImageClassifier
from tests.modules.interrupted import EPOCHS, unlearn
from tests.modules.small_runs import classifier, digits, same, train_original, trainer, weights
from tests.small import Pairs


def test_killed_and_resumed_is_bit_identical_to_not_killed(tmp_path: Path) -> None:
    original = train_original(tmp_path, epochs=2)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for folder in (killed, whole):
        folder.mkdir()
        shutil.copy(original, folder)
    command = [sys.executable, "-m", "tests.modules.interrupted", str(killed)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # which decides how sums are split up
    process = subprocess.run(command, env={**os.environ, **threads}, capture_output=True, text=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
    checkpoint = killed / "last.ckpt"
    saved = torch.load(checkpoint, weights_only=True)
    assert (saved["epoch"], saved["global_step"]) == (1, 24)  # two of four epochs, of 2 + 10 steps each

    not_killed = weights(unlearn(whole))
    resumed = weights(unlearn(killed, resume=checkpoint))
    assert same(resumed, not_killed)
    assert {"network.stem.1.running_mean", "network.stem.1.num_batches_tracked"} <= resumed.keys()
    assert torch.load(checkpoint, weights_only=True)["epoch"] == EPOCHS - 1
    assert not same(
        {name: tensor for name, tensor in saved["state_dict"].items() if "head" in name},
        {name: tensor for name, tensor in resumed.items() if "head" in name},
    )

    here = digits()
    here.setup()
    assert json.loads(process.stdout.splitlines()[0]) == here.split  # one split in every process


def jittered(image: Tensor) -> Tensor:
    """An augmentation of one image, with random numbers of three kinds."""
    import random

    import numpy as np

    return image + 0.1 * torch.rand(1) + 0.1 * random.random() + 0.1 * float(np.random.rand())


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_of_single_images_goes_on_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """In this process or in loader processes: the random numbers of an epoch follow from the seed and the epoch."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    pairs = Pairs(list(images), [number % 10 for number in range(40)])

    def run(epochs: int, resume: Path | None = None) -> ImageClassifier:
        data = ForgetRetainDataModule(
            ForgetRandom(count=8), pairs, pairs, train_transform=jittered, batch_size=8, num_workers=workers
        )
        torch.manual_seed(0)
        module = classifier(method=RandomLabel())
        torch.rand(0 if resume is None else 17)  # a process that resumes has drawn other numbers before
        runner = trainer(tmp_path, max_epochs=epochs)
        runner.fit(module, datamodule=data, ckpt_path=resume)
        runner.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module

    half, whole = weights(run(1)), weights(run(2))
    assert same(weights(run(2, resume=tmp_path / "1.ckpt")), whole)
    assert not same(half, whole)


def test_epochs_draw_different_numbers(tmp_path: Path) -> None:
    drawn: list[Any] = []

    def watched(image: Tensor) -> Tensor:
        drawn.append(torch.rand(1).item())
        return image

    pairs = Pairs(list(torch.rand(8, 1, 8, 8)), [0, 1] * 4)
    data = ForgetRetainDataModule(ForgetRandom(count=2), pairs, pairs, train_transform=watched)
    trainer(tmp_path, max_epochs=2).fit(classifier(method=RandomLabel()), datamodule=data)
    assert len(drawn) == len(set(drawn)) == 16
