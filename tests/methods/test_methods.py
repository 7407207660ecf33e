"""The loss of each method, against a few lines of its own."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from salun_lightning.data import Samples
from salun_lightning.methods import FineTune, GradientAscent, Method, NegGradPlus, RandomLabel

Batch = dict[str, Samples]
WEIGHT = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Linear:
    """What a method may ask of a module, with a linear model."""

    def __init__(self, num_classes: int = 4) -> None:
        self.weight = WEIGHT.clone().requires_grad_()
        self.current_epoch = 0
        self.num_classes = num_classes

    def task_loss(self, samples: Samples) -> Tensor:
        return functional.cross_entropy(samples.inputs @ self.weight.T, samples.targets)

    unlearned_loss = task_loss


def some_samples(count: int, seed: int, first: int = 0) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = torch.randn(count, 6, generator=generator), torch.randint(0, 4, (count,), generator=generator)
    return Samples(inputs, targets, torch.arange(first, first + count))


FORGET, RETAIN = some_samples(5, 1), some_samples(8, 2, first=5)


def cross_entropies(weight: Tensor, samples: Samples) -> Tensor:
    """One for each sample, by the definition."""
    probabilities = (samples.inputs @ weight.T).exp()
    probabilities = probabilities / probabilities.sum(1, keepdim=True)
    return -probabilities[torch.arange(len(samples.targets)), samples.targets].log()


def both(weight: Tensor, batch: Batch) -> Tensor:
    return torch.cat([cross_entropies(weight, part) for part in batch.values()]).mean()


REFERENCES: dict[str, tuple[Method, Batch, Callable[[Tensor, Batch], Tensor]]] = {
    "FT": (FineTune(), {"retain": RETAIN}, lambda w, b: cross_entropies(w, b["retain"]).mean()),
    "FT, both": (FineTune(), {"forget": FORGET, "retain": RETAIN}, both),
    "GA": (GradientAscent(), {"forget": FORGET}, lambda w, b: -cross_entropies(w, b["forget"]).mean()),
    "NegGrad+": (
        NegGradPlus(alpha=0.9),
        {"forget": FORGET, "retain": RETAIN},
        lambda w, b: 0.9 * cross_entropies(w, b["retain"]).mean() - 0.1 * cross_entropies(w, b["forget"]).mean(),
    ),
    "RL, retain": (RandomLabel(), {"retain": RETAIN}, both),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_loss_and_gradient_are_those_of_the_reference(name: str) -> None:
    method, batch, reference = REFERENCES[name]
    module, weight = Linear(), WEIGHT.clone().requires_grad_()
    loss, expected = method.loss(module, batch), reference(weight, batch)
    assert loss.shape == ()
    torch.testing.assert_close(loss, expected)
    (gradient,), (expected_gradient,) = torch.autograd.grad(loss, module.weight), torch.autograd.grad(expected, weight)
    torch.testing.assert_close(gradient, expected_gradient)


def test_random_label_trains_on_its_wrong_labels_and_the_true_ones() -> None:
    method, module = RandomLabel(seed=3), Linear()
    wrong = method.relabelled(FORGET, 4, 0)
    batch = {"forget": FORGET, "retain": RETAIN}
    torch.testing.assert_close(method.loss(module, batch), both(WEIGHT, {"forget": wrong, "retain": RETAIN}))
    torch.testing.assert_close(method.loss(module, {"forget": FORGET}), both(WEIGHT, {"forget": wrong}))


def test_a_step_of_gradient_ascent_raises_the_loss() -> None:
    module = Linear()
    before = module.task_loss(FORGET)
    GradientAscent().loss(module, {"forget": FORGET}).backward()
    with torch.no_grad():
        module.weight -= 0.01 * module.weight.grad
    assert module.task_loss(FORGET) > before


@pytest.mark.parametrize(
    ("method", "order"),
    [
        (FineTune(), "retain"),
        (FineTune(order="all"), "all"),
        (RandomLabel(order="mixed"), "mixed"),
        (GradientAscent(), "forget"),
        (NegGradPlus(), "paired"),
        (RandomLabel(), "sequential"),
    ],
)
def test_order_as_published(method: Method, order: str) -> None:
    assert method.order == order


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_out_of_range(alpha: float) -> None:
    with pytest.raises(ValueError, match=f"alpha must lie between 0 and 1, got {alpha}"):
        NegGradPlus(alpha)


@pytest.mark.parametrize(
    ("method", "batch", "part", "order"),
    [
        (GradientAscent(), {"retain": RETAIN}, "forget", "forget"),
        (NegGradPlus(), {"retain": RETAIN}, "forget", "paired"),
        (NegGradPlus(), {"forget": FORGET}, "retain", "paired"),
    ],
)
def test_a_part_that_the_order_does_not_bring(method: Method, batch: Batch, part: str, order: str) -> None:
    name = type(method).__name__
    with pytest.raises(ValueError, match=f"{name} needs the part '{part}' in each batch.*order '{order}'"):
        method.loss(Linear(), batch)
