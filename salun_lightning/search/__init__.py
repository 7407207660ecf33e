"""Good values for the options of methods, found on pilot seeds."""

from salun_lightning.search.command import search

__all__ = ["search"]
