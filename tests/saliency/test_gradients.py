"""Sums of gradients against autograd, sample by sample."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from salun_lightning.saliency import gradient_sums
from tests.saliency.helpers import Plain, copied, images_and_targets, loader, same_weights


def by_hand(of_each: Callable[[Tensor], Tensor], count: int = 25) -> dict[str, Tensor]:
    """In eval mode, one sample at a time."""
    module = Plain().eval()
    weights = dict(module.net.named_parameters())
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for image, target in [images_and_targets()[i] for i in range(count)]:
        gradients = torch.autograd.grad(functional.cross_entropy(module.net(image[None]), target[None]), list(weights.values()))
        for name, gradient in zip(weights, gradients, strict=True):
            sums[name] += of_each(gradient)
    return {f"net.{name}": total for name, total in sums.items()}


@pytest.mark.parametrize(
    ("settings", "of_each"), [({}, Tensor.clone), ({"squared": True}, Tensor.square), ({"absolute": True}, Tensor.abs)]
)
@pytest.mark.parametrize("size", [1, 4, 25])
def test_every_sample_counts_once_with_its_sign_or_by_its_own_size(settings, of_each, size):
    module = Plain()
    before = copied(module)
    found, expected = gradient_sums(module, loader(batch_size=size), **settings), by_hand(of_each)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert any((total < 0).any() for total in found.values()) == (not settings)
    assert same_weights(copied(module), before)
    assert module.training
    assert all(weight.grad is None for weight in module.parameters())


def test_another_loss_and_some_of_the_weights():
    module = Plain()
    weights = {"last": module.net[7].weight}
    found = gradient_sums(module, loader(), loss=lambda batch: module.net(batch[0]).mean(0).sum(), weights=weights)
    hidden = module.eval().net[:7](images_and_targets().tensors[0]).sum(0)
    assert list(found) == ["last"]
    torch.testing.assert_close(found["last"], hidden.expand(3, 15), rtol=1e-4, atol=1e-5)


def test_squared_and_absolute_at_once_is_refused():
    with pytest.raises(ValueError, match=r"^Gradients can be squared or absolute, not both\. Choose one"):
        gradient_sums(Plain(), loader(), squared=True, absolute=True)


def test_no_sample_is_refused():
    with pytest.raises(ValueError, match="There is no sample to take the gradient of"):
        gradient_sums(Plain(), [])
