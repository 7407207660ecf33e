"""Runs methods x seeds against a paired retrained model, and reports."""

from salun_lightning.comparison.command import compare
from salun_lightning.comparison.rows import Row

__all__ = ["Row", "compare"]
