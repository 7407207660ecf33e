"""Any classifier of torchvision, with an optional stem for small images."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torchvision import models
from typing_extensions import override

from salun_lightning.networks.normalize import Normalize

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)


class TorchvisionClassifier(nn.Module):
    """A torchvision classifier by name, with normalisation inside.

    Args:
        name: What ``torchvision.models.get_model`` knows, such as ``resnet18`` or ``vgg16_bn``.
        num_classes: The number of classes; by default that of ``weights``.
        cifar_stem: Replace the first convolution of a ResNet by a 3 x 3 one of stride 1 and drop its max-pooling, for 32 x 32
            images; with ``resnet18`` and 10 classes this is the paper's network of 11,173,962 weights.
        mean: Mean of each channel of images in [0, 1]; by default that of CIFAR-10.
        std: Standard deviation of each channel; by default that of CIFAR-10.
        model_kwargs: Further arguments of the torchvision model. Auxiliary heads are left out unless asked for.
        weights: Weights that torchvision offers, such as ``DEFAULT`` or ``IMAGENET1K_V1``, in the place of random ones. They
            are downloaded at the first use. Images are then prepared as these weights need it, in size, too, whatever ``mean``
            and ``std``.

    Raises:
        ValueError: torchvision knows no such classifier or weights, ``cifar_stem`` does not fit it, or there is no number of
            classes.

    Example:
        >>> network = TorchvisionClassifier("resnet18", num_classes=10, cifar_stem=True)
        >>> sum(parameter.numel() for parameter in network.parameters())
        11173962
    """

    def __init__(
        self,
        name: str,
        num_classes: int | None = None,
        cifar_stem: bool = False,
        mean: Sequence[float] = CIFAR_MEAN,
        std: Sequence[float] = CIFAR_STD,
        model_kwargs: dict[str, Any] | None = None,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        if name not in models.list_models(module=models):
            raise ValueError(f"torchvision has no classifier '{name}'. It has: {', '.join(models.list_models(module=models))}.")
        pretrained = None if weights is None else _weights(name, weights)
        if num_classes is None and pretrained is None:
            raise ValueError("Give num_classes: without weights, the number of classes is not known.")
        auxiliary = {"aux_logits": False} if pretrained is None and name in {"googlenet", "inception_v3"} else {}
        self.normalize = Normalize(mean, std) if pretrained is None else pretrained.transforms()
        classes = {} if num_classes is None else {"num_classes": num_classes}
        self.model = models.get_model(name, weights=pretrained, **classes, **{**auxiliary, **(model_kwargs or {})})
        if cifar_stem:
            conv = getattr(self.model, "conv1", None)
            if not isinstance(conv, nn.Conv2d) or not hasattr(self.model, "maxpool"):
                raise ValueError(f"cifar_stem replaces the first layers of a ResNet; '{name}' has none such.")
            self.model.conv1 = nn.Conv2d(3, conv.out_channels, 3, stride=1, padding=1, bias=False)
            nn.init.kaiming_normal_(self.model.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.model.maxpool = nn.Identity()

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, 3, H, W) in [0, 1]."""
        logits: Tensor = self.model(self.normalize(images))
        return logits


def _weights(name: str, weights: str) -> Any:
    offered = models.get_model_weights(name)
    if weights not in offered.__members__:
        raise ValueError(f"torchvision has no weights '{weights}' of {name}. It has: {', '.join(offered.__members__)}.")
    return offered[weights]
