"""What a method is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from salun_lightning.data import Order, Samples


class Trainee(Protocol):
    """What a method may ask of the module that it trains."""

    @property
    def current_epoch(self) -> int:
        """The number of the epoch, from 0."""
        ...

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        ...

    def task_loss(self, samples: Samples) -> Tensor:
        """The ordinary training loss, as a mean over the samples; a scalar."""
        ...


class Method(ABC):
    """How a model forgets: the loss of one training step. Any method runs with or without a saliency mask.

    A method of your own is a subclass in one file: set :attr:`order` and write :meth:`loss`.
    """

    order: Order
    """The order of forget and retain batches it was published with; the datamodule's ``order`` overrides it."""

    @abstractmethod
    def loss(self, module: Trainee, batch: Mapping[str, Samples]) -> Tensor:
        """The loss that the optimizer minimises.

        Args:
            module: The module that is trained.
            batch: The parts ``forget`` and ``retain``, as ``order`` brings them; either may be absent.

        Returns:
            A scalar.
        """

    def part(self, batch: Mapping[str, Samples], name: str) -> Samples:
        """One part of a batch that the method cannot do without.

        Raises:
            ValueError: The order of the batches does not bring it.
        """
        if name not in batch:
            raise ValueError(
                f"{type(self).__name__} needs the part '{name}' in each batch. Leave the datamodule's order unset: it is then"
                f" the method's own (order '{self.order}')."
            )
        return batch[name]
