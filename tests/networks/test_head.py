"""The classification head of networks of several families."""

import pytest
import torch
from torch import nn
from torchvision import models

from salun_lightning.networks import SmallResNet, TorchvisionClassifier
from salun_lightning.networks.head import head_of
from salun_lightning.networks.stages import stages_of


class Several(nn.Module):
    """Logits, an auxiliary head of the same width, and a projection that nothing else comes out of; these were made later."""

    def __init__(self) -> None:
        super().__init__()
        self.logits, self.auxiliary, self.projection = nn.Linear(768, 5), nn.Linear(768, 5), nn.Linear(768, 8)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = images.flatten(1)
        return self.logits(features), self.auxiliary(features), self.projection(features)


@pytest.mark.parametrize(
    ("network", "name"),
    [
        (SmallResNet(5), "head"),
        (TorchvisionClassifier("resnet18", 5), "fc"),
        (models.VisionTransformer(16, 8, 1, 2, 16, 32, num_classes=5), "heads.head"),
        (models.SwinTransformer([2, 2], 8, [1, 1], [2, 2], [2, 2], num_classes=5), "head"),
        (torch.compile(nn.Sequential(nn.Flatten(), nn.Linear(768, 5))), "1"),
        (Several(), "logits"),
    ],
    ids=["small", "resnet", "vit", "swin", "compiled", "several"],
)
def test_the_head_is_the_layer_whose_answer_the_logits_are(network: nn.Module, name: str) -> None:
    images = torch.rand(2, 1 if isinstance(network, SmallResNet) else 3, 16, 16)
    found, layer = head_of(network.eval(), images)
    assert found == name
    assert layer.out_features == 5


@pytest.mark.parametrize("network", [nn.Sequential(nn.Flatten()), nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.Softmax(1))])
def test_no_head_is_said(network: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"^The logits of Sequential are the answer of no linear layer, so it is not known"):
        head_of(network, torch.rand(2, 1, 2, 2))


RESNET = [["layer1.0.conv1"], *([f"layer{i}.0.conv1", f"layer{i}.0.downsample.0"] for i in (2, 3, 4))]
SMALL = [["blocks.0.conv1"], ["blocks.1.conv1"], ["blocks.2.conv1", "blocks.2.shortcut.0"], ["blocks.3.conv1"]]
VIT = [[f"encoder.layers.encoder_layer_{i}.mlp.0"] for i in (0, 1)]
SWIN = [["features.1.0.mlp.0"], ["features.2.reduction"], ["features.3.0.mlp.0"]]


@pytest.mark.parametrize(
    ("network", "size", "expected"),
    [
        (SmallResNet(5, 3, 4, 2, 2), 8, SMALL),
        (TorchvisionClassifier("resnet18", 5), 32, RESNET),
        (models.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=5), 16, VIT),
        (
            models.SwinTransformer([2, 2], 8, [1, 1], [2, 2], [2, 2], num_classes=5),
            16,
            SWIN,
        ),
    ],
    ids=["small", "resnet", "vit", "swin"],
)
def test_stages_begin_where_blocks_do_and_end_with_the_head(network: nn.Module, size: int, expected: list[list[str]]) -> None:
    images = torch.rand(2, 3, size, size)
    stages = stages_of(network.eval(), images)
    names = [[operator.name for operator in stage] for stage in stages]
    assert names == [*expected, [head_of(network, images)[0]]]
    assert all(operator.inputs is stage[0].inputs for stage in stages for operator in stage)


def test_stages_by_a_regular_expression() -> None:
    network, images = SmallResNet(5, 3, 4, 2, 1).eval(), torch.rand(2, 3, 8, 8)
    named = [[operator.name for operator in stage] for stage in stages_of(network, images, r"stem|blocks\.1|conv2")]
    assert named == [["stem.0"], ["blocks.0.conv2"], ["blocks.1.conv1", "blocks.1.shortcut.0"], ["blocks.1.conv2"]]
    with pytest.raises(ValueError, match=r"^SmallResNet has no stage to edit: .* in whose name 'layer9' is found\. Name some"):
        stages_of(network, images, "layer9")
    with pytest.raises(ValueError, match=r"^Flatten has no stage to edit: no convolution or linear layer is called\. Name"):
        stages_of(nn.Flatten(), images)
