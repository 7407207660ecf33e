"""Edits of the weights in one step of SGD, and SSD against a few lines of torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional

from salun_lightning.methods import SSD, OneShot
from salun_lightning.modules import ImageClassifier
from salun_lightning.saliency import SaliencyMask, SaliencyMasking, saliency_scores
from salun_lightning.weights import weights_of
from tests.modules.small_diffusion import diffusion, images
from tests.modules.small_runs import same, trainer, weights
from tests.small import small_datamodule


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )


def plain_step(parameters: Iterator[nn.Parameter], **kwargs: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, **{"lr": 1.0, **kwargs})


def edited(folder: Path, method: OneShot, mask: SaliencyMask | None = None, **settings: Any) -> ImageClassifier:
    """A classifier after its one step, and the check of nothing but the step: buffers are as they were."""
    module = ImageClassifier(network(), method=method, optimizer=plain_step)
    before = {name: buffer.clone() for name, buffer in module.network.named_buffers()}
    callbacks = [] if mask is None else [SaliencyMasking(mask=mask)]
    trainer(folder, max_steps=1, callbacks=callbacks, **settings).fit(module, datamodule=small_datamodule())
    assert same({name: b.to(before[name].dtype) for name, b in module.network.named_buffers()}, before)
    return module


class Kept(SSD):
    """Keeps the weights before, and what is to be added to them."""

    def edit(self, module: Any) -> dict[str, Tensor]:
        self.before = {name: weight.detach().clone() for name, weight in weights_of(module).items()}
        self.added = {name: tensor.clone() for name, tensor in super().edit(module).items()}
        return dict(self.added)


PRECISIONS: dict[str, dict[str, Any]] = {
    name: {"precision": name} for name in ("32-true", "64-true", "bf16-true", "bf16-mixed")
}
PRECISIONS["16-mixed"] = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_exactly_the_edit_is_added_and_nothing_moves_outside_the_mask(tmp_path: Path, precision: str, masked: bool) -> None:
    scores = saliency_scores(network(), [], "random", seed=1)
    mask = SaliencyMask.from_scores(scores, 0.5) if masked else None
    method = Kept(alpha=0.5, dampening=0.5)
    module = edited(tmp_path, method, mask, **PRECISIONS[precision])
    moved = 0
    for name, weight in module.network.named_parameters():
        before = method.before[name]
        whole = before + method.added[name].to(before.dtype)  # both in the precision of the weights
        expected = whole if mask is None else torch.where(mask[name], whole, before)
        assert weight.dtype == before.dtype
        assert torch.equal(weight, expected), name
        moved += int((weight != before).sum())
    assert moved > 30


def fisher(module: nn.Module, data: Any, positions: Tensor) -> dict[str, Tensor]:
    total = {name: torch.zeros_like(weight) for name, weight in module.named_parameters()}
    for position in positions.tolist():
        image, target = data.load().train[position]
        loss = functional.cross_entropy(module(image[None].float() / 255), target[None])
        for (name, _), gradient in zip(
            module.named_parameters(), torch.autograd.grad(loss, list(module.parameters())), strict=True
        ):
            total[name] += gradient**2 / len(positions)
    return total


@pytest.mark.parametrize(("alpha", "dampening"), [(1.0, 1.0), (1.2, 0.3), (0.9, 0.95)])
def test_ssd_is_that_of_the_reference(tmp_path: Path, alpha: float, dampening: float) -> None:
    module = edited(tmp_path, SSD(alpha, dampening))
    reference, data = network().eval(), small_datamodule()
    of_forget = fisher(reference, data, data.forget_indices)
    of_all = fisher(reference, data, torch.cat([data.forget_indices, data.retain_indices]))
    dampened = 0
    for name, weight in reference.named_parameters():
        chosen = of_forget[name] > alpha * of_all[name]
        factor = torch.minimum(dampening * of_all[name] / of_forget[name], torch.ones(()))
        expected = torch.where(chosen, weight * factor, weight)
        torch.testing.assert_close(module.network.get_parameter(name), expected)
        dampened += int((expected != weight).sum())
    assert 0 < dampened < sum(weight.numel() for weight in reference.parameters())


@pytest.mark.parametrize("alpha", [5.0, 10.0, float("inf")])
def test_an_alpha_that_no_weight_can_reach_is_refused(tmp_path: Path, alpha: float) -> None:
    """The forget set has 12 of 60 samples, so its mean is at most 5 times that of all."""
    with pytest.raises(MisconfigurationException, match=rf"alpha {alpha} would leave every .* 12 of 60 .* more than 5 times"):
        edited(tmp_path, SSD(alpha))


class AddsOne(OneShot):
    def edit(self, module: Any) -> dict[str, Tensor]:
        return {"5.bias": torch.ones(3)}


def test_weights_without_an_edit_stay_as_they_are(tmp_path: Path) -> None:
    before, after = weights(network()), weights(edited(tmp_path, AddsOne()).network)
    assert torch.equal(after.pop("5.bias"), before.pop("5.bias") + 1)
    assert same(after, before)


def test_an_edit_of_an_unknown_weight_is_refused(tmp_path: Path) -> None:
    class Typo(OneShot):
        def edit(self, module: Any) -> dict[str, Tensor]:
            return {"5.bais": torch.ones(3)}

    with pytest.raises(ValueError, match=r"Typo edits '5\.bais', which is no trainable weight of the network"):
        edited(tmp_path, Typo())


@pytest.mark.parametrize(
    ("optimizer", "settings", "found"),
    [
        ({"lr": 0.5}, {}, "lr 0.5"),
        ({"momentum": 0.9}, {}, "momentum 0.9"),
        ({"momentum": 0.9, "nesterov": True}, {}, "momentum 0.9"),
        ({"weight_decay": 5e-4}, {}, "weight_decay 0.0005"),
        ({"maximize": True}, {}, "maximize True"),
        ("Adam", {}, "the optimizer Adam"),
        ({}, {"max_steps": 2}, "2 steps"),
        ({}, {"max_steps": -1, "max_epochs": 1}, "2 steps"),
        ({}, {"accumulate_grad_batches": 2}, "accumulate_grad_batches 2"),
        ({}, {"gradient_clip_val": 1.0}, "gradient_clip_val 1.0"),
    ],
)
def test_more_than_one_plain_step_is_refused_before_anything_is_computed(
    tmp_path: Path, optimizer: Any, settings: dict[str, Any], found: str
) -> None:
    class Never(OneShot):
        def edit(self, module: Any) -> dict[str, Tensor]:
            pytest.fail("an edit was computed")

    make = torch.optim.Adam if optimizer == "Adam" else (lambda p: plain_step(p, **optimizer))
    module = ImageClassifier(network(), method=Never(), optimizer=make)
    runner = trainer(tmp_path, **{"max_steps": 1, **settings})
    with pytest.raises(MisconfigurationException, match=rf"Never .* one plain step of SGD, but this run has {found}\. Write '"):
        runner.fit(module, datamodule=small_datamodule())
    assert same(weights(module.network), weights(network()))


def test_one_epoch_of_one_batch_is_one_step(tmp_path: Path) -> None:
    module = ImageClassifier(network(), method=AddsOne(), optimizer=plain_step)
    trainer(tmp_path, max_epochs=1).fit(module, datamodule=small_datamodule(batch_size=100))
    assert torch.equal(module.network[5].bias, network()[5].bias + 1)


@pytest.mark.parametrize("settings", [{"alpha": -1.0}, {"dampening": -0.5}, {"alpha": float("nan")}])
def test_numbers_out_of_range(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"^alpha and dampening must not be negative"):
        SSD(**settings)


def test_ssd_edits_a_diffusion_model_and_repeats(tmp_path: Path) -> None:
    """Noise and timestep of a sample depend on its number alone, so the edit does not depend on what was drawn before."""

    def run() -> tuple[Kept, nn.Module]:
        method = Kept(alpha=1.0)
        module = diffusion(method=method, optimizer=plain_step)
        trainer(tmp_path, max_steps=1).fit(module, datamodule=images(count=9))
        return method, module.network

    method, edited_network = run()
    for name, weight in edited_network.named_parameters():
        assert torch.equal(weight, method.before[name] + method.added[name]), name
    assert any(added.any() for added in method.added.values())
    torch.rand(3)
    assert same(run()[0].added, method.added)
