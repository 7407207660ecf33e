"""Scissorhands against a few lines of torch: what is trimmed, and how gradients are turned."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from salun_lightning.methods.scissorhands import Scissorhands
from salun_lightning.saliency import SaliencyMask
from tests.methods.whole_batches import assert_same_weights, descended, entropy, fitted, half, network, part_of, resumed
from tests.modules.small_diffusion import diffusion
from tests.modules.small_diffusion import images as drawn
from tests.modules.small_runs import same, trainer, weights


class Start(Callback):
    """The weights before the first step."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 0:
            self.weights = weights(pl_module.network)


def gradients(net: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    return dict(zip(dict(net.named_parameters()), torch.autograd.grad(loss, list(net.parameters())), strict=True))


@pytest.mark.parametrize("layers", ["", r"^4\."])
@pytest.mark.parametrize("mask", [None, half()], ids=["whole", "masked"])
def test_the_most_sensitive_weights_are_made_anew(tmp_path: Path, mask: SaliencyMask | None, layers: str) -> None:
    start, net = Start(), network()
    fitted(tmp_path, Scissorhands(trim=0.2, layers=layers), mask, (start,), max_epochs=1)
    gradient = gradients(net, entropy(net, part_of("forget")))
    names = [name for name in gradient if name[0] in ("4" if layers else "14")]  # 2 is the normalisation
    sensitivity = torch.cat([(net.get_parameter(name) * gradient[name]).abs().flatten() for name in names])
    trimmed = torch.zeros_like(sensitivity).bool()
    trimmed[sensitivity.topk(int(0.2 * len(sensitivity))).indices] = True
    anew = 0
    for name, part in zip(names, trimmed.split([net.get_parameter(name).numel() for name in names]), strict=True):
        before, after = net.get_parameter(name).detach(), start.weights.pop(name)
        chosen = part.view(before.shape) & (torch.ones(()).bool() if mask is None else mask[name])
        assert torch.equal(after[~chosen], before[~chosen])
        assert (after[chosen] != before[chosen]).all()
        bound = 1 / math.sqrt(before.shape[1]) if before.ndim > 1 else 0
        assert (after[chosen].abs() <= bound).all()
        anew += int(chosen.sum())
    assert anew > 0
    assert all(torch.equal(after, net.get_parameter(name)) for name, after in start.weights.items())


@pytest.mark.parametrize("mask", [None, half()], ids=["whole", "masked"])
def test_it_repairs_as_the_reference_does(tmp_path: Path, mask: SaliencyMask | None) -> None:
    start = Start()
    module = fitted(tmp_path, Scissorhands(trim=0.1, forget_weight=0.2), mask, (start,))
    forget, retain, inner = part_of("forget"), part_of("retain"), []

    def surgery(net: nn.Module, step: int) -> None:
        memory = gradients(net, -entropy(net, forget))  # one step an epoch
        if mask is not None:
            memory = {name: mask[name] * tensor for name, tensor in memory.items()}
        g, m = (torch.cat([each[name].flatten() for name in memory]) for each in (_gradients_of(net), memory))
        inner.append(float(g @ m))
        if g @ m < 0:
            for name, weight in net.named_parameters():
                weight.grad -= (g @ m) / (m @ m) * memory[name]
            g = torch.cat([gradient.flatten() for gradient in _gradients_of(net).values()])
            assert abs(g @ m) < 1e-6

    expected = descended(
        lambda net, _: entropy(net, retain) - 0.2 * entropy(net, forget), mask, start=start.weights, surgery=surgery
    )
    assert min(inner) < 0, "a gradient was turned"
    assert_same_weights(module.network, expected, moved=80)


def _gradients_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: weight.grad for name, weight in net.named_parameters() if weight.grad is not None}


def test_a_gradient_that_undoes_nothing_stays_as_it_is(tmp_path: Path) -> None:
    """With the forget loss weighing this much, every gradient climbs it."""

    class Watched(Scissorhands):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            before = {name: gradient.clone() for name, gradient in _gradients_of(pl_module).items()}
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            self.same = same(before, _gradients_of(pl_module))

    method = Watched(forget_weight=10.0)
    fitted(tmp_path, method)
    assert method.same


def test_a_resumed_run_ends_with_the_same_bits_and_is_not_trimmed_again(tmp_path: Path) -> None:
    whole, again = resumed(tmp_path, Scissorhands(trim=0.2))
    assert same(whole, again)


def test_a_second_run_is_trimmed_again(tmp_path: Path) -> None:
    start, method = Start(), Scissorhands(trim=0.2)
    fitted(tmp_path, method, callbacks=(start,))
    first = start.weights
    fitted(tmp_path, method, callbacks=(start,))
    assert same(start.weights, first)
    assert not same(first, weights(network()))


def test_nothing_moves_outside_a_mask_of_nothing(tmp_path: Path) -> None:
    nothing = SaliencyMask({name: torch.zeros_like(weight).bool() for name, weight in network().named_parameters()})
    assert same(weights(fitted(tmp_path, Scissorhands(trim=0.5), nothing).network), weights(network()))


def test_it_trains_a_diffusion_model(tmp_path: Path) -> None:
    module = diffusion(method=Scissorhands())
    before = weights(module.network)
    trainer(tmp_path, max_steps=1).fit(module, datamodule=drawn(count=9))
    assert not same(weights(module.network), before)


def test_layers_that_are_not_there_are_refused(tmp_path: Path) -> None:
    names = r"1\.weight, 1\.bias, 4\.weight, 4\.bias"
    with pytest.raises(ValueError, match=rf"^layers 'fc' is in the name of no weight that may be trimmed: {names}\."):
        fitted(tmp_path, Scissorhands(layers="fc"))


@pytest.mark.parametrize("settings", [{"trim": 1.5}, {"trim": float("nan")}, {"forget_weight": -1.0}])
def test_numbers_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"^trim .* must be from 0 to 1, forget_weight .* not negative\. Try 0\.03 and 0\.05\."
    ):
        Scissorhands(**settings)
