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

    ``torch.compile`` inserts ``_orig_mod.``, data parallelism puts ``module.`` in front, the modules of this library keep their
    network under ``network.``, and many others under ``model.``.

    Example:
        >>> plain_name("network._orig_mod.layer1.0.weight"), plain_name("module.layer1.0.weight")
        ('layer1.0.weight', 'layer1.0.weight')
    """
    name = name.replace("_orig_mod.", "")
    for prefix in ("module.", "network.", "model."):
        name = name.removeprefix(prefix)
    return name


def weights_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of a module that can be trained (those that require gradients), by plain name.

    Raises:
        ValueError: Two weights have the same plain name.
    """
    weights: dict[str, nn.Parameter] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            if plain_name(name) in weights:
                raise ValueError(f"Two weights are called '{plain_name(name)}' once wrappers are left out; rename one.")
            weights[plain_name(name)] = parameter
    return weights


def bits_of(tensor: Tensor) -> Tensor:
    """The storage of a floating-point tensor seen as integers; of a sharded tensor, this rank's part."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().view(_BITS[local.element_size()])


def fingerprint(parts: Iterable[tuple[str, Tensor]]) -> str:
    """A short digest of named tensors: their names, shapes and the exact sum of their bits.

    The sum is of integers, so it is the same on every device and in any memory layout.
    """
    digest = hashlib.sha256()
    for name, tensor in parts:
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        total = int(bits_of(whole).sum(dtype=torch.int64)) if whole.is_floating_point() else int(whole.sum())
        digest.update(json.dumps([name, list(whole.shape), total]).encode())
    return digest.hexdigest()[:16]
