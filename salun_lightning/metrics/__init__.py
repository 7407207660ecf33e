"""Metrics of forgetting, for torchmetrics."""

from salun_lightning.metrics.generation import GenerationQuality
from salun_lightning.metrics.manifold import manifold_precision_recall
from salun_lightning.metrics.membership import MembershipInference

__all__ = ["GenerationQuality", "MembershipInference", "manifold_precision_recall"]
