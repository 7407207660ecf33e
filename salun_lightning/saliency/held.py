"""Holding weights still: the bits that they came with, and where they may move."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from salun_lightning.weights import bits_of, laid_like, local_of


class Held:
    """Where a tensor may move, and the bits it came with; of a sharded tensor, this rank's part.

    Args:
        tensor: The tensor, as it is now.
        mask: True where it may move, of its shape; without it, it may move nowhere.
    """

    def __init__(self, tensor: Tensor, mask: Tensor | None = None) -> None:
        original = bits_of(tensor)
        # laid out in memory like the tensor, which makes the arithmetic of every step several times faster
        self.movable = torch.zeros_like(original, dtype=torch.bool)
        if mask is not None:
            self.movable.copy_(local_of(laid_like(mask, tensor)))
        self.original = torch.empty_like(original).copy_(original)

    def on(self, device: torch.device) -> "Held":
        """The same for a copy of the tensor on another device."""
        if device == self.original.device:
            return self
        other = Held.__new__(Held)
        other.movable, other.original = self.movable.to(device), self.original.to(device)
        return other

    def put_back(self, tensor: Tensor) -> None:
        """Give the frozen part its original bits. Selection by bits: exact for -0.0, and NaN cannot leak through."""
        bits = bits_of(tensor)
        torch.bitwise_xor((bits ^ self.original).mul_(self.movable), self.original, out=bits)

    def mask_gradient(self, weight: nn.Parameter) -> None:
        """Zero the gradient of a weight where it may not move; NaN and infinity, too."""
        gradient = weight.grad
        if gradient is None:
            return
        if gradient.is_sparse:
            weight.grad = gradient = gradient.coalesce()
            bits_of(gradient._values()).mul_(self.movable[tuple(gradient._indices())])
        else:
            bits_of(gradient).mul_(self.movable)

    def leaked(self, tensor: Tensor) -> Tensor:
        """Whether anything outside the mask differs from its original bits: a bool tensor, so that nobody waits for it."""
        return (bits_of(tensor) != self.original).gt_(self.movable).any()

    def drift(self, tensor: Tensor) -> float:
        """Largest change outside the mask; the smallest positive number stands for a change of bits alone."""
        changed = (bits_of(tensor) != self.original) & ~self.movable
        if not changed.any():
            return 0.0
        local = local_of(tensor).detach()
        exact = torch.complex128 if local.is_complex() else torch.float64
        change = (local.to(exact) - self.original.view(local.dtype).to(exact))[changed].abs().max().item()
        return math.inf if math.isnan(change) else max(change, 5e-324)

    def num_moved(self, tensor: Tensor) -> int:
        """How many numbers changed; of a sharded tensor in this rank's part."""
        return int((bits_of(tensor) != self.original).sum())


