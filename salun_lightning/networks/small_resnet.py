"""A small residual network for small images."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from salun_lightning.networks.normalize import Normalize


class SmallResNet(nn.Module):
    """Residual stages of doubling width and halving resolution (He et al., CVPR 2016, section 4.2, CIFAR networks).

    With three stages of one block it has 8 layers of weights, with three blocks 20.

    Args:
        num_classes: The number of classes.
        in_channels: Channels of the images.
        width: Channels of the first stage.
        stages: The number of stages.
        blocks: Residual blocks a stage.
        mean: Mean of each channel of images in [0, 1].
        std: Standard deviation of each channel.

    Raises:
        ValueError: A size is not positive.

    Example:
        >>> import torch
        >>> SmallResNet(num_classes=10)(torch.zeros(4, 1, 8, 8)).shape
        torch.Size([4, 10])
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 1,
        width: int = 16,
        stages: int = 3,
        blocks: int = 1,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.5,),
    ) -> None:
        super().__init__()
        sizes = {"num_classes": num_classes, "in_channels": in_channels, "width": width, "stages": stages, "blocks": blocks}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be positive, got {size}.")
        self.normalize = Normalize(mean, std)
        self.stem = nn.Sequential(_convolution(in_channels, width), nn.BatchNorm2d(width), nn.ReLU())
        layers: list[nn.Module] = []
        channels = width
        for stage in range(stages):
            for block in range(blocks):
                out_channels = width * 2**stage
                layers.append(_Block(channels, out_channels, stride=2 if stage > 0 and block == 0 else 1))
                channels = out_channels
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes)

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, C, H, W) in [0, 1]."""
        features = self.blocks(self.stem(self.normalize(images)))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


class _Block(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _convolution(in_channels, out_channels, stride)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = _convolution(out_channels, out_channels)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and in_channels == out_channels
            else nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))
        )

    @override
    def forward(self, features: Tensor) -> Tensor:
        hidden = functional.relu(self.norm1(self.conv1(features)))
        return functional.relu(self.norm2(self.conv2(hidden)) + self.shortcut(features))


def _convolution(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    convolution = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution
