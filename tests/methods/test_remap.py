"""Remap: its loss against a few lines of torch, and which class stands in for which."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from salun_lightning.data import ForgetClasses, ForgetRandom, Samples
from salun_lightning.methods import Remap
from tests.modules.small_diffusion import STEPS, attached, diffusion, images, some_samples
from tests.modules.small_runs import trainer

FORGET, RETAIN = (
    some_samples(7)._replace(targets=torch.zeros(7, dtype=torch.int64)),
    some_samples(5, first=7, seed=1)._replace(targets=torch.tensor([1, 2, 1, 2, 2])),
)
ALPHAS = (1 - torch.linspace(1e-4, 0.02, STEPS)).cumprod(0)


def noised(samples: Samples) -> tuple[Tensor, Tensor, Tensor]:
    size = len(samples.targets)
    half = torch.randint(STEPS, (-(-size // 2),))
    timesteps = torch.cat([half, STEPS - 1 - half])[:size]
    noise = torch.randn_like(samples.inputs)
    alpha = ALPHAS[timesteps].view(-1, 1, 1, 1)
    return alpha.sqrt() * (2 * samples.inputs - 1) + (1 - alpha).sqrt() * noise, timesteps, noise


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.5])
@pytest.mark.parametrize(("to", "stands_in"), [("next", 1), (2, 2)])
def test_loss_and_gradient_are_those_of_the_reference(alpha: float, to: Any, stands_in: int) -> None:
    module = attached().train()
    torch.manual_seed(4)
    loss = Remap(alpha, to).loss(module, {"forget": FORGET, "retain": RETAIN} if alpha else {"forget": FORGET})
    torch.manual_seed(4)
    noisy, timesteps, _ = noised(FORGET)
    other = module.reference(noisy, timesteps, class_labels=torch.full((7,), stands_in)).sample
    expected = (module.network(noisy, timesteps, class_labels=FORGET.targets).sample - other).square().mean()
    if alpha:
        noisy, timesteps, noise = noised(RETAIN)
        prediction = module.network(noisy, timesteps, class_labels=RETAIN.targets).sample
        expected = expected + alpha * (prediction - noise).square().mean()
    torch.testing.assert_close(loss, expected)
    weights = [weight for name, weight in module.network.named_parameters()]
    torch.testing.assert_close(torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights))


def test_the_class_is_never_dropped_in_the_first_term() -> None:
    module = attached(label_dropout=1.0).train()
    labels: list[Tensor] = []
    for network in (module.network, module.reference):
        network.register_forward_pre_hook(lambda *call: labels.append(call[2]["class_labels"]), with_kwargs=True)
    Remap().loss(module, {"forget": FORGET, "retain": RETAIN})
    assert [found.unique().tolist() for found in labels] == [[1], [0], [3]]


def remapped(method: Remap, targets: list[int], retained: list[int]) -> list[int]:
    return method.remapped(torch.tensor(targets), torch.tensor(retained)).tolist()


@pytest.mark.parametrize(
    ("targets", "retained", "expected"),
    [
        ([0, 0], [1, 2, 3], [1, 1]),
        ([3, 3], [0, 1, 2], [0, 0]),  # after the last comes the first
        ([1, 2, 1], [0, 3], [3, 3, 3]),  # never another forgotten class
        ([2, 3], [0, 1], [0, 0]),
        ([0, 3, 4], [1, 2], [1, 1, 1]),
        ([0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 3, 0]),  # no class is forgotten whole
        ([9], [4], [4]),
        ([], [1, 2], []),
    ],
)
def test_the_next_retained_class(targets: list[int], retained: list[int], expected: list[int]) -> None:
    found = Remap().remapped(torch.tensor(targets, dtype=torch.int64), torch.tensor(retained))
    assert found.tolist() == expected
    assert found.dtype == torch.int64


def test_a_given_class() -> None:
    assert remapped(Remap(to=2), [0, 1, 0], [2, 3]) == [2, 2, 2]


@pytest.mark.parametrize("to", [0, 3, -1])
def test_a_given_class_that_is_not_retained(to: int) -> None:
    with pytest.raises(
        ValueError, match=rf"^Class {to} cannot stand in for what is forgotten: the retained classes are \[1, 2\]"
    ):
        Remap(to=to).on_train_start(Mock(), attached())


def test_a_given_class_does_not_stand_in_for_itself(tmp_path: Path) -> None:
    """When images of all classes are forgotten, those of the given class would be learnt instead."""
    module = diffusion(method=Remap(to=2))
    with pytest.raises(ValueError, match="Class 2"):
        trainer(tmp_path, max_epochs=1).fit(module, datamodule=images(forget=ForgetRandom(count=12)))


@pytest.mark.parametrize(("targets", "retained"), [([1, 4], [0, 2, 3]), ([0, 1, 2], [0, 1, 2])])
def test_a_random_class_is_uniform_over_the_retained_others(targets: list[int], retained: list[int]) -> None:
    """Each is drawn 1 / k of 3,000 times, with a deviation below 0.01."""
    given = torch.tensor(targets).repeat(3000)
    found = Remap(to="random").remapped(given, torch.tensor(retained))
    assert not (found == given).any()
    for target in targets:
        others = [number for number in retained if number != target]
        shares = (found[given == target].unsqueeze(1) == torch.tensor(others)).float().mean(0)
        torch.testing.assert_close(shares, torch.full((len(others),), 1 / len(others)), rtol=0, atol=0.04)
        assert shares.sum() == pytest.approx(1)


def test_random_classes_are_drawn_anew() -> None:
    first, second = (remapped(Remap(to="random"), [0] * 20, [1, 2, 3]) for _ in range(2))
    assert first != second


@pytest.mark.parametrize("to", ["next", "random"])
def test_no_class_is_left(to: Any) -> None:
    with pytest.raises(ValueError, match=r"^No class is retained that a forgotten one could be remapped to\.$"):
        Remap(to=to).on_train_start(Mock(), attached(forgotten=(0, 1, 2)))


@pytest.mark.parametrize("forgotten", [(0, 1), (1, 2), (2,)])
def test_training_never_asks_for_a_forgotten_class(tmp_path: Path, forgotten: tuple[int, ...]) -> None:
    module, labels = diffusion(method=Remap(to="random")), []
    keep = module.denoise

    def denoise(noisy: Tensor, timesteps: Tensor, targets: Tensor, original: bool = False) -> Tensor:
        if original:
            labels.extend(targets.tolist())
        return keep(noisy, timesteps, targets, original)

    module.denoise = denoise  # type: ignore[method-assign, assignment]
    trainer(tmp_path, max_epochs=2).fit(module, datamodule=images(forget=ForgetClasses(list(forgotten))))
    assert set(labels) == {0, 1, 2} - set(forgotten)


def test_some_classes_forgotten_whole_and_some_in_part() -> None:
    """As a request of one's own may have it."""
    assert remapped(Remap(), [0, 1, 2], [1, 2]) == [1, 2, 1]


@pytest.mark.parametrize("alpha", [-0.1, float("nan")])
def test_alpha_out_of_range(alpha: float) -> None:
    with pytest.raises(ValueError, match=rf"^alpha must not be negative, got {alpha}\.$"):
        Remap(alpha)


def test_a_class_by_a_word_that_means_nothing() -> None:
    with pytest.raises(ValueError, match="previous"):
        Remap(to="previous")  # type: ignore[arg-type]


@pytest.mark.parametrize(("batch", "part"), [({"retain": RETAIN}, "forget"), ({"forget": FORGET}, "retain")])
def test_a_part_that_the_order_does_not_bring(batch: dict[str, Samples], part: str) -> None:
    with pytest.raises(ValueError, match=f"Remap needs the part '{part}' in each batch.*order 'paired'"):
        Remap().loss(attached(), batch)
