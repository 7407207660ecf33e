"""Files that hold a saliency mask: our own, and those of others."""

import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from salun_lightning.files import whole

_FORMAT = "salun_lightning.SaliencyMask/1"


def write_state(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write what ``SaliencyMask.state_dict`` returns as a safetensors file, which appears whole or not at all."""
    header = {
        **state["metadata"],
        "format": _FORMAT,
        "library_version": version("salun_lightning"),
        "ratio": repr(state["ratio"]),
        "shapes": json.dumps(state["shapes"]),
    }
    with whole(path) as unfinished:
        save_file(state["bits"], unfinished, metadata=header)


def read_safetensors(path: Path) -> Mapping[str, Any]:
    """What ``SaliencyMask.from_state_dict`` takes; of a file of another library the 0/1 tensors as ``masks``."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    if header.get("format") != _FORMAT:
        if any(tensor.dtype not in {torch.bool, torch.uint8} for tensor in tensors.values()):
            raise ValueError("it was not written by SaliencyMask.save, and its tensors are not bool or uint8")
        return _of_tensors(tensors, "safetensors of zeros and ones")
    metadata = {key: text for key, text in header.items() if key not in {"format", "ratio", "shapes"}}
    return {
        "bits": tensors,
        "shapes": json.loads(header["shapes"]),
        "ratio": float(header["ratio"]),
        "metadata": metadata,
    }


def state_in(content: Any) -> Mapping[str, Any]:
    """The same from what a file of torch holds: the checkpoint of a masked run, or 0/1 tensors by name."""
    if not isinstance(content, Mapping):
        raise ValueError("it is not a dictionary")
    if "callbacks" not in content:
        return _of_tensors(content, "released SalUn code")
    state = content["callbacks"].get("SaliencyMasking")
    if not state:
        raise ValueError("it is the checkpoint of a run without SaliencyMasking")
    mask: Mapping[str, Any] = state["mask"]
    return mask


def _of_tensors(tensors: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not ((tensor == 0) | (tensor == 1)).all():
            raise ValueError(f"'{name}' is not a tensor of zeros and ones")
    return {"masks": tensors, "metadata": {"source": source}}
