"""Boundary expanding: train what is to be forgotten on a class of its own, and then take that class away."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from salun_lightning.data import Order, Samples, run_seed
from salun_lightning.methods.answers import classification_head
from salun_lightning.methods.base import Kind, Method, part

if TYPE_CHECKING:
    from salun_lightning.modules.base import UnlearningModule
    from salun_lightning.modules.classifier import ImageClassifier


class BoundaryExpanding(Method):
    r"""BE: :math:`\min_\theta E_{D_f} \ell(x, C)`, where C is one class more than there are (Chen et al., CVPR 2023).

    The last linear layer gets another output while it trains. Its weights belong to the method: the network has its own classes
    alone at any time, so also in validation and checkpoints, and no mask covers them. They start from random numbers that
    depend on the seed alone. (Of the released ports, that of SalUn leaves the class in the network, where a sample that is
    taken for it counts as forgotten.)

    Raises:
        ValueError: The logits of the network do not come out of a linear layer.
    """

    order: Order = "forget"
    kind: Kind = "classifier"

    def __init__(self) -> None:
        self._extra: nn.Linear | None = None
        self._restored: dict[str, Any] = {}
        self._features: Tensor | None = None  # what the last linear layer was given
        self._hook: RemovableHandle | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._extra, self._restored = None, {}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # before optimizers are restored
        head = classification_head(cast("UnlearningModule", pl_module))[1]
        with isolate_rng():
            torch.manual_seed(run_seed())
            extra = nn.Linear(head.in_features, 1, bias=head.bias is not None)
        self._extra = extra.to(pl_module.device, head.weight.dtype)
        trainer.optimizers[0].param_groups[0]["params"].extend(self._extra.parameters())
        self._hook = head.register_forward_pre_hook(self._catch)  # once: a compiled network would be compiled anew each time

    def _catch(self, head: nn.Module, inputs: tuple[Tensor]) -> None:
        self._features = inputs[0]

    def _release(self, *_: Any, **__: Any) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._features = None

    on_train_end = on_exception = teardown = _release

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._restored and self._extra is not None:
            self._extra.load_state_dict(self._restored)

    @override
    def loss(self, module: "UnlearningModule", batch: Mapping[str, Samples]) -> Tensor:
        forget, self._features = part(batch, "forget", self), None
        logits, features = cast("ImageClassifier", module).logits(forget.inputs), self._features
        assert features is not None
        assert self._extra is not None
        wider = torch.cat([logits, self._extra(features)], dim=1)
        return functional.cross_entropy(wider, torch.full_like(forget.targets, logits.shape[1]))

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._extra is not None
        for weight in self._extra.parameters():  # which are no part of the module that the strategy wraps
            weight.grad = trainer.strategy.reduce(weight.grad, reduce_op="mean")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self._extra is None else self._extra.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict
