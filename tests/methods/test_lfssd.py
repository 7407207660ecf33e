"""LFSSD, which is SSD with another importance, against a few lines of torch."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from salun_lightning.methods import SSD
from salun_lightning.saliency import SaliencyMask, saliency_scores
from tests.methods.test_one_shot import edited, network
from tests.modules.small_diffusion import diffusion
from tests.small import small_datamodule


def importance(positions: Tensor) -> dict[str, Tensor]:
    """How much the squared norm of the output changes with each weight, in absolute value and on average."""
    reference, train = network().eval(), small_datamodule().load().train
    total = {name: torch.zeros_like(weight) for name, weight in reference.named_parameters()}
    for position in positions.tolist():
        norm = sum(logit**2 for logit in reference(train[position][0][None].float() / 255)[0])
        gradients = torch.autograd.grad(norm, list(reference.parameters()))
        for name, gradient in zip(total, gradients, strict=True):
            total[name] += gradient.abs() / len(positions)
    return total


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("alpha", "dampening"), [(1.0, 1.0), (1.1, 0.3)])
def test_it_is_that_of_the_reference(tmp_path: Path, alpha: float, dampening: float, masked: bool) -> None:
    mask = SaliencyMask.from_scores(saliency_scores(network(), [], "random", seed=1), 0.5) if masked else None
    module, data = edited(tmp_path, SSD(alpha, dampening, "output"), mask), small_datamodule()
    of_forget, of_all = importance(data.forget_indices), importance(torch.cat([data.forget_indices, data.retain_indices]))
    dampened = 0
    for name, weight in network().named_parameters():
        chosen = of_forget[name] > alpha * of_all[name]
        if mask is not None:
            chosen &= mask[name]
        factor = torch.minimum(dampening * of_all[name] / of_forget[name], torch.ones(()))
        expected = torch.where(chosen, weight * factor, weight)
        torch.testing.assert_close(module.network.get_parameter(name), expected)
        dampened += int((expected != weight).sum())
    assert 0 < dampened < sum(weight.numel() for weight in network().parameters())


def test_it_is_for_classifiers_and_ssd_is_for_any_model() -> None:
    assert diffusion(method=SSD()).method.kind == "any"
    with pytest.raises(ValueError, match="SSD is a method for classifier models; ClassDiffusion is none"):
        diffusion(method=SSD(importance="output"))


def test_another_importance_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^importance must be loss or output, got 'labels'"):
        SSD(importance="labels")  # type: ignore[arg-type]
