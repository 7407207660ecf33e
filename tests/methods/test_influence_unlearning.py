"""IU against a dense solve on a tiny network."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from salun_lightning.methods.influence_unlearning import InfluenceUnlearning
from salun_lightning.saliency import SaliencyMask, saliency_scores
from tests.methods.test_one_shot import edited, network
from tests.small import small_datamodule


def gradients_of(positions: Tensor) -> Tensor:
    """Of the loss of each of these training samples, as rows, in double precision."""
    reference, train = network().eval().double(), small_datamodule().load().train
    rows = []
    for position in positions.tolist():
        image, target = train[position]
        loss = functional.cross_entropy(reference(image[None].double() / 255), target[None])
        rows.append(torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(reference.parameters()))]))
    return torch.stack(rows)


def dense(samples: int, damping: float) -> tuple[Tensor, Tensor]:
    """The step of alpha 1, and the push that it is made of."""
    data = small_datamodule()
    forget, retain = gradients_of(data.forget_indices), gradients_of(data.retain_indices)
    push = torch.cat([forget, retain]).mean(0) - retain.mean(0)  # the gradient of the whole risk less that of the retained one
    some = retain[[number * len(retain) // samples for number in range(samples)]]
    matrix = damping * torch.eye(some.shape[1]).double() + some.T @ some / samples
    return torch.linalg.solve(matrix, push), push


def flat(module: Any) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in module.parameters()]).double()


def half() -> SaliencyMask:
    return SaliencyMask.from_scores(saliency_scores(network(), [], "random", seed=1), 0.5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("alpha", "damping", "samples"), [(1.0, 0.1, 48), (0.5, 1e-3, 7), (2.0, 1.0, 1)])
def test_the_step_is_that_of_a_dense_solve(tmp_path: Path, alpha: float, damping: float, samples: int, masked: bool) -> None:
    mask = half() if masked else None
    after = flat(edited(tmp_path, InfluenceUnlearning(alpha, damping, samples), mask).network)
    step, before = alpha * dense(samples, damping)[0], flat(network())
    if mask is not None:
        step = step * torch.cat([mask[name].flatten() for name, _ in network().named_parameters()])
    assert step.abs().max() > 1e-2
    torch.testing.assert_close(after - before, step, rtol=1e-3, atol=1e-4 * float(step.abs().max()))


def test_with_much_damping_it_is_a_step_up_the_forget_loss(tmp_path: Path) -> None:
    push = dense(5, 1.0)[1]
    step = flat(edited(tmp_path, InfluenceUnlearning(alpha=1e6, damping=1e6, samples=5)).network) - flat(network())
    torch.testing.assert_close(step, push, rtol=1e-3, atol=1e-6)
    data = small_datamodule()
    for positions, direction in ((data.forget_indices, 1), (data.retain_indices, -1)):
        assert float(gradients_of(positions).mean(0) @ push) * direction > 0


def test_more_samples_than_are_retained_are_all_of_them(tmp_path: Path) -> None:
    many, all_of_them = (flat(edited(tmp_path, InfluenceUnlearning(samples=count)).network) for count in (1000, 48))
    assert torch.equal(many, all_of_them)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"alpha": -1.0}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"alpha": float("inf")}, "alpha"),
        ({"damping": 0.0}, "damping"),
        ({"damping": float("nan")}, "damping"),
        ({"samples": 0}, "samples"),
    ],
)
def test_numbers_out_of_range(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=rf"^{named} must be .*\. Give "):
        InfluenceUnlearning(**settings)
