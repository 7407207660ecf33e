"""Metrics of forgetting, for torchmetrics."""

from salun_lightning.metrics.generation import GenerationQuality
from salun_lightning.metrics.manifold import manifold_precision_recall

__all__ = ["GenerationQuality", "manifold_precision_recall"]
