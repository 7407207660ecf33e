"""What masking adds to a training step, in float32 and in bf16: ResNet-18 with the CIFAR stem, batch 128, on the CPU.

Counterpart: the update of the released code, with masks of floats in contiguous memory.
"""

import time
from statistics import median

import pytest
import torch
from measuring import has_bf16, repetitions, report
from torch import Tensor, nn
from torch.nn import functional

from salun_lightning.networks import TorchvisionClassifier
from salun_lightning.saliency import SaliencyMask, saliency_scores
from salun_lightning.saliency.held import HeldModule
from salun_lightning.weights import weights_of

BATCH = 128


class Ours:
    """All that the callback does about a step, with the looks at the start and the end of its batch."""

    def __init__(self, network: nn.Module, mask: SaliencyMask, optimizer: torch.optim.Optimizer) -> None:
        self.held = HeldModule(network, weights_of(network), mask, hold_uncovered=True, hold_buffers=False)
        self.held.release()  # so that the hooks around its step run where they are timed
        self.optimizer = optimizer

    def before_step(self) -> None:
        self.held.settle()
        self.held.cover(self.optimizer)
        self.held.mask_gradients(self.optimizer)

    def after_step(self) -> None:
        self.held._after_step(self.optimizer)
        self.held.settle()


class Naive:
    def __init__(self, network: nn.Module, mask: SaliencyMask) -> None:
        self.weights = [(weight, mask[name].float(), weight.detach().clone()) for name, weight in weights_of(network).items()]

    def before_step(self) -> None:
        for weight, movable, _ in self.weights:
            weight.grad.mul_(movable)

    @torch.no_grad()
    def after_step(self) -> None:
        for weight, movable, original in self.weights:
            weight.mul_(movable).add_(original * (1 - movable))


def timed_step(
    network: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, targets: Tensor, masking: Ours | Naive, bf16: bool
) -> tuple[float, float]:
    """Seconds of a training step, and of the masking within it; caches are as a real step leaves them."""
    times = [time.perf_counter()]
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        loss = functional.cross_entropy(network(images), targets)
    loss.backward()
    for work in (masking.before_step, optimizer.step, masking.after_step):
        times.append(time.perf_counter())
        work()
    times.append(time.perf_counter())
    started, trained, masked, stepped, ended = times
    in_masking = masked - trained + ended - stepped
    return ended - started - in_masking, in_masking


@pytest.mark.benchmark
@pytest.mark.parametrize("bf16", [False, True])
def test_share_of_a_training_step(bf16: bool) -> None:
    if bf16 and not has_bf16():
        pytest.skip("The processor has no bf16 instructions.")
    torch.manual_seed(0)
    network = TorchvisionClassifier("resnet18", 10, cifar_stem=True).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    images = torch.rand(BATCH, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    targets = torch.randint(10, (BATCH,))
    mask = SaliencyMask.from_scores(saliency_scores(network, (), "random"), 0.5)
    ours, naive = Ours(network, mask, optimizer), Naive(network, mask)
    timed_step(network, optimizer, images, targets, ours, bf16)  # first use of every tensor
    timed_step(network, optimizer, images, targets, naive, bf16)
    steps, masking = [], {ours: [], naive: []}
    for _ in range(repetitions(9)):
        for way, times in masking.items():
            step, in_masking = timed_step(network, optimizer, images, targets, way, bf16)
            steps.append(step)
            times.append(in_masking)
    step = median(steps)
    in_ours, in_naive = (median(times) for times in masking.values())
    report(
        f"masking, share of a {'bf16' if bf16 else 'float32'} step of {step * 1e3:.0f} ms",
        f"{in_ours * 1e3:.1f} ms",
        f"{in_naive * 1e3:.1f} ms",
        f"{in_ours / step:.2%} ({in_naive / step:.2%})",
        "<= 1.5 %",
    )
    assert in_ours / step <= 0.015
