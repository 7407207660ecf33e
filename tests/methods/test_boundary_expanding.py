"""Boundary expanding against a network that is one class wider."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from salun_lightning.methods.boundary_expanding import BoundaryExpanding
from salun_lightning.modules import ImageClassifier
from salun_lightning.saliency import SaliencyMask
from tests.methods.whole_batches import assert_same_weights, data, descended, fitted, half, network, part_of, resumed
from tests.modules.small_runs import same, trainer, weights


class Watched(BoundaryExpanding):
    """Keeps the additional weights as they were at the start."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self.first = [weight.detach().clone() for weight in self._extra.parameters()]


@pytest.mark.parametrize("mask", [None, half()], ids=["whole", "masked"])
def test_it_trains_on_one_class_more_which_the_network_never_has(tmp_path: Path, mask: SaliencyMask | None) -> None:
    method = Watched()
    module = fitted(tmp_path, method, mask)
    row, bias = (nn.Parameter(weight) for weight in method.first)
    images, _ = part_of("forget")

    def loss(net: Any, step: int) -> Tensor:
        features = net[:-1](images)
        logits = torch.cat([net[-1](features), features @ row.T + bias], 1)
        return functional.cross_entropy(logits, torch.full((12,), 3))

    expected = descended(loss, mask, extra=(row, bias))
    assert_same_weights(module.network, expected, moved=80)
    for found, wanted in zip(method._extra.parameters(), (row, bias), strict=True):  # no mask covers them
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert module.network.state_dict().keys() == network().state_dict().keys()
    assert module(images).shape == (12, 3)


def test_nothing_moves_outside_a_mask_of_nothing(tmp_path: Path) -> None:
    nothing = SaliencyMask({name: torch.zeros_like(weight).bool() for name, weight in network().named_parameters()})
    assert same(weights(fitted(tmp_path, BoundaryExpanding(), nothing).network), weights(network()))


def test_the_class_depends_on_the_seed_and_on_nothing_that_was_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def first(seed: int, drawn: int) -> Tensor:
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        torch.rand(drawn)
        method = Watched()
        fitted(tmp_path, method, max_epochs=1)
        return method.first[0]

    assert torch.equal(first(1, 0), first(1, 7))
    assert not torch.equal(first(1, 0), first(2, 0))


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole, again = resumed(tmp_path, BoundaryExpanding())
    assert same(whole, again)


def test_a_second_run_starts_anew(tmp_path: Path) -> None:
    method = Watched()
    fitted(tmp_path, method)
    before = method.first[0]
    fitted(tmp_path, method)
    assert torch.equal(method.first[0], before)


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.Conv2d(1, 3, 4), nn.Flatten()),
        nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 3, 1), nn.Flatten()),
        nn.Sequential(nn.Flatten(2), nn.Linear(16, 3), nn.Flatten()),
    ],
    ids=["no linear layer", "not the last", "not of whole images"],
)
def test_a_network_whose_logits_do_not_come_out_of_a_linear_layer_is_refused(net: nn.Module, tmp_path: Path) -> None:
    module = ImageClassifier(net, method=BoundaryExpanding())
    with pytest.raises(ValueError, match=r"linear layer.*\. Choose a(nother)? method"):
        trainer(tmp_path, max_epochs=1).fit(module, datamodule=data())


def test_a_compiled_network_is_compiled_once_and_left_as_it_was(tmp_path: Path) -> None:
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    def run(net: nn.Module) -> dict[str, Tensor]:
        module = ImageClassifier(net, method=BoundaryExpanding())
        trainer(tmp_path, max_epochs=2).fit(module, datamodule=data(batch_size=6))
        return weights(net)

    net = network()
    run(torch.compile(net, backend=backend))
    expected = network()
    run(expected)
    assert same(weights(net), weights(expected))
    assert 0 < len(compiled) < 4  # of four steps
    assert not net[-1]._forward_pre_hooks
