"""One name and one bit pattern for a weight, however its network is wrapped, stored or sharded."""

import hashlib
import json
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

_PATTERNS = {  # parts of a UNet, as diffusers calls them; the names are those of ESD (Gandikota et al., ICCV 2023)
    "full": "",
    "xattn": r"(^|\.)attn2\.",  # cross-attention
    "xattn-strict": r"(^|\.)attn2\.to_[kv]\.",  # what reads the prompt
    "noxattn": r"^(?!time_embedding\.|conv_norm_out\.|conv_out\.)(?!(.*\.)?attn2\.)",  # the rest, as released
    "selfattn": r"(^|\.)attn1\.",
}
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


def train_only(network: nn.Module, pattern: str | None) -> None:
    """Freeze the weights of a network in whose plain names a pattern is not found.

    Args:
        network: The network.
        pattern: A regular expression, or one of the names full, xattn, xattn-strict, noxattn and selfattn, which are parts of a
            UNet of diffusers; None leaves the network as it is.

    Raises:
        ValueError: It is found in none.
    """
    if pattern is None:
        return
    weights = weights_of(network)
    chosen = {name for name in weights if re.search(_PATTERNS.get(pattern, pattern), name)}
    if not chosen:
        raise ValueError(
            f"trainable '{pattern}' is found in the name of no weight of the network, so nothing would be trained. Its weights"
            f" are called like '{next(iter(weights), '')}'."
        )
    for name in weights.keys() - chosen:
        weights[name].requires_grad_(False)


def reshard(module: nn.Module) -> None:
    """Put the trained shards back in the place of gathered weights, which a validation before training leaves behind."""
    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.reshard()


def renamings(names: Iterable[str], known: Iterable[str]) -> list[dict[str, str]]:
    """The ways to find all names among the known ones: as they are, or else with another prefix in front of all of them.

    Example:
        >>> renamings(["net.fc.weight", "net.fc.bias"], ["backbone.fc.weight", "backbone.fc.bias", "head.weight"])
        [{'net.fc.weight': 'backbone.fc.weight', 'net.fc.bias': 'backbone.fc.bias'}]
    """
    names, known = list(names), set(known)
    if known.issuperset(names):
        return [{name: name for name in names}]
    ways = [_other_prefix(names, *prefixes) for prefixes in {_prefixes(names[0], other) for other in known} if prefixes]
    return sorted((way for way in ways if way and known.issuperset(way.values())), key=lambda way: way[names[0]])


def _prefixes(name: str, other: str) -> tuple[str, str] | tuple[()]:
    """What is left in front of two names, without the parts that both end with; nothing if they share too little."""
    ours, theirs = name.split("."), other.split(".")
    count = len(ours)
    while ours and theirs and ours[-1] == theirs[-1]:
        del ours[-1], theirs[-1]
    if ours and theirs and count - len(ours) < 2:
        return ()  # that both are called "weight" says nothing
    return "".join(f"{part}." for part in ours), "".join(f"{part}." for part in theirs)


def _other_prefix(names: list[str], old: str, new: str) -> dict[str, str]:
    fits = all(name.startswith(old) for name in names)
    return {name: new + name.removeprefix(old) for name in names} if fits else {}


def local_of(tensor: Tensor) -> Tensor:
    """A tensor; of a sharded one, this rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_of(tensor: Tensor) -> Tensor:
    """A tensor; a sharded one put together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def laid_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, which each rank has, on the device of another and, if that is sharded, in shards like it."""
    tensor = tensor.to(other.device)
    if isinstance(other, DTensor):
        return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)
    return tensor


def bits_of(tensor: Tensor) -> Tensor:
    """The storage of a tensor seen as integers; of a sharded tensor, this rank's part.

    Raises:
        ValueError: Its numbers have more than 64 bits.
    """
    local = local_of(tensor)
    if local.element_size() not in _BITS:
        raise ValueError(f"Weights of {local.dtype} have too many bits to be held still one by one. Use complex64.")
    return local.detach().view(_BITS[local.element_size()])


def fingerprint(parts: Iterable[tuple[str, Tensor]]) -> str:
    """A short digest of named tensors: their names, shapes and the exact sum of their bits.

    The sum is of integers, so it is the same on every device and in any memory layout.
    """
    digest = hashlib.sha256()
    for name, tensor in parts:
        whole = whole_of(tensor)
        digest.update(json.dumps([name, list(whole.shape), int(bits_of(whole).sum(dtype=torch.int64))]).encode())
    return digest.hexdigest()[:16]
