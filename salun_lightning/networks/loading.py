"""Weights of an original model, from whatever file holds them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from safetensors.torch import load_file
from torch import Tensor, nn

from salun_lightning.files import read_torch
from salun_lightning.networks.pipeline import check_architecture, read_pipeline
from salun_lightning.weights import plain_name, renamings


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a Lightning checkpoint, a ``state_dict``, a safetensors file or a pipeline of diffusers, on the CPU.

    No pickle is executed.

    Args:
        path: A file, the directory of a pipeline, or ``hf://owner/name`` for a pipeline on the hub of Hugging Face.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or would need code to be executed.
    """
    if str(path).startswith(_HUB):
        return read_pipeline(str(path).removeprefix(_HUB))
    path = Path(path)
    if path.is_dir():
        return read_pipeline(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no model at '{path}'. Train it first, or give the path of its checkpoint.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    content = read_torch(path)
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' holds a {type(content).__name__}, which is neither a checkpoint nor a state_dict.")
    return content


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        return dict(load_file(path))
    except Exception as error:
        raise ValueError(f"'{path}' cannot be read as a checkpoint; it may be truncated: {error}") from error


def weights_in(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights and buffers of a checkpoint by plain name, from under the key that people put them.

    Args:
        checkpoint: What :func:`read_checkpoint` returned.

    Raises:
        ValueError: There are none, or two of one name.
    """
    inner = next((checkpoint[key] for key in _KEYS if isinstance(checkpoint.get(key), Mapping)), None)
    if inner is not None:
        return weights_in(inner)
    tensors = {name: tensor for name, tensor in checkpoint.items() if isinstance(tensor, Tensor)}
    if checkpoint and not tensors:
        raise ValueError(
            f"The checkpoint holds no weights; it has the keys {_some(sorted(map(str, checkpoint)))}. Save the network's"
            " state_dict()."
        )
    plain = {plain_name(name): tensor for name, tensor in tensors.items()}
    if len(plain) < len(tensors):
        raise ValueError(_TWICE)
    return plain


def export_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The weights and buffers of a checkpoint, as the network by itself names them.

    ``torchvision.models.resnet18(num_classes=10).load_state_dict(export_state_dict("last.ckpt"))`` takes what a
    ``TorchvisionClassifier`` learned; timm and others likewise.

    Args:
        path: See :func:`read_checkpoint`.
    """
    return weights_in(read_checkpoint(path))


def load_weights(network: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Load weights and buffers into a network. Every one of its names must be there, behind at most one prefix.

    What else the checkpoint holds is left out, and listed in a warning.

    Args:
        network: The network to fill.
        checkpoint: What :func:`read_checkpoint` returned.

    Raises:
        ValueError: A name is missing or is there more than once, or a shape or the architecture differs.
    """
    if "network_config" in checkpoint:
        check_architecture(network, checkpoint["network_config"])
    own = network.state_dict()
    given, wanted = weights_in(checkpoint), {plain_name(name): name for name in own}
    if len(wanted) < len(own):
        raise ValueError(_TWICE)
    ways = renamings(wanted, given)
    if len(ways) > 1:
        first = next(iter(wanted))
        under = ", ".join(way[first].removesuffix(first) for way in ways)
        raise ValueError(f"The checkpoint has the network's weights more than once: under {under}. Save one alone.")
    if not ways:
        missing, unexpected = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
        raise ValueError(
            "The checkpoint does not fit the network:"
            f" {_some(missing)} missing from the checkpoint, {_some(unexpected)} unknown to the network."
        )
    source = ways[0]
    for name, key in wanted.items():
        if given[source[name]].shape != own[key].shape:
            raise ValueError(
                f"The checkpoint does not fit the network: '{name}' is {tuple(given[source[name]].shape)} in the checkpoint and"
                f" {tuple(own[key].shape)} in the network."
            )
    network.load_state_dict({key: given[source[name]] for name, key in wanted.items()})
    extra = sorted(given.keys() - source.values())
    if extra:
        rank_zero_warn(f"The checkpoint also holds {_some(extra)}, which the network does not have. That is left out.")


_HUB = "hf://"
_KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "state_dict_ema", "model_ema", "ema")
_TWICE = "The checkpoint has two weights of one name, once wrappers are left out. Save its network alone."


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return shown or "nothing"
