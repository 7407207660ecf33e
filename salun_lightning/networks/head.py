"""The logits of a classifier, and the layer that makes them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from salun_lightning.weights import plain_name


def logits_of(output: Any) -> Tensor:
    """The logits (B, classes) in what a network returns.

    Args:
        output: They themselves; something with an attribute or a key ``logits``, as models of Hugging Face return; or a tuple
            of which they are the first, as with auxiliary heads.

    Raises:
        ValueError: It is nothing of that kind.

    Example:
        >>> logits_of((torch.zeros(4, 10), torch.ones(4, 10))).sum()
        tensor(0.)
    """
    logits = output
    if isinstance(output, Mapping):
        logits = output.get("logits")
    elif hasattr(output, "logits"):
        logits = output.logits
    elif isinstance(output, tuple | list) and output:
        logits = output[0]
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"The network returned a {type(output).__name__} without logits. Return them, or a tuple that begins so."
        )
    return logits


def head_of(network: nn.Module, images: Tensor) -> tuple[str, nn.Linear]:
    """The classification head: the linear layer whose answer the logits are.

    Args:
        network: A classifier, in eval mode.
        images: A few images, to see which layer that is.

    Returns:
        Its plain name, and the layer.

    Raises:
        ValueError: There is none.

    Example:
        >>> head_of(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.ones(1, 4))
        ('2', Linear(in_features=8, out_features=2, bias=True))
    """
    network = getattr(network, "_orig_mod", network)  # not to compile it again for the hooks
    names = {layer: plain_name(name) for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    answers: dict[nn.Linear, Tensor] = {}
    handles = [layer.register_forward_hook(lambda layer, _, answer: answers.update({layer: answer})) for layer in names]
    try:
        with torch.no_grad():
            logits = logits_of(network(images))
    finally:
        for handle in handles:
            handle.remove()
    for layer, answer in answers.items():
        if answer.shape == logits.shape and torch.equal(answer.float(), logits.float()):
            return names[layer], layer
    raise ValueError(
        f"The logits of {type(network).__name__} are the answer of no linear layer, so it is not known where they are made."
        " Choose a method that needs no classification head."
    )
