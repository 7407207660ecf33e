"""SCRUB+R: SCRUB, and then back to the epoch that had forgotten just enough."""

from typing import TYPE_CHECKING, Any, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from salun_lightning.methods.answers import rightness
from salun_lightning.methods.scrub import SCRUB

if TYPE_CHECKING:
    from salun_lightning.modules.base import UnlearningModule


class ScrubRewind(SCRUB):
    r"""SCRUB and rewind, against an error on the forget set that is suspiciously high (Kurmanji et al., NeurIPS 2023).

    The network is kept as it is after each epoch, also in checkpoints, which so grow by a network each epoch. In the end it
    gets back the weights, and the buffers, of the epoch whose error on the forget set is closest to the reference: the error of
    the last epoch on validation images, as a mean over classes that are weighted as in the forget set. Of epochs that are
    equally close, the later one is taken.

    Args:
        reference_error: The error to come close to, from 0 to 1, if it is known or there are no validation images.
        **kwargs: See ``SCRUB``.

    Raises:
        ValueError: ``reference_error`` or another number is out of range.
        MisconfigurationException: A class of the forget set has no validation image.
    """

    def __init__(self, reference_error: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not (reference_error is None or 0 <= reference_error <= 1):
            raise ValueError(f"reference_error must lie between 0 and 1, got {reference_error}. Leave it out to measure it.")
        self.reference_error = reference_error
        self._epochs: list[dict[str, Any]] = []
        self._rewound = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":  # the state of a resumed run is loaded after this
            self._epochs, self._rewound = [], False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast("UnlearningModule", pl_module)
        if self.reference_error is None:  # found out before anything is spent
            _error_like(rightness(module, "forget")[1], *rightness(module, "val"))
        if self._rewound:  # a run that was over goes on: from its end, not from where it was rewound to
            module.network.load_state_dict(self._epochs[-1]["network"])
            self._rewound = False

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast("UnlearningModule", pl_module)
        network = {name: tensor.detach().cpu().clone() for name, tensor in module.network.state_dict().items()}
        self._epochs.append({"error": 1 - _mean(rightness(module, "forget")[0]), "network": network})
        by_epochs, by_steps = trainer.current_epoch + 1 == trainer.max_epochs, trainer.global_step == trainer.max_steps
        stopped = trainer.should_stop and trainer.fit_loop._can_stop_early  # else a minimum of epochs or steps is still to come
        if by_epochs or by_steps or stopped:  # now, so that the last checkpoint is of the rewound network
            self._go_back(module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._epochs and not self._rewound:  # a callback stopped the run later than above
            self._go_back(cast("UnlearningModule", pl_module))

    def _go_back(self, module: "UnlearningModule") -> None:
        reference = self.reference_error
        if reference is None:
            reference = _error_like(rightness(module, "forget")[1], *rightness(module, "val"))
        errors = [epoch["error"] for epoch in self._epochs]
        chosen = min(reversed(range(len(errors))), key=lambda epoch: abs(errors[epoch] - reference))
        rank_zero_info(f"SCRUB rewinds to epoch {chosen} with error {errors[chosen]:g}, for a reference of {reference:g}.")
        module.network.load_state_dict(self._epochs[chosen]["network"])
        self._rewound = True

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self._epochs, "rewound": self._rewound}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._epochs, self._rewound = list(state_dict["epochs"]), state_dict["rewound"]


def _mean(right: Tensor) -> float:
    return float(right.double().mean())


def _error_like(forgotten: Tensor, right: Tensor, classes: Tensor) -> float:
    """The error on samples whose classes are weighted as they come among the forgotten ones."""
    total = 0.0
    for number, count in zip(*(field.tolist() for field in forgotten.unique(return_counts=True)), strict=True):
        of_class = right[classes == number]
        if not len(of_class):
            raise MisconfigurationException(
                f"SCRUB rewinds by validation images of the classes that are forgotten, but class {number} has none. Give the"
                " datamodule a larger val_fraction, or a reference_error."
            )
        total += (1 - _mean(of_class)) * count
    return total / len(forgotten)
