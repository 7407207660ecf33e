"""The callback that decides which weights may move, and holds the others still."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from salun_lightning.saliency.held import HeldModule, parameters_of
from salun_lightning.saliency.mask import SaliencyMask
from salun_lightning.saliency.scores import Score
from salun_lightning.saliency.source import MaskSource
from salun_lightning.saliency.twins import is_a
from salun_lightning.weights import reshard, weights_of

_SERVED = SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy
_NOT_SERVED = DeepSpeedStrategy, XLAStrategy, SingleDeviceXLAStrategy  # though they derive from those
Uncovered = Literal["frozen", "free"]


class SaliencyMasking(Callback):
    r"""Let only salient weights move: :math:`\theta_u = m_S \odot \theta + (1 - m_S) \odot \theta_o` (Fan et al., ICLR 2024).

    Works with any LightningModule (also of ``pytorch_lightning``), datamodule and optimizer. When training starts, the mask is
    restored from the checkpoint that is resumed, or loaded from ``mask``, or computed in one pass over the forget set:
    ``datamodule.forget_dataloader()`` where there is one, else the training loader (its ``forget`` part, if it has one), each
    sample once, in eval mode. From then on

    - gradients outside the mask are zeroed before clipping, so a clipped norm is that of the weights that may move;
    - after every step of any optimizer each weight outside the mask gets its original bits back, whatever momentum, weight
      decay or a NaN made of it. The same holds for the average that ``WeightAveraging`` / ``EMAWeightAveraging`` keeps;
    - other callbacks and hooks may write to weights, but outside the mask that is undone: before the next batch, before each
      batch of a validation, and before a checkpoint is saved.

    The original weights are those that this callback finds in its ``on_train_start``: a checkpoint was restored by then. The
    mask is saved in checkpoints. It covers the weights that an optimizer holds when training starts. Other weights, such as
    those of a target network, are left alone and do not count into the ratio. After training, :attr:`report` tells what was
    measured.

    Args:
        ratio: The fraction of all covered weights that may move, from 0 (none) to 1 (all). These two need no saliency pass.
        mask: In place of ``ratio``: a mask, or a file that ``SaliencyMask.load`` reads.
        score: How salience is measured, see ``saliency_scores``.
        freeze_buffers: Whether buffers, such as the running statistics of BatchNorm, are put back after every batch. They are
            not weights; by default they move, as in the released code of the paper.
        seed: Seed of the ``random`` score.
        uncovered: Some weights may be trained although the mask does not cover them: an optimizer gets them in the middle of
            training, or ``mask`` leaves them out. ``frozen`` holds them still, ``free`` lets them move.

    Raises:
        ValueError: ``ratio`` is out of range, not exactly one of ``ratio`` and ``mask`` is given, or there is no such score.
        MisconfigurationException: The strategy holds weights in a form that cannot be masked (DeepSpeed, FSDP1, XLA), the
            checkpoint that is resumed was made with another mask or other settings, or a weight is replaced in mid-training.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[SaliencyMasking(0.5)], logger=False, enable_checkpointing=False)
    """

    mask: SaliencyMask | None
    """The mask in force, from the start of training on."""

    report: dict[str, float]
    """After training: ``num_weights``, ``num_kept`` (may move), ``num_moved`` (did since the start or the last resume),
    ``num_uncovered``, ``num_without_optimizer`` (when training started), and ``drift``: the largest change outside the mask
    that was found between two optimizer steps. It was put back."""

    def __init__(
        self,
        ratio: float | None = None,
        mask: str | Path | SaliencyMask | None = None,
        score: Score = "gradient",
        freeze_buffers: bool = False,
        seed: int = 0,
        uncovered: Uncovered = "frozen",
    ) -> None:
        super().__init__()
        if uncovered not in get_args(Uncovered):
            raise ValueError(f"uncovered must be 'frozen' or 'free', got '{uncovered}'.")
        self.source = MaskSource(ratio, mask, score, seed)
        self.policy = {"freeze_buffers": freeze_buffers, "uncovered": uncovered}
        self.mask = None
        self.report = {}
        self._restored: Mapping[str, Any] = {}
        self._held: HeldModule | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        strategy = trainer.strategy
        if not is_a(strategy, *_SERVED) or is_a(strategy, *_NOT_SERVED):
            raise MisconfigurationException(
                f"{type(strategy).__name__} keeps weights in a form of its own, so single weights cannot be held still under"
                " it. Use a single device, 'ddp', or ModelParallelStrategy (FSDP2) with SaliencyMasking."
            )
        self._release(trainer)  # another callback may have failed while a run ended
        self.mask = None
        self.report = {}
        self._restored = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reshard(pl_module)
        trainable = weights_of(pl_module)
        optimized = {weight for optimizer in trainer.optimizers for weight in parameters_of(optimizer)}
        weights = {name: weight for name, weight in trainable.items() if weight in optimized} or trainable
        if self.mask is None:
            self.mask = self.source.mask_of(trainer, pl_module, weights)
        else:
            self.source.check_restored(self.mask, weights)
            self._check_policy()
        covered = {name: weight for name, weight in weights.items() if name in self.mask} or weights
        self.mask.check_shapes({name: weight.shape for name, weight in covered.items()})
        hold_uncovered = self.policy["uncovered"] == "frozen"
        self._held = HeldModule(pl_module, covered, self.mask, hold_uncovered, bool(self.policy["freeze_buffers"]))
        for optimizer in trainer.optimizers:
            self._held.cover(optimizer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if is_a(callback, WeightAveraging) and callback._average_model is not None:
                self._held.hold_copy(callback._average_model.module)
        self._held.settle()  # the average may have been copied before the original model was loaded
        # checkpoints are put together of references to weights, which other hooks may still write to
        _call_before(trainer.strategy, "save_checkpoint", self._held.check)
        _call_before(trainer.strategy, "validation_step", self._held.settle)
        others = [weight for weight in trainable.values() if weight not in self._held.weights]
        self.report = {"num_without_optimizer": sum(weight.numel() for weight in others if weight not in self._held.uncovered)}
        rank_zero_info(f"SaliencyMasking: {self.mask}")
        if others or self._held.uncovered:
            rank_zero_info(
                f"SaliencyMasking: not counted are {self.report['num_without_optimizer']:,} weights that no optimizer holds and"
                f" {self._held.num_uncovered:,} that the mask does not cover ({self.policy['uncovered']})"
            )

    def _check_policy(self) -> None:
        for name, asked_for in self.policy.items():
            if self._restored.get(name, asked_for) != asked_for:
                raise MisconfigurationException(
                    f"The checkpoint was made with {name} {self._restored[name]}, but {asked_for} is asked for. Resume with the"
                    " same, or start afresh."
                )

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._held is not None and not pl_module.automatic_optimization:
            for optimizer in trainer.optimizers:  # there, clipping may come before on_before_optimizer_step
                self._held.mask_gradients(optimizer)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        if self._held is not None:
            self._held.mask_gradients(optimizer)

    def _settle(self, *_: Any, **__: Any) -> None:
        if self._held is not None:
            self._held.settle()

    # where other hooks may look at weights: what was written to them since the last step is undone
    on_train_batch_start = on_train_batch_end = on_train_epoch_end = on_train_end = _settle
    on_validation_start = on_validation_epoch_end = on_validation_end = _settle

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.mask is None or self._held is None:
            return
        self._held.follow()  # Lightning has moved the module to the CPU
        self._held.check()
        moved, drift = self._held.num_moved(), self._held.drift
        if is_a(trainer.strategy, ModelParallelStrategy):
            moved, drift = _over_shards(trainer, moved, drift)
        self.report |= {
            "num_weights": self.mask.num_weights,
            "num_kept": self.mask.num_kept,
            "num_moved": moved,
            "num_uncovered": self._held.num_uncovered,
            "drift": drift,
        }
        rank_zero_info(
            f"SaliencyMasking: of {self.mask.num_weights:,} weights {self.mask.num_kept:,} could move and {moved:,} did;"
            f" largest change outside the mask: {drift:g}"
        )
        if drift != 0:
            rank_zero_warn(
                "Something other than an optimizer wrote to weights outside the saliency mask: the largest change was"
                f" {drift:g}. It was put back before any validation, checkpoint or next batch could see it."
            )

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._held is not None:
            self._held.follow()
            self._held.put_back()  # perhaps it was in the middle of an optimizer step
            # a checkpoint of the exception may follow, and after that no hook but the strategy's
            _call_before(trainer.strategy, "teardown", lambda: self._release(trainer))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._held is not None:
            self._held.put_back()
        self._release(trainer)

    def _release(self, trainer: Trainer) -> None:
        if self._held is not None:
            self._held.release()
        for name in ("save_checkpoint", "validation_step", "teardown"):
            vars(trainer.strategy).pop(name, None)  # ours, in front of that of the class
        self._held = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self.mask is None else {"mask": self.mask.state_dict(), **self.policy}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self.mask = SaliencyMask.from_state_dict(state_dict["mask"])
            self._restored = state_dict


def _over_shards(trainer: Trainer, moved: int, drift: float) -> tuple[int, float]:
    """Of all ranks together. A tensor in n parts was counted n times over, because each part lies on world size / n ranks."""
    device = trainer.strategy.root_device
    total = trainer.strategy.reduce(torch.tensor(moved, device=device, dtype=torch.int64), reduce_op="sum")
    largest = trainer.strategy.reduce(torch.tensor(drift, device=device, dtype=torch.float64), reduce_op="max")
    return int(total) // trainer.world_size, float(largest)


def _call_before(strategy: Strategy, name: str, look: Callable[[], None]) -> None:
    """Let a method of this strategy start with a call of ours."""
    method = getattr(strategy, name)

    def look_first(*arguments: Any, **keywords: Any) -> Any:
        look()
        return method(*arguments, **keywords)

    setattr(strategy, name, look_first)
