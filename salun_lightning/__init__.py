"""Machine unlearning with PyTorch Lightning: SalUn and the methods it is compared with.

The names below are imported on first use, so that ``import salun_lightning`` costs nothing.
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any

_WHERE = {
    "CIFAR100DataModule": "data",
    "CIFAR10DataModule": "data",
    "ClassDiffusion": "modules.diffusion",
    "DigitsDataModule": "data",
    "ESD": "methods",
    "FineTune": "methods",
    "ForgetClasses": "data",
    "ForgetIndices": "data",
    "ForgetRandom": "data",
    "ForgetRetainDataModule": "data",
    "GenerationQuality": "metrics",
    "GradientAscent": "methods",
    "ImageClassifier": "modules",
    "ImageFolderDataModule": "data",
    "MembershipInference": "metrics",
    "Method": "methods",
    "NegGradPlus": "methods",
    "RandomLabel": "methods",
    "Remap": "methods",
    "STL10DataModule": "data",
    "SVHNDataModule": "data",
    "SaliencyMask": "saliency",
    "SaliencyMasking": "saliency",
    "Sampling": "modules.sampling",
    "SelectiveAmnesia": "methods",
    "SmallResNet": "networks",
    "TorchvisionClassifier": "networks",
    "WrongLabels": "data",
    "export_state_dict": "networks.loading",
    "saliency_scores": "saliency",
}

__all__ = sorted(_WHERE)  # noqa: PLE0605
__version__ = version("salun_lightning")


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'salun_lightning' has no attribute '{name}'")
    return getattr(import_module(f"salun_lightning.{_WHERE[name]}"), name)
