"""Metrics of forgetting, for torchmetrics."""

from salun_lightning.metrics.membership import MembershipInference

__all__ = ["MembershipInference"]
