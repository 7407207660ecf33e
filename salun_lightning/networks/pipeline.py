"""Pipeline directories, as diffusers reads and writes them."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

_COMPONENTS = ("unet", "transformer")
_WEIGHTS = "diffusion_pytorch_model.safetensors"


def save_pipeline(network: nn.Module, scheduler: Any, folder: Path) -> None:
    """Save a network and its noise schedule as a directory that ``diffusers.DiffusionPipeline.from_pretrained`` loads.

    Args:
        network: A model of diffusers.
        scheduler: A scheduler of diffusers.
        folder: The directory, which appears whole or not at all. One that is there is replaced.

    Raises:
        ValueError: The network is not one of diffusers, or ``folder`` is something else than such a directory.
    """
    from diffusers import DDPMPipeline, ModelMixin

    network = getattr(network, "_orig_mod", network)  # of torch.compile
    if not isinstance(network, ModelMixin):
        raise ValueError(
            f"{type(network).__name__} is not a model of diffusers, so it cannot be saved as a pipeline. Use its checkpoint."
        )
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise ValueError(f"'{folder}' is there and is not a pipeline directory, so it is not replaced.")
    unfinished, replaced = (folder.with_name(f"{folder.name}.{os.getpid()}.{word}") for word in ("part", "old"))
    try:
        DDPMPipeline(unet=network, scheduler=scheduler).save_pretrained(unfinished)
        if folder.exists():
            os.replace(folder, replaced)
        os.replace(unfinished, folder)
    finally:
        if replaced.exists() and not folder.exists():  # it broke off in between
            os.replace(replaced, folder)
        for leftover in (unfinished, replaced):
            shutil.rmtree(leftover, ignore_errors=True)


def read_pipeline(folder: Path) -> dict[str, Any]:
    """Read a pipeline directory: the weights and the configuration of its network, and its noise schedule.

    Returns:
        ``state_dict``, ``network_config`` and ``noise_schedule``.

    Raises:
        ValueError: It is no such directory, is damaged, or has no network in one file of safetensors.
    """
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"'{folder}' is not a pipeline directory: it holds no model_index.json.")
    networks = [folder / name for name in _COMPONENTS if (folder / name / "config.json").is_file()]
    if not networks:
        raise ValueError(f"The pipeline '{folder}' holds no network under {' or '.join(_COMPONENTS)}.")
    weights = networks[0] / _WEIGHTS
    if weights.with_name(f"{_WEIGHTS}.index.json").is_file():
        raise ValueError(f"'{networks[0]}' holds its weights in several files. Save it with a larger max_shard_size.")
    if not weights.is_file():
        raise ValueError(f"'{networks[0]}' holds no {_WEIGHTS}. Save the pipeline with safe_serialization=True and no variant.")
    schedule = folder / "scheduler" / "scheduler_config.json"
    try:
        return {
            "state_dict": dict(load_file(weights)),
            "network_config": _read_json(networks[0] / "config.json"),
            "noise_schedule": _read_json(schedule) if schedule.is_file() else {},
        }
    except Exception as error:
        raise ValueError(f"'{folder}' cannot be read as a pipeline; a file may be truncated: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def check_architecture(network: nn.Module, config: dict[str, Any]) -> None:
    """Refuse the weights of a network that is built in another way.

    Args:
        network: The network to fill.
        config: The configuration of the network that the weights come from.

    Raises:
        ValueError: Class or configuration differ.
    """
    network = getattr(network, "_orig_mod", network)
    theirs, ours = config.get("_class_name"), type(network).__name__
    if theirs != ours:
        raise ValueError(f"The pipeline holds a {theirs}, but the network of this configuration is a {ours}.")
    own = json.loads(json.dumps(dict(network.config), default=str))  # type: ignore[arg-type]  # tuples as they are read back
    differing = sorted(key for key, value in config.items() if not key.startswith("_") and key in own and own[key] != value)
    if differing:
        told = ", ".join(f"{key} {config[key]} (here {own[key]})" for key in differing[:3])
        raise ValueError(
            f"The {ours} of the pipeline is built in another way than the network of this configuration: {told}"
            + (f", and {len(differing) - 3} more." if len(differing) > 3 else ".")
        )
