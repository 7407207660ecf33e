"""Metrics of forgetting, for torchmetrics."""

from salun_lightning.metrics.distribution import Distribution
from salun_lightning.metrics.manifold import manifold_precision_recall
from salun_lightning.metrics.membership import MembershipInference
from salun_lightning.metrics.recognition import Recognition

__all__ = ["Distribution", "MembershipInference", "Recognition", "manifold_precision_recall"]
