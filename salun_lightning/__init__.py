"""Machine unlearning with PyTorch Lightning: SalUn and the methods it is compared with.

The names are those that the packages below list in their ``__all__``, and the methods. They are imported on first use, so that
``import salun_lightning`` costs nothing.
"""

import ast
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

_PACKAGES = ("callbacks", "data", "metrics", "modules", "networks", "saliency")

__version__ = version("salun_lightning")


@cache
def _names() -> dict[str, str]:
    """The package of each name, from the texts alone: a look for a name must not import what is being imported."""
    here, names = Path(__file__).parent, {}
    for package in _PACKAGES:
        for node in ast.parse((here / package / "__init__.py").read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
                names.update(dict.fromkeys(ast.literal_eval(node.value), package))
    for file in (here / "methods").glob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                names[node.name] = "methods"
    return names


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted(_names())
    if name not in _names():
        raise AttributeError(f"module 'salun_lightning' has no attribute '{name}'")
    return getattr(import_module(f"salun_lightning.{_names()[name]}"), name)
