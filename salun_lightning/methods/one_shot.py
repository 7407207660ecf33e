"""Methods that change the weights once, by an edit that they compute."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from salun_lightning.data import Order, Samples
from salun_lightning.methods.base import Method
from salun_lightning.weights import local_of, reshard, weights_of

if TYPE_CHECKING:
    from salun_lightning.modules.base import UnlearningModule

_PLAIN = {"lr": 1, "momentum": 0, "weight_decay": 0, "nesterov": False, "maximize": False}


class OneShot(Method):
    r"""A method that adds something to each weight, once: :math:`\theta_u = \theta_o + \Delta`.

    The edit :math:`\Delta` is one step of SGD with rate 1 on the loss :math:`-\langle \Delta, \theta \rangle`, whose gradient
    is :math:`-\Delta`. So the mask, checkpoints, precision and several processes hold for it as for any training. Edit and sum
    are both rounded to the precision of the weights.

    Raises:
        MisconfigurationException: The run would do more than this one step.
    """

    order: Order = "forget"

    @abstractmethod
    def edit(self, module: "UnlearningModule") -> dict[str, Tensor]:
        """What to add to weights, by plain name (see ``weights_of``); others stay as they are.

        Args:
            module: The module with the original model, on its device.
        """

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        wrong = next(_more_than_one_plain_step(trainer), None)
        if wrong is not None:
            raise MisconfigurationException(
                f"{type(self).__name__} edits the weights in one plain step of SGD, but this run has {wrong}. Write"
                " 'model.optimizer: {class_path: torch.optim.SGD, init_args: {lr: 1.0, momentum: 0.0, weight_decay: 0.0}}' and"
                " 'trainer.max_steps: 1', and leave out gradient_clip_val, accumulate_grad_batches and lr_scheduler."
            )
        reshard(pl_module)
        self._edit = self.edit(cast("UnlearningModule", pl_module))
        if unknown := self._edit.keys() - weights_of(pl_module).keys():
            raise ValueError(
                f"{type(self).__name__} edits '{min(unknown)}', which is no trainable weight of the network. Name weights as"
                " weights_of does."
            )

    @override
    def loss(self, module: "UnlearningModule", batch: Mapping[str, Samples]) -> Tensor:
        products = []
        for name, weight in weights_of(module).items():
            own = local_of(weight)  # of a sharded weight this rank's part, which is edited by itself
            edit = local_of(self._edit[name]) if name in self._edit else torch.zeros_like(own)
            products.append((edit * own).sum())
        return -torch.stack(products).sum()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._edit = {}


def batches_at(data: Any, positions: Tensor, size: int | None = None) -> Iterator[Samples]:
    """Training samples in batches, with evaluation transforms; the same on every process.

    Args:
        data: The datamodule.
        positions: Where they are in the training data, int64.
        size: Samples a batch; by default that of the datamodule.
    """
    samples = data.set_dataloader("forget").dataset  # of the whole training set; it is the loader that reads one part of it
    return (samples[part.tolist()] for part in positions.split(size or data.batch_size))


def spread(positions: Tensor, count: int) -> Tensor:
    """Some positions of a set, evenly spread over it; all of them if there are not more.

    Example:
        >>> spread(torch.tensor([2, 3, 5, 7, 11, 13]), 3)
        tensor([ 2,  5, 11])
    """
    count = min(count, len(positions))
    return positions[torch.arange(count) * len(positions) // count]


def _more_than_one_plain_step(trainer: Trainer) -> Iterator[str]:
    """What a run has that one plain step of SGD has not."""
    for optimizer in trainer.optimizers:
        if not isinstance(optimizer, torch.optim.SGD):
            yield f"the optimizer {type(optimizer).__name__}"
            continue
        for group in optimizer.param_groups:
            for name, plain in _PLAIN.items():
                if group[name] != plain:
                    yield f"{name} {group[name]}"
    if trainer.gradient_clip_val:
        yield f"gradient_clip_val {trainer.gradient_clip_val}"
    if trainer.accumulate_grad_batches != 1:
        yield f"accumulate_grad_batches {trainer.accumulate_grad_batches}"
    if trainer.estimated_stepping_batches != 1:
        yield f"{trainer.estimated_stepping_batches} steps"
