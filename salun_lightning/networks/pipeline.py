"""Pipeline directories, as diffusers reads and writes them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from salun_lightning.files import whole_folder

_COMPONENTS = ("unet", "transformer")


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
    write_pipeline(DDPMPipeline(unet=network, scheduler=scheduler), folder)


def write_pipeline(pipeline: Any, folder: Path, adapters: dict[str, Any] | None = None) -> None:
    """Save a pipeline of diffusers as a directory that appears whole or not at all. One that is there is replaced.

    Args:
        pipeline: The pipeline. Its text encoders become float32: unless told otherwise, diffusers reads all other parts so, and
            text encoders as they were stored.
        folder: The directory.
        adapters: What its ``save_lora_weights`` takes, of adapters that are part of the UNet already.

    Raises:
        ValueError: ``folder`` is something else than such a directory.
    """
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise ValueError(f"'{folder}' is there and is not a pipeline directory, so it is not replaced.")
    for name in ("text_encoder", "text_encoder_2"):
        if getattr(pipeline, name, None) is not None:
            getattr(pipeline, name).float()
    with whole_folder(folder) as unfinished, silent_diffusers():
        pipeline.save_pretrained(unfinished)
        if adapters is not None:
            pipeline.save_lora_weights(unfinished, **adapters)


@contextmanager
def silent_diffusers() -> Iterator[None]:
    """Diffusers logs nothing meanwhile, and shows no bars: for what takes a moment, or ends in an error that says the same."""
    from diffusers.utils import is_transformers_available, logging

    libraries: list[Any] = [logging]
    if is_transformers_available():
        from transformers.utils import logging as of_transformers

        libraries.append(of_transformers)
    verbosity, shown = logging.get_verbosity(), [library for library in libraries if library.is_progress_bar_enabled()]
    logging.set_verbosity(logging.CRITICAL)
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        for library in shown:
            library.enable_progress_bar()


def reason(error: BaseException) -> str:
    """Why diffusers or transformers could not read something, on one line."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, LocalEntryNotFoundError):
            return "it is no directory here, the hub of Hugging Face cannot be reached, and it was not downloaded before"
        cause = cause.__cause__ or cause.__context__
    return str(error).partition("\n")[0].rstrip(" .")


def read_pipeline(source: Path | str) -> dict[str, Any]:
    """Read the network of a pipeline and its noise schedule, with the loaders of diffusers. No pickle is executed.

    Args:
        source: A directory, or the name of a pipeline on the hub of Hugging Face.

    Returns:
        ``state_dict``, ``network_config`` and ``noise_schedule``.

    Raises:
        ValueError: It is no pipeline, is damaged, or has no network of diffusers in safetensors.
    """
    import diffusers

    if isinstance(source, Path) and not (source / "model_index.json").is_file():
        raise ValueError(f"'{source}' is not a pipeline directory: it holds no model_index.json.")
    try:
        with silent_diffusers():
            index = diffusers.DiffusionPipeline.load_config(source)
            component = next((name for name in _COMPONENTS if index.get(name, [None])[0] == "diffusers"), None)
            if component is None:
                raise ValueError(f"It holds no network of diffusers under {' or '.join(_COMPONENTS)}.")
            kind = getattr(diffusers, index[component][1])
            if not issubclass(kind, diffusers.ModelMixin):
                raise ValueError(f"Its {component} is a {kind.__name__}, which is no network.")
            network, found = kind.from_pretrained(source, subfolder=component, use_safetensors=True, output_loading_info=True)
            schedule = diffusers.DDPMScheduler.load_config(source, subfolder="scheduler") if "scheduler" in index else {}
    except Exception as error:
        raise ValueError(
            f"'{source}' cannot be read as a pipeline; a file may be truncated or missing: {reason(error)}. Save it with"
            " save_pretrained and safe_serialization=True: its weights are read from safetensors alone."
        ) from error
    state = network.state_dict()
    return {
        "state_dict": {name: state[name] for name in state if name not in found["missing_keys"]},
        "network_config": {**_plain(network), "_class_name": kind.__name__},
        "noise_schedule": schedule,
    }


def _plain(network: Any) -> dict[str, Any]:
    """The configuration of a network, with tuples as they are read back."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(network.config), default=str))
    return plain


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
    own = _plain(network)
    differing = sorted(key for key, value in config.items() if not key.startswith("_") and key in own and own[key] != value)
    if differing:
        told = ", ".join(f"{key} {config[key]} (here {own[key]})" for key in differing[:3])
        raise ValueError(
            f"The {ours} of the pipeline is built in another way than the network of this configuration: {told}"
            + (f", and {len(differing) - 3} more." if len(differing) > 3 else ".")
        )
