"""What a comparison observes of each run: what it costs."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from typing_extensions import override


class Passes(Callback):
    """Counts what a training costs in passes of one sample through a network, whatever else the machine does.

    A forward pass counts 1, and each backward pass through it 2, because it computes the gradients of what goes in and of the
    weights; 1 where no weight has a gradient, as when images are moved. Counted are the trained network and the original model
    beside it, in training steps and in the saliency pass; not validation. The count goes on when a run is resumed.
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
        self.number += samples
        answers = [value for value in tree_leaves(output) if isinstance(value, Tensor) and value.requires_grad]
        if answers:
            each = 2 if any(parameter.requires_grad for parameter in network.parameters()) else 1
            answers[0].register_hook(lambda _: self._add(samples * each))

    def _add(self, number: int) -> None:
        self.number += number

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.number = state_dict["number"]
