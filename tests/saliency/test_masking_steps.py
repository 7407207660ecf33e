"""Frozen means frozen: every optimizer, precision and way to step, against plain loops of torch."""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import product

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional

from salun_lightning.saliency import SaliencyMask, SaliencyMasking
from salun_lightning.weights import weights_of
from tests.saliency.helpers import Plain, PlainManual, assert_frozen, copied, fit, half_mask, loader, same_bits, same_weights


class SignDescent(torch.optim.Optimizer):
    """An optimizer that nobody knows: steps by the sign of the gradient, decays, and adds noise, to every weight."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        self.generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            for weight in group["params"]:
                noise = torch.randn(weight.shape, generator=self.generator).to(weight.dtype)
                weight.mul_(0.99).add_(weight.grad.sign() + 0.1 * noise, alpha=-group["lr"])
        return loss


OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "Adam": partial(torch.optim.Adam, lr=0.02, weight_decay=0.1),
    "AdamW": partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1),
    "AdamW foreach": partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1, foreach=True),
    "AdamW fused": partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1, fused=True),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.9, weight_decay=0.1),
    "SignDescent": partial(SignDescent, lr=0.02),
}
CLIPPING = {
    "none": {},
    "norm": {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "norm"},
    "value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
}


def by_hand(
    module: Plain, mask: SaliencyMask, clipping: str = "none", accumulate: int = 1, autocast: bool = False, epochs: int = 2
) -> None:
    """The reference: mask the gradient, clip it, step, and put back what lies outside the mask."""
    weights, original = weights_of(module), copied(module)
    optimizer = module.make_optimizer(module.parameters())
    dtype = next(module.parameters()).dtype
    for _ in range(epochs):
        for number, (images, targets) in enumerate(loader(), start=1):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = functional.cross_entropy(module.net(images.to(dtype)).float(), targets)
            (loss / accumulate).backward()
            if number % accumulate and number < 5:
                continue
            for name, weight in weights.items():
                weight.grad = torch.where(mask[name], weight.grad, 0)
            if clipping == "norm":
                nn.utils.clip_grad_norm_(module.parameters(), 0.1)
            elif clipping == "value":
                nn.utils.clip_grad_value_(module.parameters(), 0.01)
            optimizer.step()
            optimizer.zero_grad()
            for name, weight in weights.items():
                weight.data = torch.where(mask[name], weight.data, original[name])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_masked_run_equals_the_loop_by_hand(optimizer, clipping, accumulate):
    module, reference = Plain(OPTIMIZERS[optimizer]), Plain(OPTIMIZERS[optimizer])
    original, mask = copied(module), half_mask(module)
    fit(module, SaliencyMasking(mask=mask), accumulate_grad_batches=accumulate, **CLIPPING[clipping])
    by_hand(reference, mask, clipping, accumulate)
    assert_frozen(original, copied(module), mask)
    assert same_weights(copied(module), copied(reference))


PRECISIONS = {
    "32-true": torch.float32,
    "64-true": torch.float64,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "bf16-mixed": torch.float32,
    "16-mixed": torch.float32,
}


def precision(name: str) -> dict[str, object]:
    if name != "16-mixed":
        return {"precision": name}
    # asked for by name it becomes bf16-mixed on a CPU; scaled by 2**20, the first steps overflow and are skipped
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**20))]}


# Lightning refuses to clip for a fused optimizer in mixed precision, with or without a mask
COMBINATIONS = [
    (name, optimizer, clipping)
    for name, optimizer, clipping in product(PRECISIONS, OPTIMIZERS, ("none", "norm"))
    if not (name.endswith("mixed") and optimizer == "AdamW fused" and clipping == "norm")
]


@pytest.mark.parametrize(("name", "optimizer", "clipping"), COMBINATIONS)
def test_frozen_in_every_precision(name, optimizer, clipping):
    module = Plain(OPTIMIZERS[optimizer])
    mask = half_mask(module)
    original = copied(module.to(PRECISIONS[name]))
    callback = SaliencyMasking(mask=mask)
    fit(module, callback, max_epochs=4, **precision(name), **CLIPPING[clipping])
    assert next(module.parameters()).dtype == PRECISIONS[name]
    assert_frozen(original, copied(module), mask)
    assert callback.report["drift"] == 0


@pytest.mark.parametrize("name", ["64-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "SignDescent"])
def test_a_masked_run_in_another_precision_equals_the_loop_by_hand(name, optimizer):
    module, reference = (Plain(OPTIMIZERS[optimizer]).to(PRECISIONS[name]) for _ in range(2))
    mask = half_mask(module)
    fit(module, SaliencyMasking(mask=mask), precision=name)
    by_hand(reference, mask, autocast=name == "bf16-mixed")
    assert same_weights(copied(module), copied(reference))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_manual_optimization_masks_before_it_clips(optimizer):
    module, reference = PlainManual(OPTIMIZERS[optimizer]), Plain(OPTIMIZERS[optimizer])
    original, mask = copied(module), half_mask(module)
    fit(module, SaliencyMasking(mask=mask))
    by_hand(reference, mask, "norm")
    assert_frozen(original, copied(module), mask)
    assert same_weights(copied(module), copied(reference))


class TwoOptimizers(Plain):
    """Manual optimization that steps one optimizer twice and another with a closure."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        features, head = self.optimizers()
        for _ in range(2):
            features.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            features.step()

        def closure() -> Tensor:
            head.zero_grad()
            loss = Plain.training_step(self, batch, batch_idx)
            self.manual_backward(loss)
            return loss

        head.step(closure=closure)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [OPTIMIZERS["AdamW"](self.net[:5].parameters()), OPTIMIZERS["SGD"](self.net[5:].parameters())]


