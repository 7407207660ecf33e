"""The LightningModules.

``ClassDiffusion`` is imported by its own name only, because diffusers takes seconds to import.
"""

from salun_lightning.modules.base import UnlearningModule
from salun_lightning.modules.classifier import ImageClassifier
from salun_lightning.modules.writer import ProbabilityWriter

__all__ = ["ImageClassifier", "ProbabilityWriter", "UnlearningModule"]
