"""How a model forgets. One method, one file; pure maths on a module and its batch.

A new method is a new file in this folder and nothing else: the names of the package are those of the public subclasses of
``Method`` in its files. (Type checkers know those that are imported here, and take the others as they come.)
"""

from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn

from salun_lightning.methods.base import Method, part
from salun_lightning.methods.one_shot import OneShot  # noqa: F401  # found below; here for type checkers

GROUP = "salun_lightning.methods"


def _methods_in(module: ModuleType) -> dict[str, type[Method]]:
    own = {name: thing for name, thing in vars(module).items() if getattr(thing, "__module__", "") == module.__name__}
    return {name: kind for name, kind in own.items() if isinstance(kind, type) and issubclass(kind, Method) and name[0] != "_"}


_found: dict[str, Any] = {"part": part}
for _file in iter_modules(__path__, f"{__name__}."):
    _found |= _methods_in(import_module(_file.name))
globals().update(_found)
__all__ = sorted(_found)  # noqa: PLE0605

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...


def load_offered() -> None:
    """Import the methods that other packages offer, so that a configuration can name them by their class name alone.

    A package offers a method in its ``pyproject.toml``::

        [project.entry-points."salun_lightning.methods"]
        Shout = "shouting.methods:Shout"
    """
    for offer in entry_points(group=GROUP):
        try:
            kind = offer.load()
        except (ImportError, AttributeError) as error:
            rank_zero_warn(f"The method {offer.name} of another package cannot be imported: {error}. Repair or remove it.")
            continue
        if not (isinstance(kind, type) and issubclass(kind, Method) and kind.__name__ == offer.name):
            rank_zero_warn(
                f"The entry point {offer.name} of {GROUP} is '{offer.value}', which is no method of that name. Offer a subclass"
                " of Method under the name of its class."
            )
