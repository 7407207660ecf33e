"""SFR-on against a few lines of torch, and what a step on the forget set may move."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn import functional

from salun_lightning.methods.sfr_on import SFROn
from salun_lightning.modules import ImageClassifier
from salun_lightning.saliency import SaliencyMask
from tests.methods.whole_batches import assert_same_weights, data, descended, entropy, fitted, half, network, part_of, resumed
from tests.modules.small_diffusion import diffusion
from tests.modules.small_diffusion import images as drawn
from tests.modules.small_runs import same, trainer, weights


def fisher(samples: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    net = network().eval()
    total = {name: torch.zeros_like(weight) for name, weight in net.named_parameters()}
    for image, target in zip(*samples, strict=True):
        loss = functional.cross_entropy(net(image[None]), target[None])
        for (name, _), gradient in zip(net.named_parameters(), torch.autograd.grad(loss, list(net.parameters())), strict=True):
            total[name] += gradient**2 / len(samples[1])
    return total


def own_mask(threshold: float) -> dict[str, Tensor]:
    forget, retain = fisher(part_of("forget")), fisher(part_of("retain"))
    return {name: forget[name] >= threshold * retain[name] for name in forget}


@pytest.mark.parametrize("threshold", [1.0, 1.5])
@pytest.mark.parametrize("mask", [None, half()], ids=["whole", "masked"])
def test_it_alternates_as_the_reference_does(tmp_path: Path, mask: SaliencyMask | None, threshold: float) -> None:
    method = SFROn(alpha=2.0, power=0.7, threshold=threshold, every=1)
    module = fitted(tmp_path, method, mask)
    forget, retain, own = part_of("forget"), part_of("retain"), own_mask(threshold)
    assert all(0 < own[name].float().mean() < 1 for name in ("1.weight", "4.weight"))

    def loss(net: nn.Module, step: int) -> Tensor:
        if step % 2:
            return entropy(net, retain)
        losses = functional.cross_entropy(net(forget[0]), forget[1], reduction="none")
        w = losses.detach() ** -0.7
        return -(1 + math.cos(math.pi * step / 4)) * (12 * w / w.sum() * losses).mean()

    def surgery(net: nn.Module, step: int) -> None:
        for name, weight in net.named_parameters():
            if not step % 2:
                weight.grad *= own[name]

    def mend(net: nn.Module, before: dict[str, Tensor], step: int) -> None:
        with torch.no_grad():
            for name, weight in net.named_parameters():
                if not step % 2:
                    weight.copy_(torch.where(own[name], weight, before[name]))

    expected = descended(loss, mask, surgery=surgery, mend=mend)
    assert_same_weights(module.network, expected, moved=80)


class Steps(Callback):
    """The weights before and after each step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.weights.append(weights(pl_module.network))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_forget_step_moves_nothing_outside_its_mask_and_others_move_all(tmp_path: Path, optimizer: Any) -> None:
    steps, own = Steps(), own_mask(1.0)
    method = SFROn(every=2)
    fitted(tmp_path, method, callbacks=(steps,), optimizer=optimizer, max_epochs=7)
    assert [method.forgets(step) for step in range(7)] == [True, False, False, True, False, False, True]
    for number, (before, after) in enumerate(zip(steps.weights, steps.weights[1:], strict=False)):
        for name, inside in own.items():
            moved = before[name] != after[name]
            assert not (moved & ~inside).any() or number % 3, (number, name)
            assert moved[inside].float().mean() > 0.9 or not inside.any()
            assert moved.float().mean() > 0.9 or number % 3 == 0


def test_all_batches_that_are_accumulated_are_of_one_kind(tmp_path: Path) -> None:
    kinds: list[tuple[int, bool]] = []

    class Watched(SFROn):
        def loss(self, module: Any, batch: Any) -> Tensor:
            loss = super().loss(module, batch)
            kinds.append((module.global_step, bool(loss < 0)))
            return loss

    fitted(tmp_path, Watched(every=1), batch_size=8, max_epochs=1, accumulate_grad_batches=2)  # 4 batches of the retain set
    assert kinds == [(0, True), (0, True), (1, False), (1, False)]


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole, again = resumed(tmp_path, SFROn(every=1))
    assert same(whole, again)


def test_nothing_moves_outside_a_mask_of_nothing(tmp_path: Path) -> None:
    nothing = SaliencyMask({name: torch.zeros_like(weight).bool() for name, weight in network().named_parameters()})
    assert same(weights(fitted(tmp_path, SFROn(every=1), nothing).network), weights(network()))


def test_a_second_run_looks_for_its_weights_anew(tmp_path: Path) -> None:
    method = SFROn(threshold=1.0)
    fitted(tmp_path, method)
    before = method._mask
    method.threshold = 1.5
    fitted(tmp_path, method)
    assert method._mask.num_kept < before.num_kept


def test_it_trains_a_diffusion_model(tmp_path: Path) -> None:
    module = diffusion(method=SFROn(every=1))
    before = weights(module.network)
    trainer(tmp_path, max_steps=2).fit(module, datamodule=drawn(count=9))
    assert not same(weights(module.network), before)


def test_a_loss_of_zero_is_weighted_by_a_finite_number(tmp_path: Path) -> None:
    class Certain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sharp = nn.Parameter(torch.ones(3))

        def forward(self, images: Tensor) -> Tensor:
            return 1e4 * self.sharp * torch.eye(3)[torch.zeros(len(images), dtype=torch.long)]

    module = ImageClassifier(Certain(), method=SFROn(power=2.0, every=0))
    trainer(tmp_path, max_epochs=2).fit(module, datamodule=data())
    assert module.network.sharp.isfinite().all()


@pytest.mark.parametrize(
    "settings",
    [{"alpha": -1.0}, {"alpha": float("inf")}, {"power": 2.5}, {"power": float("nan")}, {"threshold": -1.0}, {"every": -1}],
)
def test_numbers_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^alpha, threshold and every must not be negative, .*\. Give such as 25, 1, 5 and"):
        SFROn(**settings)
