"""Metrics of forgetting, for torchmetrics."""

from salun_lightning.metrics.distribution import Distribution
from salun_lightning.metrics.manifold import manifold_precision_recall

__all__ = ["Distribution", "manifold_precision_recall"]
