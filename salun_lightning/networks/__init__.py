"""Networks that the configurations name, and their weights. They take images in [0, 1] and normalise inside."""

from salun_lightning.networks.loading import export_state_dict
from salun_lightning.networks.small_resnet import SmallResNet
from salun_lightning.networks.torchvision_classifier import TorchvisionClassifier

__all__ = ["SmallResNet", "TorchvisionClassifier", "export_state_dict"]
