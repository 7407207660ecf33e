"""The LightningModules.

What needs diffusers is imported on first use, because that takes seconds.
"""

from importlib import import_module
from typing import Any

from salun_lightning.modules.base import UnlearningModule
from salun_lightning.modules.classifier import ImageClassifier
from salun_lightning.modules.unlearn import Unlearn

_SLOW = {"ClassDiffusion": "class_diffusion", "Diffusion": "diffusion", "Sampling": "sampling", "TextToImage": "text_to_image"}

__all__ = ["ClassDiffusion", "Diffusion", "ImageClassifier", "Sampling", "TextToImage", "Unlearn", "UnlearningModule"]


def __getattr__(name: str) -> Any:
    if name not in _SLOW:
        raise AttributeError(f"module 'salun_lightning.modules' has no attribute '{name}'")
    return getattr(import_module(f"salun_lightning.modules.{_SLOW[name]}"), name)
