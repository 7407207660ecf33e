"""The projection of DAMP against a few lines of torch, and what it promises: retained means pass as before."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from salun_lightning.data import ForgetClasses
from salun_lightning.methods import DAMP, damp
from salun_lightning.saliency import SaliencyMask, saliency_scores
from tests.methods.whole_class import CLASSES, FORGOTTEN, NOT_WHOLE, data, images, network, trained
from tests.modules.small_runs import same, weights

BEFORE = {"3.weight": 3, "6.weight": 6}  # the edited weights, and how many layers lie before them


def means(layer: int) -> Tensor:
    """The mean input of each class, (classes, channels)."""
    pixels, targets = images().images.float() / 255, images().targets
    with torch.no_grad():
        inputs = network().eval()[:layer](pixels)
    inputs = inputs.mean((2, 3)) if inputs.ndim == 4 else inputs
    return torch.stack([inputs[targets == number].mean(0) for number in range(CLASSES)])


def directions(layer: int, forgotten: list[int]) -> Tensor:
    """What is left of each forgotten mean without the retained ones, by least squares, (forgotten, channels)."""
    every = means(layer).double()
    retained = every[[number for number in range(CLASSES) if number not in forgotten]].T
    return torch.stack([every[f] - retained @ torch.linalg.lstsq(retained, every[f]).solution for f in forgotten])


@pytest.fixture
def half(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe that is right in three of four cases."""
    monkeypatch.setattr(damp, "_separability", lambda forget, retain: 0.5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("forgotten", [[FORGOTTEN], [0, 3]])
@pytest.mark.usefixtures("half")
def test_the_edit_is_that_of_the_reference(forgotten: list[int], masked: bool, tmp_path: Path) -> None:
    mask = SaliencyMask.from_scores(saliency_scores(network(), [], "random", seed=1), 0.5) if masked else None
    before = weights(network())
    module = trained(tmp_path, DAMP(strength=0.8), mask, data=data(ForgetClasses(list(forgotten))))
    after = weights(module.network)
    for depth, (name, layer) in enumerate(BEFORE.items(), start=1):
        basis = torch.linalg.qr(directions(layer, forgotten).T).Q
        projector = torch.eye(len(basis), dtype=torch.float64) - 0.8 * 0.5 * depth / 2 * basis @ basis.T
        whole = torch.tensordot(before[name].double().movedim(1, -1), projector, 1).movedim(-1, 1).float()
        expected = whole if mask is None else torch.where(mask[name], whole, before[name])
        torch.testing.assert_close(after.pop(name), expected)
        assert not torch.equal(expected, before.pop(name))
    assert same(before, after)


def test_retained_means_pass_as_before_and_the_forgotten_direction_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At full strength in the last layer."""
    monkeypatch.setattr(damp, "_separability", lambda forget, retain: 1.0)
    module = trained(tmp_path, DAMP(layers="^6$"))
    before, after = (weights(some)["6.weight"].double() for some in (network(), module.network))
    retained = means(6).double()[[number for number in range(CLASSES) if number != FORGOTTEN]].T
    (direction,) = directions(6, [FORGOTTEN])
    torch.testing.assert_close(after @ retained, before @ retained, atol=1e-5, rtol=1e-5)
    assert (before @ direction).norm() > 0.01 * direction.norm()
    assert (after @ direction).norm() < 1e-5 * direction.norm()


def test_the_probe_is_balanced_and_held_out() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(600, 4, generator=generator, dtype=torch.float64)
    assert damp._separability(noise[:60] + 9, noise[60:]) == 1
    assert damp._separability(noise[:60], noise[60:]) < 0.3  # to say "retain" each time would be right nine times of ten
    wide = torch.randn(40, 400, generator=generator, dtype=torch.float64)
    assert damp._separability(wide[:20], wide[20:]) < 0.6  # which a probe has by heart that was trained on all of them
    with pytest.raises(ValueError, match=r"^DAMP holds out half of each set, so it needs two images to forget"):
        damp._separability(noise[:1], noise[1:])


def test_the_sample_for_the_probe_does_not_depend_on_batches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(damp, "_PROBED", 5)
    found: list[tuple[Tensor, Tensor]] = []
    monkeypatch.setattr(damp, "_separability", lambda forget, retain: found.append((forget, retain)) or 1.0)
    for size in (16, 7):
        trained(tmp_path, DAMP(layers="^6$"), data=data(batch_size=size))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert [len(rows) for rows in found[0]] == [4, 5]  # every third of 12, every eighth of 36


def test_a_mask_of_ratio_0_keeps_all_bits(tmp_path: Path) -> None:
    assert same(weights(network()), weights(trained(tmp_path, DAMP(), 0.0).network))


def test_what_is_not_trained_is_not_edited(tmp_path: Path) -> None:
    some = network()
    some[3].weight.requires_grad_(False)
    after = weights(trained(tmp_path, DAMP(), network=some).network)
    assert [name for name, before in weights(network()).items() if not torch.equal(after[name], before)] == ["6.weight"]


def test_where_retained_classes_span_everything_nothing_can_be_taken_away(tmp_path: Path) -> None:
    torch.manual_seed(1)
    narrow = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, CLASSES))
    with pytest.raises(MisconfigurationException, match=r"^In none of 1 stages does a forgotten class differ .* Choose a"):
        trained(tmp_path, DAMP(), network=narrow)


def test_a_request_of_single_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^DAMP makes a model forget whole classes, but this request leaves .* Ask for"):
        trained(tmp_path, DAMP(), data=data(NOT_WHOLE))


@pytest.mark.parametrize("strength", [-0.1, 1.5, float("nan")])
def test_a_strength_out_of_range(strength: Any) -> None:
    with pytest.raises(ValueError, match=r"^strength must lie between 0 and 1, got .* The published method has 1\."):
        DAMP(strength=strength)