class HeldModule:
    """All that is held still of a module, from now on until it is released.

    Args:
        module: The module, with the weights it is to keep.
        weights: The weights that the mask covers, by their names in the mask.
        mask: Where they may move.
        hold_uncovered: Whether weights that an optimizer holds and the mask does not cover are held still, too.
        hold_buffers: Whether buffers are.
    """

    def __init__(
        self,
        module: nn.Module,
        weights: Mapping[str, nn.Parameter],
        mask: Mapping[str, Tensor],
        hold_uncovered: bool,
        hold_buffers: bool,
    ) -> None:
        self.module = module
        self.own = set(module.parameters())
        self.weights: dict[Tensor, Held] = {weight: Held(weight, mask[name]) for name, weight in weights.items()}
        self.uncovered: set[Tensor] = set()
        self.hold_uncovered = hold_uncovered
        self.buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()} if hold_buffers else {}
        self.copies: list[tuple[nn.Module, Mapping[nn.Parameter, Held]]] = []
        self.drift = 0.0
        """The largest change outside the mask that was found between two optimizer steps."""
        # of all optimizers, also those that are made or put in the place of others in the middle of training
        self._hooks = [
            register_optimizer_step_pre_hook(self.cover),
            register_optimizer_step_post_hook(self._after_step),
            module.register_state_dict_pre_hook(lambda *_: self.settle()),
        ]

    def release(self) -> None:
        """Let everything move again."""
        for hook in self._hooks:
            hook.remove()

    def hold_copy(self, copy: nn.Module) -> None:
        """Hold a copy of the module still in the same places. Averaging rounds: a mean of equal numbers can be off by a bit."""
        theirs = dict(copy.named_parameters())
        weights = {
            theirs[name]: self.weights[weight].on(theirs[name].device)
            for name, weight in self.module.named_parameters()
            if weight in self.weights and name in theirs
        }
        self.copies.append((copy, weights))

    def cover(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Find the weights of an optimizer that the mask does not cover, and hold them if that is asked for."""
        for weight in parameters_of(optimizer):
            if weight in self.own and weight.requires_grad and weight not in self.weights:
                self.uncovered.add(weight)
                if self.hold_uncovered:
                    self.weights[weight] = Held(weight)

    @property
    def num_uncovered(self) -> int:
        """How many weights an optimizer holds that the mask does not cover."""
        return sum(weight.numel() for weight in self.uncovered)

    def mask_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Zero gradients where the weights of an optimizer may not move."""
        for weight in parameters_of(optimizer):
            if weight in self.weights:
                self.weights[weight].mask_gradient(weight)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for weight in parameters_of(optimizer):
            if weight in self.weights:
                self.weights[weight].put_back(weight)

    def settle(self) -> None:
        """Put back whatever was written between two optimizer steps, and remember the largest change of a weight."""
        leaked = [held.leaked(weight) for weight, held in self.weights.items()]
        if leaked and torch.stack([flag.to(leaked[0].device) for flag in leaked]).any():
            self.drift = max([self.drift, *(held.drift(weight) for weight, held in self.weights.items())])
            self.put_back()
        for copy, weights in self.copies:
            _put_back(weights, copy, self.buffers)
        _put_back({}, self.module, self.buffers)

    def put_back(self) -> None:
        """Give everything its original bits, without a look at what changed."""
        _put_back(self.weights, self.module, self.buffers)

    def follow(self) -> None:
        """Go to the devices where the weights are now."""
        self.weights = {weight: held.on(weight.device) for weight, held in self.weights.items()}

    def check(self) -> None:
        """Settle, and refuse to go on without a weight that is held.

        Raises:
            MisconfigurationException: Another parameter was put in its place.
        """
        self.settle()
        now = set(self.module.parameters())
        for weight in self.weights:
            if weight not in now and not isinstance(weight, DTensor):  # shards are replaced while they are gathered
                raise MisconfigurationException(
                    f"A weight of shape {tuple(weight.shape)} was replaced by another parameter during training, so it cannot"
                    " be held still. Write into it (weight.data.copy_), or replace it before training starts."
                )

    def num_moved(self) -> int:
        """How many weights differ from the start; of sharded ones, times the number of shards on this rank's part."""
        return sum(held.num_moved(weight) * num_shards(weight) for weight, held in self.weights.items())


def _put_back(weights: Mapping[Any, Held], module: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    for weight, held in weights.items():
        held.put_back(weight)
    for name, original in buffers.items():  # by name: a module may have put another tensor in the place of a buffer
        place, _, own = name.rpartition(".")
        child = module.get_submodule(place)
        now = child._buffers.get(own)
        if now is not None and now.shape == original.shape and now.dtype == original.dtype:
            now.detach().copy_(original)
        elif own in child._buffers:
            child._buffers[own] = original.clone()


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    """The weights that an optimizer holds."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def num_shards(tensor: Tensor) -> int:
    """In how many different parts a tensor lies on the ranks."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in sizes if not placement.is_replicate())
