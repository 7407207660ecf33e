"""Boundary shrink against a few lines of torch."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from salun_lightning.data import Samples
from salun_lightning.methods.boundary_shrink import BoundaryShrink
from salun_lightning.saliency import SaliencyMask
from tests.methods.whole_batches import assert_same_weights, descended, entropy, fitted, half, network, part_of


def nearest_classes(images: Tensor, targets: Tensor, step: float) -> Tensor:
    original, leaf = network().eval(), images.clone().requires_grad_()
    functional.cross_entropy(original(leaf), targets).backward()
    assert leaf.grad is not None
    answers = original((images + step * leaf.grad.sign()).clamp(0, 1)).tolist()
    others = [{c: score for c, score in enumerate(row) if c != y} for row, y in zip(answers, targets.tolist(), strict=True)]
    return torch.tensor([max(row, key=row.__getitem__) for row in others])


@pytest.mark.parametrize("mask", [None, half()], ids=["whole", "masked"])
def test_it_trains_on_the_nearest_wrong_class(tmp_path: Path, mask: SaliencyMask | None) -> None:
    images, targets = part_of("forget")
    wrong = nearest_classes(images, targets, 0.1)
    assert len(wrong.unique()) > 1
    expected = descended(lambda net, _: entropy(net, (images, wrong)), mask)
    assert_same_weights(fitted(tmp_path, BoundaryShrink(), mask).network, expected, moved=80)


def linear_module() -> Any:
    """A network that is sure of class 0 for dark images, of class 1 for grey and of class 2 for bright ones."""

    class Bright(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            mean = images.flatten(1).mean(1, keepdim=True)
            return -100 * (mean - torch.tensor([[0.0, 0.5, 1.0]])).square()

    reference = Bright()
    return SimpleNamespace(
        reference=reference, logits_by=lambda net, images: net(images), logits=lambda images, original: reference(images)
    )


def test_the_true_class_only_if_it_is_allowed() -> None:
    pixels = torch.tensor([0.0, 0.2, 0.9]).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    samples = Samples(pixels, torch.tensor([0, 0, 2]), torch.arange(3))
    assert BoundaryShrink(step=0.1).nearest(linear_module(), samples).tolist() == [1, 1, 1]
    assert BoundaryShrink(step=0.1, allow_true=True).nearest(linear_module(), samples).tolist() == [0, 1, 2]


def test_nothing_moves_outside_a_mask_of_nothing(tmp_path: Path) -> None:
    nothing = SaliencyMask({name: torch.zeros_like(weight).bool() for name, weight in network().named_parameters()})
    module = fitted(tmp_path, BoundaryShrink(), nothing)
    for weight, before in zip(module.network.parameters(), network().parameters(), strict=True):
        assert torch.equal(weight, before)


@pytest.mark.parametrize("step", [-0.1, float("nan"), float("inf")])
def test_a_step_that_is_none_is_refused(step: float) -> None:
    with pytest.raises(
        ValueError, match=r"^step must be a finite number that is not negative, got .*\. Give one such as 0\.1\."
    ):
        BoundaryShrink(step=step)
