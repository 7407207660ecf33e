"""What a method is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Protocol, cast

from torch import Tensor, nn

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


class Denoiser(Trainee, Protocol):
    """What a method may further ask of a diffusion model. Noisy images and predictions have shape (B, C, H, W)."""

    network: nn.Module

    @property
    def reference(self) -> nn.Module:
        """The original network: frozen, in eval mode. There for methods that set :attr:`Method.needs_original`."""
        ...

    @property
    def retained_classes(self) -> Tensor:
        """The classes that are not forgotten whole, int64."""
        ...

    def seeded_loss(self, samples: Samples) -> Tensor:
        """The task loss with noise and timesteps that depend on the seed and the numbers of the samples alone."""
        ...

    def noised(self, samples: Samples) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy images, the timesteps (B,) of their noise, and what the network should predict from them."""
        ...

    def denoise(self, noisy: Tensor, timesteps: Tensor, targets: Tensor | None = None, original: bool = False) -> Tensor:
        """The prediction for classes (B,), or without a class; by the network in training or by the original model."""
        ...

    def partly_sampled(self, targets: Tensor, guidance: float, steps: int) -> tuple[Tensor, Tensor]:
        """Where the original model is, after a random number out of ``steps``, on its way to images of classes (B,).

        Returns:
            Noisy images and timesteps (B,).
        """
        ...

    def sample(self, targets: Tensor, indices: Tensor, original: bool = False) -> Tensor:
        """Images in [0, 1] of classes (B,), each from the noise that belongs to its number (B,)."""
        ...


class Method(ABC):
    """How a model forgets: the loss of one training step. Any method runs with or without a saliency mask.

    A method of your own is a subclass in one file: set :attr:`order` and write :meth:`loss`.
    """

    order: Order
    """The order of forget and retain batches it was published with; the datamodule's ``order`` overrides it."""

    needs_original: bool = False
    """Whether the module is to keep a frozen copy of the original model while it trains."""

    def start(self, module: Trainee) -> None:  # noqa: B027  # most methods have nothing to prepare
        """Prepare for training. Called when training starts or is resumed."""

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

    def denoiser(self, module: Trainee) -> Denoiser:
        """The module as a diffusion model.

        Raises:
            ValueError: It is none.
        """
        if not hasattr(type(module), "denoise"):
            raise ValueError(f"{type(self).__name__} is a method for diffusion models; {type(module).__name__} is none.")
        return cast(Denoiser, module)
