"""Where the stages of a network begin, and what they are given."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from salun_lightning.data import Samples
from salun_lightning.weights import plain_name


class Operator(NamedTuple):
    """A convolution or a linear layer, as it was called in a forward pass."""

    name: str
    layer: nn.Module
    inputs: Tensor


def operators(network: nn.Module, images: Tensor) -> list[Operator]:
    """The convolutions and linear layers that a network calls for some images, in order. Grouped convolutions are left out."""
    names = {layer: plain_name(name) for name, layer in network.named_modules() if _mixes_all_channels(layer)}
    called: dict[nn.Module, Operator] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        called.setdefault(layer, Operator(names[layer], layer, inputs[0]))

    handles = [layer.register_forward_pre_hook(note) for layer in names]
    try:
        with torch.no_grad():
            network(images)
    finally:
        for handle in handles:
            handle.remove()
    return list(called.values())


def stages_of(network: nn.Module, images: Tensor, pattern: str | None = None) -> list[list[Operator]]:
    """The operators at which the stages of a network begin.

    A stage is what has the same name up to and with its first part with a digit: ``layer1``, ``blocks.0``, ``encoder_layer_3``;
    a name without one is a stage by itself. It begins with the first operator that is called, and with all that are given the
    very same tensor: that of a shortcut, or those of query, key and value. What is given the images begins no stage.

    Args:
        network: The network.
        images: A few images, to see what is called.
        pattern: In place of this rule: each operator in whose plain name this regular expression is found.

    Returns:
        The operators of each stage, in the order in which they are called.

    Raises:
        ValueError: There is no such operator.
    """
    every = operators(network, images)
    if pattern is None:
        chosen = list({_block(one.name): one for one in reversed(every[1:])}.values())[::-1]
        chosen = [one for one in chosen if _block(one.name) != _block(every[0].name) or one is every[-1]]
    else:
        every = chosen = [one for one in every if re.search(pattern, one.name)]
    stages = [[other for other in every if other.inputs is one.inputs] for one in chosen]
    stages = list({stage[0].layer: stage for stage in stages}.values())
    if not stages:
        raise ValueError(
            f"{type(network).__name__} has no stage to edit: no convolution or linear layer is called"
            + ("" if pattern is None else f" in whose name '{pattern}' is found")
            + ". Name some of its layers by a regular expression."
        )
    return stages


class Given(NamedTuple):
    """What a layer is given for a set, one vector a sample: the mean over all positions of an image, or over all tokens."""

    means: Tensor
    """The mean of each class that is there, as a column; float64 on the CPU."""
    some: Tensor
    """Every so many samples, as rows."""


def given_to(layers: list[nn.Module], network: nn.Module, batches: Iterable[Samples], every: int) -> dict[nn.Module, Given]:
    """What some layers of a network are given for a set.

    Args:
        layers: Convolutions and linear layers.
        network: The network, which is called without gradients.
        batches: The set, on the device of the network.
        every: Of how many samples one is kept.
    """
    given: dict[nn.Module, Tensor] = {}
    handles = [layer.register_forward_pre_hook(lambda layer, inputs: given.update({layer: inputs[0]})) for layer in layers]
    sums: dict[nn.Module, dict[int, Tensor]] = {layer: {} for layer in layers}
    some: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}
    counts, done = Counter[int](), 0
    try:
        for samples in batches:
            with torch.no_grad():
                network(samples.inputs)
            targets = samples.targets.tolist()
            for layer in layers:
                rows = _pooled(layer, given[layer], len(targets))
                some[layer].append(rows[-done % every :: every])
                for target in set(targets):
                    total = rows[samples.targets.cpu() == target].sum(0)
                    sums[layer][target] = sums[layer].get(target, 0) + total
            counts.update(targets)
            done += len(targets)
    finally:
        for handle in handles:
            handle.remove()
    classes = sorted(counts)
    return {
        layer: Given(torch.stack([sums[layer][c] / counts[c] for c in classes], dim=1), torch.cat(some[layer]))
        for layer in layers
    }


def _pooled(layer: nn.Module, inputs: Tensor, count: int) -> Tensor:
    """One vector a sample, (count, input channels). Where tokens come in windows, these are as many times more."""
    vectors = inputs.movedim(1, -1) if isinstance(layer, nn.Conv2d) else inputs
    return vectors.reshape(count, -1, vectors.shape[-1]).float().mean(1).cpu().double()


def _block(name: str) -> str:
    found = re.match(r".*?\d[^.]*", name)
    return name if found is None else found[0]


def _mixes_all_channels(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
