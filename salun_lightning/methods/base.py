"""What a method is."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from salun_lightning.data import Order, Samples

if TYPE_CHECKING:
    from salun_lightning.modules.base import UnlearningModule

Kind = Literal["any", "classifier", "diffusion", "text-to-image"]


class Method(Callback, ABC):
    """How a model forgets: the loss of one training step. Any method runs with or without a saliency mask.

    A method of your own is a subclass in one file with a :meth:`loss`. The module that it trains attaches it as a callback, so
    every hook of Lightning is there for it: prepare in ``on_train_start``, change gradients in ``on_after_backward``, keep what
    a resumed run needs in ``state_dict``. What a hook writes to weights outside the mask is put back before any checkpoint or
    validation.

    Example:
        >>> class Shout(Method):
        ...     def loss(self, module, batch):
        ...         return 2 * module.task_loss(part(batch, "retain", self))
        >>> Shout().order
        'paired'
    """

    order: Order = "paired"
    """The order of forget and retain batches it was published with; the datamodule's ``order`` overrides it."""

    needs_original: bool = False
    """Whether the module is to keep a frozen copy of the original model while it trains."""

    kind: Kind = "any"
    """The kind of model that it is for."""

    inner: "Sequence[Method]" = ()
    """Methods that this one is made of; their hooks are called before its own."""

    @abstractmethod
    def loss(self, module: "UnlearningModule", batch: Mapping[str, Samples]) -> Tensor | None:
        """The loss that the optimizer minimises.

        Args:
            module: The module that is trained.
            batch: The parts ``forget`` and ``retain``, as ``order`` brings them; either may be absent.

        Returns:
            A scalar; None if this batch is to be passed over, by all processes alike.
        """


def part(batch: Mapping[str, Samples], name: str, method: Method) -> Samples:
    """One part of a batch that a method cannot do without.

    Args:
        batch: What :meth:`Method.loss` is handed.
        name: ``forget`` or ``retain``.
        method: The method, which the message names.

    Raises:
        ValueError: The order of the batches does not bring it.
    """
    if name not in batch:
        raise ValueError(
            f"{type(method).__name__} needs the part '{name}' in each batch. Leave the datamodule's order unset: it is then the"
            f" method's own (order '{method.order}')."
        )
    return batch[name]


def all_of(method: Method) -> Iterator[Method]:
    """A method and those that it is made of, the inner ones first."""
    for inner in method.inner:
        yield from all_of(inner)
    yield method


def check_kind(method: Method, module: "UnlearningModule") -> None:
    """Refuse a method that is for another kind of model.

    Raises:
        ValueError: It is.
    """
    for inner in method.inner:
        check_kind(inner, module)
    served = ("any", "diffusion", module.kind) if module.kind == "text-to-image" else ("any", module.kind)
    if method.kind not in served:
        name = type(method).__name__
        raise ValueError(f"{name} is a method for {method.kind} models; {type(module).__name__} is none.")


def on_device(module: "UnlearningModule", batches: Iterable[Samples]) -> Iterator[Samples]:
    """Batches as the training loop would hand them to the module: on its device and in its precision.

    Args:
        module: The module that is trained.
        batches: Such as those of ``set_dataloader``.
    """
    strategy = module.trainer.strategy
    for samples in batches:
        yield strategy.batch_to_device(strategy.precision_plugin.convert_input(samples))


def number_of_epochs(method: Method, trainer: Trainer) -> float:
    """How many epochs a run has, also one that counts steps, whose ``max_epochs`` is -1.

    Args:
        method: The method, which the message names.
        trainer: The trainer.

    Raises:
        MisconfigurationException: The run has no end.
    """
    steps_of_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    return number_of_steps(method, trainer) / steps_of_epoch


def number_of_steps(method: Method, trainer: Trainer) -> int:
    """How many optimizer steps a run has.

    Args:
        method: The method, which the message names.
        trainer: The trainer.

    Raises:
        MisconfigurationException: The run has no end.
    """
    steps = trainer.estimated_stepping_batches
    if steps == math.inf:
        raise MisconfigurationException(
            f"What {type(method).__name__} does depends on how long a run is, but this run has no end. Give max_epochs or"
            " max_steps."
        )
    return int(steps)
