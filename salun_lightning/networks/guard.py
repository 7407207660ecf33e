"""What is put into the layers of a network: where it lies, and how a layer that changes answers to it."""

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

Layer = nn.Linear | nn.Conv2d
_KEPT = 1 << 16  # of about so many inputs of a layer quantiles are taken: a convolution may have billions


def vectors(layer: nn.Module, inputs: Tensor) -> Tensor:
    """The inputs of a layer as vectors (n, features) in double precision; those of a convolution are its pixels."""
    last = inputs.movedim(1, -1) if isinstance(layer, nn.Conv2d) else inputs
    return last.double().reshape(-1, last.shape[-1])


def can_be_held(layer: nn.Module) -> bool:
    """Whether it is a linear layer, or a convolution that answers to an image of one pixel: the kernel fits the padding."""
    if isinstance(layer, nn.Linear):
        return not isinstance(layer, NonDynamicallyQuantizableLinear)  # that of attention, which torch never calls
    if not isinstance(layer, nn.Conv2d):
        return False
    if isinstance(layer.padding, str):
        return layer.padding == "same" or set(layer.kernel_size) == {1}
    sizes = zip(layer.kernel_size, layer.dilation, layer.padding, strict=True)
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
        self.low, self.high = torch.full((2, len(self.inner)), torch.inf).to(rows) * rows.new_tensor([[1], [-1]])

    def project(self, inputs: Tensor) -> None:
        """Look at some inputs along the inner directions, and keep some of them."""
        along = self.widen(inputs)
        self.along.append(along[:: -(-self.spread.count // _KEPT)].clone())

    def bound(self, tail: float, margin: float | None) -> None:
        """Where the forget set lies along the inner directions, and how far the barrier reaches beyond."""
        start, end = torch.cat(self.along).quantile(self.low.new_tensor([tail, 1 - tail]), dim=0)
        if margin is not None:
            self.low, self.high = start - margin, end + margin
        self.start, self.end, self.along = start, end, []

    def widen(self, inputs: Tensor) -> Tensor:
        """Let the barrier reach as far as some inputs; these along the inner directions."""
        along = (inputs - self.spread.mean) @ self.inner.T
        self.low = torch.minimum(self.low, along.amin(0))
        self.high = torch.maximum(self.high, along.amax(0))
        return along

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
        low, start, end, high = (bound.to(kind) for bound in (self.low, self.start, self.end, self.high))
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
