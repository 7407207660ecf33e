"""What a comparison observes of each run: what it costs."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override


class Passes(Callback):
    """Counts what a training costs in passes of one sample through a network, whatever else the machine does.

    A forward pass counts 1, and a backward pass as twice that, because it computes the gradients of what goes in and of the
    weights. Counted are the trained network and the original model beside it, in training steps and in the saliency pass; not
    validation. The count goes on when a run is resumed.
    """

    def __init__(self) -> None:
        self.number = 0
        self._hooks: list[Any] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        networks = [getattr(pl_module, "network", pl_module)]
        if getattr(pl_module, "_reference", None) is not None:
            networks.append(pl_module.reference)
        self._hooks = [network.register_forward_hook(self._count, with_kwargs=True) for network in networks]

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._remove()

    def _remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _count(self, network: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        samples = next((len(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim), 0)
        backward = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in network.parameters())
        self.number += samples * (3 if backward else 1)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.number = state_dict["number"]
