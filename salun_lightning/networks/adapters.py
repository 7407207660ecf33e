"""Adapters of low rank in the UNet of a pipeline, by peft."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from torch import nn

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def add_adapters(unet: Any, settings: Mapping[str, Any]) -> None:
    """Put fresh adapters into a UNet of diffusers. They alone are trainable then, and change nothing yet.

    Args:
        unet: The UNet.
        settings: Arguments of ``peft.LoraConfig``; by default, all projections of attention get an adapter.

    Raises:
        ModuleNotFoundError: peft is not installed.
        ValueError: The arguments are not known, or no layer is named.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Adapters need peft. Install it: pip install 'salun_lightning[lora]'.") from error
    unet.requires_grad_(False)
    try:
        config = peft.LoraConfig(**{"target_modules": list(_ATTENTION), "init_lora_weights": "gaussian", **settings})
        unet.add_adapter(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"lora {dict(settings)} cannot be used: {str(error).rstrip('.')}.") from error


@contextmanager
def merged(pipeline: Any) -> Iterator[tuple[Any, dict[str, Any] | None]]:
    """The pipeline with its adapters as part of the UNet, and what its ``save_lora_weights`` takes; None without any."""
    if not getattr(pipeline.unet, "peft_config", None):
        yield pipeline, None
        return
    from peft.utils import get_peft_model_state_dict

    trained: nn.Module = pipeline.unet
    adapters = {
        "unet_lora_layers": get_peft_model_state_dict(trained),
        "unet_lora_adapter_metadata": pipeline.unet.peft_config["default"].to_dict(),
    }
    whole: Any = deepcopy(trained)
    whole.fuse_lora()
    whole.unload_lora()
    pipeline.unet = whole
    try:
        yield pipeline, adapters
    finally:
        pipeline.unet = trained
