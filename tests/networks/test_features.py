"""What networks see in images."""

import importlib.util

import pytest
import torch
from torch import Tensor, nn

from salun_lightning.networks.features import Inception, last_linear, logits_and_features


class Judge(nn.Module):
    """A classifier with two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 5), nn.Linear(5, 3)

    def hidden(self, images: Tensor) -> Tensor:
        return self.first(images.flatten(1)).tanh()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.last(self.hidden(images))
        return logits


def test_features_are_what_the_last_linear_layer_sees() -> None:
    judge, images = Judge(), torch.rand(6, 1, 4, 4)
    logits, features = logits_and_features(judge, images)
    assert torch.equal(logits, judge(images))
    assert torch.equal(features, judge.hidden(images))
    assert not judge.last._forward_pre_hooks


def test_a_classifier_that_fails_is_left_without_hooks() -> None:
    judge = Judge()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        logits_and_features(judge, torch.rand(2, 1, 5, 5))
    assert not judge.last._forward_pre_hooks


def test_a_network_without_a_linear_layer() -> None:
    assert last_linear(nn.Conv2d(1, 1, 3)) is None


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is not None, reason="torch-fidelity is installed")
def test_inception_without_torch_fidelity_is_explained() -> None:
    with pytest.raises(ModuleNotFoundError, match="pip install torch-fidelity"):
        Inception()


@pytest.mark.parametrize("channels", [1, 3])
def test_inception_takes_bytes_with_three_channels(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Tensor] = []

    class Distance:
        def __init__(self, feature: int) -> None:
            assert feature == 2048
            self.inception = Seen()

    class Seen(nn.Module):
        def forward(self, batch: Tensor) -> Tensor:
            given.append(batch)
            return batch.flatten(1).float()

    monkeypatch.setattr("salun_lightning.networks.features.FrechetInceptionDistance", Distance)
    images = torch.rand(5, channels, 4, 4)
    Inception()(images)
    assert given[0].dtype == torch.uint8
    assert torch.equal(given[0], (255 * images).round().to(torch.uint8).expand(-1, 3, -1, -1))
