"""The LightningModules.

``ClassDiffusion`` is imported by its own name only, because diffusers takes seconds to import.
"""

from salun_lightning.modules.base import UnlearningModule
from salun_lightning.modules.classifier import ImageClassifier
from salun_lightning.modules.image_writer import ImageWriter

__all__ = ["ImageClassifier", "ImageWriter", "UnlearningModule"]
