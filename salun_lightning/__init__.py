"""Machine unlearning with PyTorch Lightning: SalUn and the methods it is compared with.

The names are those that the packages below list in their ``__all__``. They are imported on first use, so that
``import salun_lightning`` costs nothing.
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any

_PACKAGES = ("callbacks", "data", "methods", "metrics", "modules", "networks", "saliency")

__version__ = version("salun_lightning")


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted({name for package in _PACKAGES for name in _package(package).__all__})
    for package in _PACKAGES if not name.startswith("_") else ():
        if name in _package(package).__all__:
            return getattr(_package(package), name)
    raise AttributeError(f"module 'salun_lightning' has no attribute '{name}'")


def _package(name: str) -> Any:
    return import_module(f"salun_lightning.{name}")
