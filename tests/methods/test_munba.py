"""MUNBa: its weights solve the bargaining problem, and its step is that of a few lines of torch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.nn import functional

from salun_lightning.lightning_cli import UnlearningCLI
from salun_lightning.methods import FineTune, GradientAscent, Method, MUNBa, RandomLabel
from salun_lightning.methods.munba import bargained
from salun_lightning.modules import ImageClassifier
from salun_lightning.saliency import SaliencyMask, SaliencyMasking, saliency_scores
from tests.modules.small_runs import same, trainer, weights
from tests.small import CLASSIFIER_OF_DIGITS, small_datamodule


def vectors(cosine: float, first: float = 3.0, second: float = 0.2) -> tuple[Tensor, Tensor]:
    """Two vectors of given norms with an angle between them."""
    sine = (1 - cosine**2) ** 0.5
    return torch.tensor([first, 0.0, 0.0]).double(), torch.tensor([cosine * second, sine * second, 0.0]).double()


@pytest.mark.parametrize("cosine", [1.0, 0.7, 0.0, -0.5, -0.99])
def test_the_weights_solve_the_bargaining_problem(cosine: float) -> None:
    gradients = torch.stack(vectors(cosine))
    alphas = bargained(*gradients)
    torch.testing.assert_close(gradients @ gradients.T @ alphas, 1 / alphas)
    total = alphas @ gradients
    torch.testing.assert_close(total.norm(), torch.tensor(2.0).sqrt().double())
    gains = gradients @ total / gradients.norm(dim=1)
    assert gains[0] > 0
    torch.testing.assert_close(gains[0], gains[1])


def test_nothing_to_bargain_for() -> None:
    """Opposite gradients, and such as are zero or almost."""
    first, second = vectors(-1.0)
    alphas = bargained(first, second)
    assert alphas.isfinite().all()
    torch.testing.assert_close(alphas[0] * first + alphas[1] * second, torch.zeros(3).double())
    assert bargained(first, 0 * first).tolist() == pytest.approx([1 / 3, 0])
    assert bargained(0 * first, 0 * first).tolist() == [0, 0]
    tiny = torch.full((4,), 1e-41)
    assert bargained(tiny, torch.ones(4)).tolist() == pytest.approx([0, 0.5], rel=1e-2)
    small = torch.full((4,), 1e-15)
    assert bargained(small, small).tolist() == pytest.approx([0.5e15 / 2**0.5] * 2, rel=1e-4)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3))


class Keeps(MUNBa):
    """Keeps the batches."""

    def __init__(self, *players: Any) -> None:
        super().__init__(*players)
        self.batches: list[Any] = []

    def loss(self, module: Any, batch: Any) -> Any:
        self.batches.append(batch)
        return super().loss(module, batch)


@pytest.mark.parametrize("masked", [False, True])
def test_steps_are_those_of_the_reference(tmp_path: Path, masked: bool) -> None:
    mask = SaliencyMask.from_scores(saliency_scores(network(), [], "random", seed=1), 0.5)
    method = Keeps(GradientAscent())
    module = ImageClassifier(network(), method=method, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    callbacks = [SaliencyMasking(mask=mask)] if masked else []
    trainer(tmp_path, max_steps=3, callbacks=callbacks).fit(module, datamodule=small_datamodule())
    reference = network()
    original, velocity = [weight.detach().clone() for weight in reference.parameters()], [0.0] * 4
    for batch in method.batches:
        gradients = []
        for name, sign in (("forget", -1), ("retain", 1)):
            loss = sign * functional.cross_entropy(reference(batch[name].inputs), batch[name].targets)
            gradients.append(torch.autograd.grad(loss, list(reference.parameters())))
        flat = [torch.cat([gradient.flatten() for gradient in one]) for one in gradients]
        cosine = functional.cosine_similarity(*flat, dim=0)
        for place, (name, weight) in enumerate(reference.named_parameters()):
            both = sum(one[place] / whole.norm() for one, whole in zip(gradients, flat, strict=True)) / (1 + cosine).sqrt()
            velocity[place] = 0.9 * velocity[place] + both
            moved = weight.detach() - 0.1 * velocity[place]
            weight.data = torch.where(mask[name], moved, original[place]) if masked else moved
    assert len(method.batches) == 3
    for name, weight in reference.named_parameters():
        torch.testing.assert_close(module.network.get_parameter(name), weight.detach(), atol=1e-6, rtol=1e-5)


def test_a_mask_of_ratio_0_leaves_all_as_it_was(tmp_path: Path) -> None:
    module = ImageClassifier(network(), method=MUNBa(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1))
    trainer(tmp_path, max_epochs=1, callbacks=[SaliencyMasking(0)]).fit(module, datamodule=small_datamodule())
    assert same(weights(module.network), weights(network()))


class Passes(Method):
    """Passes over every batch."""

    def loss(self, module: Any, batch: Any) -> None:
        return None


def test_a_batch_that_a_player_passes_over(tmp_path: Path) -> None:
    module = ImageClassifier(network(), method=MUNBa(Passes()))
    trainer(tmp_path, max_epochs=1).fit(module, datamodule=small_datamodule())
    assert same(weights(module.network), weights(network()))


def test_players_are_given_by_name() -> None:
    players = "{forget: {class_path: RandomLabel, init_args: {redraw: false}}, retain: FineTune}"
    for method, kind in ((players, RandomLabel), ("{forget: GradientAscent}", GradientAscent)):
        cli = UnlearningCLI([*CLASSIFIER_OF_DIGITS, f"--model.method={{class_path: MUNBa, init_args: {method}}}"], run=False)
        assert isinstance(cli.model.method.forget, kind)
        assert isinstance(cli.model.method.retain, FineTune)
    assert MUNBa().order == "paired"


def test_shards_are_refused(tmp_path: Path) -> None:
    runner = trainer(tmp_path, strategy=ModelParallelStrategy())
    with pytest.raises(MisconfigurationException, match=r"^MUNBa compares whole gradients, .*\. Use 'ddp'\.$"):
        MUNBa().on_train_start(runner, ImageClassifier(network()))
