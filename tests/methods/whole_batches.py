"""Runs whose every step sees whole sets, and the same steps in plain torch."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional

from salun_lightning.data import ForgetRandom, ForgetRetainDataModule, ImageTensors
from salun_lightning.methods import Method
from salun_lightning.modules import ImageClassifier
from salun_lightning.saliency import SaliencyMask, SaliencyMasking, saliency_scores
from tests.modules.small_runs import trainer, weights

RATES = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-3}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))


def data(batch_size: int = 100) -> ForgetRetainDataModule:
    """Images of noise: 12 to be forgotten and 28 to be retained."""
    pixels = torch.randint(0, 256, (40, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    images = ImageTensors(pixels, torch.arange(40) % 3)
    datamodule = ForgetRetainDataModule(ForgetRandom(count=12), images, images, batch_size=batch_size)
    datamodule.setup()
    return datamodule


def part_of(name: str) -> tuple[Tensor, Tensor]:
    """Images and classes of the forget set or the retain set."""
    datamodule = data()
    positions = getattr(datamodule, f"{name}_indices")
    images, targets = datamodule.load().train[positions]
    return images.float() / 255, targets


def half() -> SaliencyMask:
    return SaliencyMask.from_scores(saliency_scores(network(), [], "random", seed=1), 0.5)


def fitted(
    folder: Path,
    method: Method,
    mask: SaliencyMask | None = None,
    callbacks: tuple[Callback, ...] = (),
    optimizer: Any = torch.optim.SGD,
    batch_size: int = 100,
    **settings: Any,
) -> ImageClassifier:
    """A classifier after four epochs, each of one step."""
    rates = RATES if optimizer is torch.optim.SGD else {"lr": 0.01}
    module = ImageClassifier(network(), method=method, optimizer=lambda p: optimizer(p, **rates))
    masking = () if mask is None else (SaliencyMasking(mask=mask),)
    runner = trainer(folder, callbacks=[*masking, *callbacks], **{"max_epochs": 4, **settings})
    runner.fit(module, datamodule=data(batch_size))
    if masking:
        assert masking[0].report["drift"] == 0
    return module


def descended(
    loss: Callable[[nn.Module, int], Tensor],
    mask: SaliencyMask | None = None,
    start: dict[str, Tensor] | None = None,
    surgery: Callable[[nn.Module, int], None] | None = None,
    mend: Callable[[nn.Module, dict[str, Tensor], int], None] | None = None,
    extra: tuple[nn.Parameter, ...] = (),
) -> nn.Module:
    """The network after four steps on a loss of it and the number of the step; a mask holds weights still.

    Args:
        loss: The loss.
        mask: The mask.
        start: The weights to start with.
        surgery: Changes the gradients of the network before a step.
        mend: Changes the network after a step, given its weights before it.
        extra: Further weights that are trained.
    """
    net = network()
    original = weights(net)
    if start is not None:
        net.load_state_dict(start)
    optimizer = torch.optim.SGD([*net.parameters(), *extra], **RATES)
    for step in range(4):
        optimizer.zero_grad()
        loss(net, step).backward()
        before = weights(net)
        for name, weight in net.named_parameters():
            if mask is not None and weight.grad is not None:
                weight.grad *= mask[name]
        if surgery is not None:
            surgery(net, step)
        optimizer.step()
        if mend is not None:
            mend(net, before, step)
        with torch.no_grad():
            for name, weight in net.named_parameters():
                if mask is not None:
                    weight.copy_(torch.where(mask[name], weight, original[name]))
    return net


def entropy(net: nn.Module, samples: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(net(samples[0]), samples[1])


def assert_same_weights(found: nn.Module, expected: nn.Module, moved: int = 100) -> None:
    """The same up to rounding, and not where they started."""
    count = 0
    for (name, weight), (_, other), (_, before) in zip(
        found.named_parameters(), expected.named_parameters(), network().named_parameters(), strict=True
    ):
        torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        count += int((weight != before).sum())
    assert count >= moved


def resumed(folder: Path, method: Method) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights after a run, and after one that was broken off in its middle and resumed."""
    found = []
    for number, resume in enumerate([None, folder / "0" / "epoch=1.ckpt"]):
        module = ImageClassifier(network(), method=deepcopy(method), optimizer=lambda p: torch.optim.SGD(p, **RATES))
        saver = ModelCheckpoint(folder / str(number), "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        callbacks = [SaliencyMasking(mask=half()), saver]
        runner = trainer(folder, callbacks=callbacks, max_epochs=4, enable_checkpointing=True)
        runner.fit(module, datamodule=data(), ckpt_path=resume, weights_only=True)
        assert runner.global_step == 4
        found.append(weights(module.network))
    return found[0], found[1]
