"""The callback of SalUn-soft: no mask, but the weights that move least go back to where they were."""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from typing_extensions import override

from salun_lightning.saliency.gradients import at_least_float32
from salun_lightning.saliency.held import parameters_of
from salun_lightning.saliency.selection import kth_smallest, num_kept
from salun_lightning.saliency.twins import is_a
from salun_lightning.weights import weights_of


class SoftMasking(Callback):
    r"""SalUn-soft (Fan et al., ICLR 2024): after each optimizer step a proximal step towards the original weights.

    .. math::
        \delta = \theta - \theta_o, \quad \theta \leftarrow \theta_o + \mathrm{sign}(\delta) \max(|\delta| - \tau_s, 0)

    It is the proximal step of an L1 penalty on :math:`\delta`. As in the released code, the threshold :math:`\tau_s` is the
    :math:`K_s`-th smallest :math:`|\delta|` of all :math:`d` weights together, with :math:`K_s = \lfloor \rho (1 - s / S) d
    \rfloor` after step :math:`s` of :math:`S`. So a fraction :math:`\rho` of the weights has its original bits at the start of
    training, fewer with each step, and none has to at its end. No saliency is computed. Buffers move. The optimizer's state,
    such as momentum, stays as the step left it. (The released code for classifiers takes the weights at the start of each epoch
    for :math:`\theta_o`.)

    Works with any LightningModule (also of ``pytorch_lightning``) and datamodule. The original weights are those that this
    callback finds in its ``on_train_start``; they are saved in checkpoints, for a run that is resumed. It covers the weights
    that the optimizer holds when training starts.

    Args:
        ratio: :math:`\rho`, from 0 (plain training) to 1.

    Raises:
        ValueError: ``ratio`` is out of range.
        MisconfigurationException: There are several optimizers or no number of steps, the weights are sharded, or the
            checkpoint that is resumed was made without this callback or with another ratio.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[SoftMasking(0.5)], logger=False, enable_checkpointing=False)
    """

    def __init__(self, ratio: float = 0.5) -> None:
        super().__init__()
        if not 0 <= ratio <= 1:
            raise ValueError(
                f"The ratio of SoftMasking must lie between 0 (plain training) and 1 (all weights are held at first), got"
                f" {ratio}. Give one such as 0.5."
            )
        self.ratio = ratio
        self._hook: Any = None
        self._weights: dict[str, nn.Parameter] = {}
        self._original: dict[str, Tensor] = {}
        self._restored: Mapping[str, Any] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._release()
        self._restored, self._original = {}, {}
        served = is_a(trainer.strategy, SingleDeviceStrategy, DDPStrategy)
        if not served or is_a(trainer.strategy, DeepSpeedStrategy, XLAStrategy, SingleDeviceXLAStrategy):
            raise MisconfigurationException(
                f"SoftMasking compares all weights of the network with each other, and under {type(trainer.strategy).__name__}"
                " no process has them in their usual form. Use a single device or 'ddp'."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if len(trainer.optimizers) != 1:
            raise MisconfigurationException(
                f"SoftMasking holds fewer weights with each step of the one optimizer, but there are {len(trainer.optimizers)}."
                " Leave it out, or train with one."
            )
        steps = trainer.estimated_stepping_batches
        if steps == math.inf:
            raise MisconfigurationException(
                "SoftMasking holds fewer weights with each step until the last one, but this run has no end. Give max_epochs or"
                " max_steps."
            )
        trainable, optimized = weights_of(pl_module), set(parameters_of(trainer.optimizers[0]))
        self._weights = {name: weight for name, weight in trainable.items() if weight in optimized} or trainable
        self._original = self._originals(trainer)
        own, count = set(self._weights.values()), sum(weight.numel() for weight in self._weights.values())

        def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if not own.isdisjoint(parameters_of(optimizer)):
                left = 1 - Fraction(trainer.global_step + 1, int(steps))  # the step is counted after this
                self._pull(int(Fraction(repr(float(self.ratio))) * left * count))

        self._hook = register_optimizer_step_post_hook(after_step)  # of all optimizers: one may be in the midst of another
        rank_zero_info(f"SoftMasking: of {count:,} weights {num_kept(self.ratio, count):,} are held at first, none at the end")

    def _originals(self, trainer: Trainer) -> dict[str, Tensor]:
        """The original weights: those of now, or of the checkpoint that is resumed."""
        if not self._restored:
            if trainer.global_step:
                raise MisconfigurationException(
                    "The checkpoint was made without SoftMasking, so it does not hold the original weights. Resume without it,"
                    " or start afresh."
                )
            return {name: weight.detach().clone() for name, weight in self._weights.items()}
        if self._restored["ratio"] != self.ratio:
            raise MisconfigurationException(
                f"The checkpoint was made with SoftMasking of ratio {self._restored['ratio']}, but {self.ratio} is asked for."
                " Resume with the same, or start afresh."
            )
        original: Mapping[str, Tensor] = self._restored["original"]
        if {name: weight.shape for name, weight in self._weights.items()} != {name: t.shape for name, t in original.items()}:
            raise MisconfigurationException(
                "The original weights in the checkpoint are not those of the weights that are trained. Train the same weights,"
                " or start afresh."
            )
        return {name: original[name].to(weight) for name, weight in self._weights.items()}

    @torch.no_grad()
    def _pull(self, count: int) -> None:
        """Give the ``count`` weights that changed least their original bits, and bring the others nearer to theirs."""
        if count <= 0:
            return
        changes = {n: at_least_float32(w.detach()) - at_least_float32(self._original[n]) for n, w in self._weights.items()}
        threshold = kth_smallest({name: change.abs() for name, change in changes.items()}, count)
        if threshold == 0:  # also after a step within another step: what is pulled twice is pulled once
            return
        for name, weight in self._weights.items():
            original, change = self._original[name], changes[name]
            nearer = (original + change.sgn() * (change.abs() - threshold)).to(weight.dtype)
            weight.copy_(torch.where(change.abs() <= threshold, original, nearer))  # NaN is not hidden

    def _release(self, *_: Any, **__: Any) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._weights = None, {}

    on_fit_end = on_exception = teardown = _release

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"ratio": self.ratio, "original": self._original} if self._original else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict
