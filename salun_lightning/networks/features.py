"""What networks see in images: the features that distances between sets of images are taken of."""

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance  # torchmetrics.image names it only beside torch-fidelity
from typing_extensions import override


def last_linear(network: nn.Module) -> nn.Linear | None:
    """The last linear layer of a network, by the order in which its parts were made; None if it has none."""
    layers = [child for child in network.modules() if isinstance(child, nn.Linear)]
    return layers[-1] if layers else None


def logits_and_features(classifier: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """What a classifier answers, and what its last linear layer sees, from one pass.

    Args:
        classifier: Maps images to logits (B, classes), by a linear layer in the end.
        images: (B, C, H, W).

    Returns:
        Logits (B, classes) and features (B, D).
    """
    last = last_linear(classifier)
    assert last is not None
    seen: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        return classifier(images), seen[0].flatten(1).float()
    finally:
        handle.remove()


class Inception(nn.Module):
    """Inception with 2,048 features, as the FID of torchmetrics takes it: from uint8 images with three channels.

    Raises:
        ModuleNotFoundError: torch-fidelity is not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = FrechetInceptionDistance(2048).inception

    @override
    def forward(self, images: Tensor) -> Tensor:
        coloured = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        features: Tensor = self.network((255 * coloured).round().to(torch.uint8))
        return features
