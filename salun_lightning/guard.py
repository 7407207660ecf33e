"""What is put into the layers of a network: where it lies, and how a layer that changes answers to it."""

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

Layer = nn.Linear | nn.Conv2d


def vectors(layer: nn.Module, inputs: Tensor) -> Tensor:
    """The inputs of a layer as vectors (n, features) in double precision; those of a convolution are its pixels."""
    last = inputs.movedim(1, -1) if isinstance(layer, nn.Conv2d) else inputs
    return last.double().reshape(-1, last.shape[-1])


def takes_a_pixel(layer: Layer) -> bool:
    """Whether a layer answers to an image of one pixel: with the padding it is as large as the kernel."""
    if isinstance(layer, nn.Linear) or layer.padding == "same":
        return True
    pads = (0, 0) if isinstance(layer.padding, str) else layer.padding
    sizes = zip(layer.kernel_size, layer.dilation, pads, strict=True)
    return all(dilation * (kernel - 1) <= 2 * pad for kernel, dilation, pad in sizes)


class Spread:
    """How vectors (n, features) lie: their mean, and the singular vectors and values of what is left without it.

    They are added a batch at a time; memory is that of the features squared, however many there are.

    Example:
        >>> spread = Spread().add(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        >>> spread.mean.tolist(), spread.directions()[1].tolist()
        ([2.0, 0.0], [1.4142135381698608, 0.0])
    """

    def __init__(self) -> None:
        self.count = 0
        self._sum = self._products = torch.zeros(())

    def add(self, some: Tensor) -> Self:
        """Count some more vectors in."""
        self.count += len(some)
        self._sum = self._sum.to(some) + some.sum(0)
        self._products = self._products.to(some) + some.T @ some
        return self

    @property
    def mean(self) -> Tensor:
        """The mean, (features,)."""
        return self._sum / self.count

    def directions(self) -> tuple[Tensor, Tensor]:
        """Singular vectors as rows, and singular values, descending: no more than there are vectors or features.

        The sign of a singular vector is arbitrary; here its largest component is positive.
        """
        squares, columns = torch.linalg.eigh(self._products - self.count * self.mean.outer(self.mean))
        rows, squares = columns.T.flip(0)[: self.count], squares.flip(0)[: self.count]
        signs = rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
        return rows * signs, squares.clamp(min=0).sqrt()


class Guard:
    """A layer, where its inputs lay in the original network, and the barrier that follows from that."""

    def __init__(self, layer: Layer, original: Layer) -> None:
        self.layer, self.original = layer, original
        self.spread = Spread()
        self.along: list[Tensor] = []

    def fix(self, directions: int) -> None:
        """Tell the directions that the forget set takes from the others."""
        rows, values = self.spread.directions()
        self.inner, self.outer = rows[:directions], rows[directions:] * values[directions:, None]

    def project(self, inputs: Tensor) -> None:
        """Keep some inputs along the inner directions."""
        self.along.append((inputs - self.spread.mean) @ self.inner.T)

    def bound(self, tail: float, margin: float | None) -> None:
        """Where the forget set lies along the inner directions, and how far the barrier reaches beyond."""
        along = torch.cat(self.along)
        ends = [column.quantile(column.new_tensor([tail, 1 - tail])) for column in along.T]  # torch takes no large matrix
        start, end = torch.stack(ends, dim=1)
        low, high = (along.amin(0), along.amax(0)) if margin is None else (start - margin, end + margin)
        self.bounds = [low, start, end, high]

    def widen(self, inputs: Tensor) -> None:
        """Let the barrier reach as far as some more inputs."""
        along = (inputs - self.spread.mean) @ self.inner.T
        self.bounds[0] = torch.minimum(self.bounds[0], along.amin(0))
        self.bounds[3] = torch.maximum(self.bounds[3], along.amax(0))

    def barrier(self) -> Tensor:
        """How far the layer has left its original answers."""
        layer, kind = self.layer, torch.promote_types(self.layer.weight.dtype, torch.float32)
        change = layer.weight.to(kind) - self.original.weight.to(kind)
        bias, before = layer.bias, self.original.bias
        shift = None if bias is None or before is None else bias.to(kind) - before.to(kind)
        mean, inner, outer = (rows.to(kind) for rows in (self.spread.mean[None], self.inner, self.outer))
        total = _answers(layer, mean, change, shift).square().mean()
        if len(outer):
            total = total + _answers(layer, outer, change).square().mean()
        along = _answers(layer, inner, change).T
        positive, negative = along.relu(), (-along).relu()
        low, start, end, high = (bound.to(kind) for bound in self.bounds)
        for one, other in ((low, start), (start, low), (end, high), (high, end)):
            total = total + (positive @ one - negative @ other).square().mean()
        return total


def _answers(layer: Layer, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What a layer with another weight makes of vectors (n, features), each alone: (n, outputs).

    A convolution gets each of them as an image of one pixel, and its padding around it.
    """
    if isinstance(layer, nn.Linear):
        return functional.linear(inputs, weight, bias)
    pixels = inputs[:, :, None, None]
    return functional.conv2d(pixels, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups).flatten(1)
