"""Weights of an original model, from whatever file holds them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from salun_lightning.networks.pipeline import check_architecture, read_pipeline
from salun_lightning.saliency.weights import plain_name


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a Lightning checkpoint, a ``state_dict``, a safetensors file or a pipeline directory of diffusers, on the CPU.

    No pickle is executed.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or would need code to be executed.
    """
    path = Path(path)
    if path.is_dir():
        return read_pipeline(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no model at '{path}'. Train it first, or give the path of its checkpoint.")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"'{path}' cannot be read as a checkpoint; it may be truncated: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' holds a {type(content).__name__}, which is neither a checkpoint nor a state_dict.")
    return content


def load_weights(network: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Load weights and buffers into a network. Names must match exactly, apart from what wrappers put around them.

    Args:
        network: The network to fill.
        checkpoint: What :func:`read_checkpoint` returned.

    Raises:
        ValueError: A name is missing or unknown, or a shape or the architecture differs.
    """
    if "network_config" in checkpoint:
        check_architecture(network, checkpoint["network_config"])
    state: Mapping[str, Tensor] = checkpoint.get("state_dict", checkpoint)
    given = {plain_name(name): tensor for name, tensor in state.items()}
    wanted = {plain_name(name): name for name in network.state_dict()}
    if len(given) < len(state) or len(wanted) < len(network.state_dict()):
        raise ValueError("The checkpoint has two weights of one name, once wrappers are left out. Save its network alone.")
    missing, unexpected = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    if missing or unexpected:
        raise ValueError(
            "The checkpoint does not fit the network:"
            f" {_some(missing)} missing from the checkpoint, {_some(unexpected)} unknown to the network."
        )
    own = network.state_dict()
    for name, key in wanted.items():
        if given[name].shape != own[key].shape:
            raise ValueError(
                f"The checkpoint does not fit the network: '{name}' is {tuple(given[name].shape)} in the checkpoint and"
                f" {tuple(own[key].shape)} in the network."
            )
    network.load_state_dict({key: given[name] for name, key in wanted.items()})


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return shown or "nothing"