def test_frozen_with_two_optimizers():
    module = TwoOptimizers()
    original, mask = copied(module), half_mask(module)
    fit(module, SaliencyMasking(mask=mask))
    assert_frozen(original, copied(module), mask)


def test_frozen_with_an_optimizer_that_evaluates_its_closure_several_times():
    module = Plain(partial(torch.optim.LBFGS, lr=0.1, max_iter=3))
    original, mask = copied(module), half_mask(module)
    fit(module, SaliencyMasking(mask=mask))
    assert_frozen(original, copied(module), mask)


def test_channels_last_weights_equal_contiguous_ones():
    """The same numbers in another layout; 8 roundings allow for another order of sums."""
    module, contiguous = Plain(), Plain()
    module.net.to(memory_format=torch.channels_last)
    assert not module.net[0].weight.is_contiguous()
    original, mask = copied(module), half_mask(module)
    fit(module, SaliencyMasking(mask=mask))
    fit(contiguous, SaliencyMasking(mask=mask))
    assert not module.net[0].weight.is_contiguous()
    assert_frozen(original, copied(module), mask)
    torch.testing.assert_close(copied(module), copied(contiguous), rtol=8 * 2**-23, atol=1e-6)


class NastyGradients(Plain):
    """NaN and infinity in some gradients."""

    def on_after_backward(self) -> None:
        for weight in self.parameters():
            weight.grad.view(-1)[::3] = torch.tensor([float("nan"), float("inf"), -float("inf")]).repeat(99)[
                : len(weight.grad.view(-1)[::3])
            ]


def only_finite_mask(module: Plain) -> SaliencyMask:
    """A mask that freezes all that has a nasty gradient."""
    masks = {name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in weights_of(module).items()}
    for mask in masks.values():
        mask.view(-1)[::3] = False
    return SaliencyMask(masks)


@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nan_and_infinity_in_frozen_gradients_do_not_leak(optimizer, clipping):
    module, reference = NastyGradients(OPTIMIZERS[optimizer]), Plain(OPTIMIZERS[optimizer])
    original, mask = copied(module), only_finite_mask(module)
    fit(module, SaliencyMasking(mask=mask), **CLIPPING[clipping])
    by_hand(reference, mask, clipping)
    assert_frozen(original, copied(module), mask)
    assert same_weights(copied(module), copied(reference))


class Exploding(SignDescent):
    """Leaves NaN and infinity in every third weight."""

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = super().step(closure)
        for group in self.param_groups:
            for weight in group["params"]:
                weight.detach().view(-1)[::6] = float("nan")
                weight.detach().view(-1)[3::6] = float("inf")
        return loss


def test_nan_and_infinity_in_frozen_updates_do_not_leak():
    module = Plain(partial(Exploding, lr=0.02))
    original, mask = copied(module), only_finite_mask(module)
    callback = SaliencyMasking(mask=mask)
    fit(module, callback)
    assert_frozen(original, copied(module), mask)
    assert all(weight.isfinite().all() for weight in copied(module).values())
    assert callback.report["drift"] == 0


def test_every_bit_pattern_of_a_frozen_weight_is_kept():
    module = Plain()
    odd = torch.tensor([-0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -1e-45, 3.4e38, -0.0, 0.0])
    unused = nn.Parameter(torch.cat([odd, torch.tensor([0x7FA00001, -2], dtype=torch.int32).view(torch.float32)]))
    module.unused = unused
    before = unused.detach().clone()
    masks = {name: torch.ones(weight.shape) for name, weight in weights_of(module).items()}
    masks["unused"] = torch.zeros(11)
    fit(module, SaliencyMasking(mask=SaliencyMask(masks)), gradient_clip_val=0.1)
    assert same_bits(unused, before)


def test_ratio_0_freezes_everything_and_ratio_1_nothing():
    frozen, free, unmasked = Plain(), Plain(), Plain()
    original = copied(frozen)
    callbacks = SaliencyMasking(0), SaliencyMasking(1)
    fit(frozen, callbacks[0])
    fit(free, callbacks[1])
    fit(unmasked)
    assert same_weights(copied(frozen), original)
    assert same_weights(copied(free), copied(unmasked))
    all_covered = {"num_weights": 300, "num_uncovered": 0, "num_without_optimizer": 0, "drift": 0}
    assert callbacks[0].report == {**all_covered, "num_kept": 0, "num_moved": 0}
    assert callbacks[1].report == {**all_covered, "num_kept": 300, "num_moved": 300}
