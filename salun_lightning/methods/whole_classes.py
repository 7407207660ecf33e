"""What methods ask that forget a whole class, and no single images."""

from typing import TYPE_CHECKING

from salun_lightning.methods.base import Method

if TYPE_CHECKING:
    from salun_lightning.modules.base import UnlearningModule


def forgotten_classes(method: Method, module: "UnlearningModule") -> list[int]:
    """The classes that are forgotten whole.

    Args:
        method: The method, which the message names.
        module: The module that it trains.

    Raises:
        ValueError: There are none.
    """
    classes: list[int] = getattr(module.datamodule, "forgotten_classes", [])
    if not classes:
        raise ValueError(
            f"{type(method).__name__} makes a model forget whole classes, but this request leaves images of each class. Ask for"
            " ForgetClasses, or choose another method."
        )
    return classes
