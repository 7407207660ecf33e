"""Fisher forgetting: how large the noise on each weight is, against the definition, and what it depends on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from salun_lightning.methods.fisher_forgetting import FisherForgetting
from salun_lightning.saliency import SaliencyMask, saliency_scores
from tests.methods.test_one_shot import edited, network
from tests.modules.small_diffusion import diffusion
from tests.small import small_datamodule


def fisher(positions: Tensor) -> Tensor:
    """The diagonal of the Fisher information, by its definition: labels are those of the model."""
    reference, train = network().eval(), small_datamodule().load().train
    total: Any = 0
    for position in positions.tolist():
        chances = reference(train[position][0][None].float() / 255).softmax(1)[0]
        for chance in chances:
            parts = torch.autograd.grad(chance.log(), list(reference.parameters()), retain_graph=True)
            total = total + chance.detach() * torch.cat([part.flatten() for part in parts]) ** 2
    return total / len(positions)


def noise(folder: Path, mask: SaliencyMask | None = None, **settings: Any) -> Tensor:
    before, after = network(), edited(folder, FisherForgetting(**{"alpha": 1.0, **settings}), mask).network
    pairs = zip(after.parameters(), before.parameters(), strict=True)
    return torch.cat([(one - other).detach().flatten() for one, other in pairs])


@pytest.mark.parametrize("power", [0.25, 0.5])
@pytest.mark.parametrize("samples", [None, 7])
def test_noise_is_smaller_where_the_retain_set_needs_a_weight(tmp_path: Path, power: float, samples: int | None) -> None:
    positions = small_datamodule().retain_indices
    used = positions if samples is None else positions[[number * len(positions) // samples for number in range(samples)]]
    unit = noise(tmp_path, power=0.0)  # the same numbers, whatever the power
    found = noise(tmp_path, power=power, alpha=0.5, floor=1e-4, samples=samples)
    torch.testing.assert_close(found, 0.5 * unit * (fisher(used) + 1e-4) ** -power, rtol=1e-3, atol=1e-5)


def test_the_noise_is_normal_and_depends_on_the_seed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = noise(tmp_path, power=0.0, samples=1)
    assert abs(unit.mean()) < 0.3
    assert 0.8 < unit.std() < 1.2
    torch.rand(3)
    state = torch.get_rng_state()
    assert torch.equal(noise(tmp_path, power=0.0, samples=1), unit)
    torch.manual_seed(0)
    first = torch.randn(len(unit))
    assert abs(torch.corrcoef(torch.stack([first, unit]))[0, 1]) < 0.4  # not the numbers that the weights are drawn from
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert not torch.isclose(noise(tmp_path, power=0.0, samples=1), unit, atol=1e-3).all()
    assert len(state)


def test_nothing_moves_outside_the_mask(tmp_path: Path) -> None:
    mask = SaliencyMask.from_scores(saliency_scores(network(), [], "random", seed=1), 0.5)
    inside = torch.cat([mask[name].flatten() for name, _ in network().named_parameters()])
    masked, whole = noise(tmp_path, mask), noise(tmp_path)
    assert torch.equal(masked, torch.where(inside, whole, 0))
    assert inside.any()


def test_it_is_for_classifiers() -> None:
    with pytest.raises(ValueError, match="FisherForgetting is a method for classifier models; ClassDiffusion is none"):
        diffusion(method=FisherForgetting())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"alpha": -1.0}, "alpha and power"),
        ({"alpha": float("nan")}, "alpha and power"),
        ({"power": -0.25}, "alpha and power"),
        ({"floor": 0.0}, "floor"),
        ({"floor": float("nan")}, "floor"),
        ({"samples": 0}, "samples"),
    ],
)
def test_numbers_out_of_range(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=rf"^{named} must be .*\. Give "):
        FisherForgetting(**settings)
