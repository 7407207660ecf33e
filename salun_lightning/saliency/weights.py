"""One name and one bit pattern for a weight, however its network is wrapped, stored or sharded."""

import hashlib
import json
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def plain_name(name: str) -> str:
    """The name of a weight without what wrappers put around it.

    ``torch.compile`` and activation checkpointing insert a word, data parallelism puts ``module.`` in front, the modules of
    this library keep their network under ``network.``, and many others under ``model.``.

    Example:
        >>> plain_name("network._orig_mod.layer1.0.weight"), plain_name("module.layer1.0.weight")
        ('layer1.0.weight', 'layer1.0.weight')
    """
    name = _uncompiled(name)
    while name.startswith(("module.", "network.", "model.")):
        name = name.partition(".")[2]
    return name


def _uncompiled(name: str) -> str:
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Each name and its plain name; where two would become the same, all keep what is in front of them.

    Example:
        >>> plain_names(["network.fc.weight", "network.fc.bias"])
        {'network.fc.weight': 'fc.weight', 'network.fc.bias': 'fc.bias'}
    """
    plain = {name: plain_name(name) for name in names}
    return plain if len(set(plain.values())) == len(plain) else {name: _uncompiled(name) for name in plain}


def weights_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of a module that can be trained (those that require gradients), by plain name."""
    weights = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    return {plain: weights[name] for name, plain in plain_names(weights).items()}


def bits_of(tensor: Tensor) -> Tensor:
    """The storage of a tensor seen as integers; of a sharded tensor, this rank's part."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().view(_BITS[local.element_size()])


def fingerprint(parts: Iterable[tuple[str, Tensor]]) -> str:
    """A short digest of named tensors: their names, shapes and the exact sum of their bits.

    The sum is of integers, so it is the same on every device and in any memory layout.
    """
    digest = hashlib.sha256()
    for name, tensor in parts:
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        digest.update(json.dumps([name, list(whole.shape), int(bits_of(whole).sum(dtype=torch.int64))]).encode())
    return digest.hexdigest()[:16]
