"""The callback that decides which weights may move, and holds the others still."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from salun_lightning.saliency.forget_set import forget_batches
from salun_lightning.saliency.mask import SaliencyMask
from salun_lightning.saliency.scores import Score, check_score, saliency_scores
from salun_lightning.saliency.selection import num_kept
from salun_lightning.saliency.weights import bits_of, fingerprint, weights_of

_SERVED = SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy
_NOT_SERVED = DeepSpeedStrategy | XLAStrategy | SingleDeviceXLAStrategy  # though they derive from those


class SaliencyMasking(Callback):
    r"""Let only salient weights move: :math:`\theta_u = m_S \odot \theta + (1 - m_S) \odot \theta_o` (Fan et al., ICLR 2024).

    Works with any LightningModule, datamodule and optimizer. When training starts, the mask is restored from the checkpoint
    that is resumed, or loaded from ``mask``, or computed in one pass over the forget set: ``datamodule.forget_dataloader()``
    where there is one, else the training loader (its ``forget`` part, if it has one), each sample once, in eval mode. From then
    on

    - gradients outside the mask are zeroed before clipping, so a clipped norm is that of the weights that may move;
    - after every optimizer step each weight outside the mask gets its original bits back, whatever momentum, weight decay or a
      NaN made of it. The same holds for the average that Lightning's ``WeightAveraging`` / ``EMAWeightAveraging`` keeps.

    The original weights are those at the start of training, after a checkpoint was restored. The mask is part of the
    checkpoint. When training ends, :attr:`report` tells how many weights could move, how many did since it was started or
    resumed, and the largest change outside the mask, which is measured.

    Args:
        ratio: The fraction of all trainable weights that may move, from 0 (none) to 1 (all).
        mask: In place of ``ratio``: a mask, or a file that ``SaliencyMask.load`` reads.
        score: How salience is measured, see ``saliency_scores``.
        freeze_buffers: Whether buffers, such as the running statistics of BatchNorm, are put back after every batch. They are
            not weights; by default they move, as in the released code of the paper.
        seed: Seed of the ``random`` score.

    Raises:
        ValueError: ``ratio`` is out of range, not exactly one of ``ratio`` and ``mask`` is given, or there is no such score.
        MisconfigurationException: The strategy holds weights in a form that cannot be masked (DeepSpeed, FSDP1, XLA), or the
            checkpoint that is resumed was made with another mask.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[SaliencyMasking(0.5)], logger=False, enable_checkpointing=False)
    """

    mask: SaliencyMask | None
    """The mask in force, from the start of training on."""

    report: dict[str, float]
    """After training: ``num_weights``, ``num_kept``, ``num_moved`` and ``drift`` (largest change outside the mask)."""

    def __init__(
        self,
        ratio: float | None = None,
        mask: str | Path | SaliencyMask | None = None,
        score: Score = "gradient",
        freeze_buffers: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if (ratio is None) == (mask is None):
            raise ValueError("SaliencyMasking takes either ratio (compute a mask) or mask (use this one), not both.")
        if ratio is not None:
            num_kept(ratio, 0)  # refuses what is not a ratio
        check_score(score)
        self.ratio = ratio
        self.given = mask
        self.score = score
        self.freeze_buffers = freeze_buffers
        self.seed = seed
        self.mask = None
        self.report = {}
        self._held: dict[Tensor, _Held] = {}
        self._held_buffers: dict[Tensor, _Held] = {}
        self._hooks: list[RemovableHandle] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        strategy = trainer.strategy
        if not isinstance(strategy, _SERVED) or isinstance(strategy, _NOT_SERVED):
            raise MisconfigurationException(
                f"{type(strategy).__name__} keeps weights in a form of its own, so single weights cannot be held still under"
                " it. Use a single device, 'ddp', or ModelParallelStrategy (FSDP2) with SaliencyMasking."
            )
        self.mask = None
        self.report = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for child in pl_module.modules():
            if isinstance(child, FSDPModule):
                child.reshard()  # a validation before training leaves gathered weights in the place of the trained ones
        weights = weights_of(pl_module)
        if self.mask is None:
            self.mask = self._make_mask(trainer, pl_module)
        else:
            self._check_restored(self.mask)
        self.mask.check_shapes({name: weight.shape for name, weight in weights.items()})
        self._held = {weight: _Held(weight, self.mask[name]) for name, weight in weights.items()}
        if self.freeze_buffers:
            self._held_buffers = {b: _Held(b, torch.zeros(b.shape, dtype=torch.bool)) for b in pl_module.buffers()}
        for optimizer in trainer.optimizers:
            self._watch(optimizer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging) and callback._average_model is not None:
                self._hold_average(callback._average_model, pl_module)
        rank_zero_info(f"SaliencyMasking: {self.mask}")

    def _make_mask(self, trainer: Trainer, pl_module: LightningModule) -> SaliencyMask:
        made_from = {
            "network": fingerprint(weights_of(pl_module).items()),
            "data": getattr(trainer.datamodule, "fingerprint", ""),  # type: ignore[attr-defined]
        }
        if self.ratio is not None:
            batches = forget_batches(trainer)
            scores = saliency_scores(pl_module, batches, self.score, seed=self.seed, strategy=trainer.strategy)
            return SaliencyMask.from_scores(scores, self.ratio, {"score": self._score_name, **made_from})
        mask = self._given_mask()
        for what, value in made_from.items():
            if value and mask.metadata.get(what, value) != value:
                rank_zero_warn(f"The saliency mask was computed with another {what} (same shapes, other values).")
        return mask

    @property
    def _score_name(self) -> str:
        return f"random, seed {self.seed}" if self.score == "random" else self.score

    def _given_mask(self) -> SaliencyMask:
        assert self.given is not None
        return self.given if isinstance(self.given, SaliencyMask) else SaliencyMask.load(self.given)

    def _check_restored(self, mask: SaliencyMask) -> None:
        """Refuse to resume with other settings than the checkpoint's."""
        made, asked = (mask.ratio, mask.metadata.get("score")), (self.ratio, self._score_name)
        if self.ratio is not None and made != asked:
            raise MisconfigurationException(
                f"The checkpoint was made with a saliency mask of ratio {made[0]} by {made[1]}, but ratio {asked[0]} by"
                f" {asked[1]} is asked for. Resume with the same mask, or start afresh."
            )
        if self.given is not None and self._given_mask() != mask:
            raise MisconfigurationException(
                "The checkpoint was made with another saliency mask than the one given. Resume with the same mask, or start"
                " afresh."
            )

    def _watch(self, optimizer: torch.optim.Optimizer) -> None:
        try:
            self._hooks.append(optimizer.register_step_post_hook(self._put_back))
        except AttributeError as error:
            raise MisconfigurationException(
                f"{type(optimizer).__name__} does not tell when it has stepped, so weights cannot be held still after it."
                " Derive it from torch.optim.Optimizer and call its __init__."
            ) from error

    def _hold_average(self, average: nn.Module, pl_module: LightningModule) -> None:
        """Averaging rounds: the mean of a number with itself can be off by one bit. Put the average back, too."""
        averaged = average.module
        assert isinstance(averaged, nn.Module)
        means = dict(_named_tensors(averaged))
        held = []
        for name, tensor in _named_tensors(pl_module):
            holder = self._held.get(tensor) or self._held_buffers.get(tensor)
            if holder is not None and name in means:
                mean = means[name]
                held.append((mean, holder if mean.device == tensor.device else holder.on(mean.device)))
                held[-1][1].put_back(mean)  # it may have been copied before the original model was loaded
        update = average.update_parameters

        def update_and_hold(module: nn.Module) -> None:
            update(module)  # type: ignore[operator]
            for mean, holder in held:
                holder.put_back(mean)

        average.update_parameters = update_and_hold  # type: ignore[assignment]

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization:  # there, clipping may come before on_before_optimizer_step
            self._mask_gradients(weight for optimizer in trainer.optimizers for weight in _parameters(optimizer))

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        self._mask_gradients(_parameters(optimizer))

    def _mask_gradients(self, weights: Iterable[nn.Parameter]) -> None:
        for weight in weights:
            held = self._held.get(weight)
            if held is None:
                if not weight.requires_grad:
                    continue
                raise MisconfigurationException(
                    f"A weight of shape {tuple(weight.shape)} is trained that the saliency mask does not know: it did not"
                    " require gradients when training started. Unfreeze it before training."
                )
            if weight.grad is not None and not weight.grad.is_sparse:
                bits_of(weight.grad).mul_(held.movable)

    def _put_back(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for weight in _parameters(optimizer):
            held = self._held.get(weight)
            if held is not None:
                held.put_back(weight)

    @override
    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self._put_back_buffers()

    def _put_back_buffers(self) -> None:
        for buffer, held in self._held_buffers.items():
            held.put_back(buffer)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.mask is None or not self._held:
            return
        moved, drift = 0, 0.0
        for weight, held in self._held.items():
            drift = max(drift, held.drift(weight))
            held.put_back(weight)
            moved += held.num_moved(weight) * _shards(weight)
        self._put_back_buffers()
        if isinstance(trainer.strategy, ModelParallelStrategy):
            moved, drift = _over_shards(trainer, moved, drift)
        self.report = {
            "num_weights": self.mask.num_weights,
            "num_kept": self.mask.num_kept,
            "num_moved": moved,
            "drift": drift,
        }
        rank_zero_info(
            f"SaliencyMasking: of {self.mask.num_weights:,} weights {self.mask.num_kept:,} could move and {moved:,} did;"
            f" largest change outside the mask: {drift:g}"
        )
        if drift != 0:
            rank_zero_warn(
                "Something other than an optimizer wrote to weights outside the saliency mask after the last step. They were"
                " put back now, but checkpoints saved before may hold the change."
            )

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for hook in self._hooks:
            hook.remove()
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging) and callback._average_model is not None:
                vars(callback._average_model).pop("update_parameters", None)
        self._hooks, self._held, self._held_buffers = [], {}, {}

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt):  # perhaps in the middle of an optimizer step
            for weight, held in self._held.items():
                held.put_back(weight)
        self.teardown(trainer, pl_module, "fit")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self.mask is None else {"mask": self.mask.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self.mask = SaliencyMask.from_state_dict(state_dict["mask"])


class _Held:
    """One tensor: where it may move, and the bits it came with."""

    def __init__(self, tensor: Tensor, mask: Tensor) -> None:
        original = bits_of(tensor)
        if isinstance(tensor, DTensor):
            mask = distribute_tensor(
                mask.to(original.device), tensor.device_mesh, tensor.placements, src_data_rank=None
            ).to_local()
        # laid out in memory like the tensor, which makes the arithmetic of every step several times faster
        self.movable = torch.empty_like(original, dtype=torch.bool).copy_(mask)
        self.original = torch.empty_like(original).copy_(original)

    def on(self, device: torch.device) -> "_Held":
        """A copy on another device."""
        other = _Held.__new__(_Held)
        other.movable, other.original = self.movable.to(device), self.original.to(device)
        return other

    def put_back(self, tensor: Tensor) -> None:
        """Give the frozen part its original bits. Selection by bits: exact for -0.0, and NaN cannot leak through."""
        bits = bits_of(tensor)
        torch.bitwise_xor((bits ^ self.original).mul_(self.movable), self.original, out=bits)

    def num_moved(self, tensor: Tensor) -> int:
        """How many numbers changed; of a sharded tensor in this rank's part."""
        return int((bits_of(tensor) != self.original).sum())

    def drift(self, tensor: Tensor) -> float:
        """Largest change outside the mask; the smallest positive number stands for a change of bits alone."""
        bits = bits_of(tensor)
        changed = (bits != self.original) & ~self.movable
        if not changed.any():
            return 0.0
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        change = (local.detach().double() - self.original.view(local.dtype).double())[changed].abs().max().item()
        return math.inf if math.isnan(change) else max(change, 5e-324)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _shards(tensor: Tensor) -> int:
    """In how many different parts a tensor lies on the ranks."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in sizes if not placement.is_replicate())


def _over_shards(trainer: Trainer, moved: int, drift: float) -> tuple[int, float]:
    """Of all ranks together. A tensor in n parts was counted n times over, because each part lies on world size / n ranks."""
    device = trainer.strategy.root_device
    total = trainer.strategy.reduce(torch.tensor(moved, device=device, dtype=torch.int64), reduce_op="sum")
    largest = trainer.strategy.reduce(torch.tensor(drift, device=device, dtype=torch.float64), reduce_op="max")
    return int(total) // trainer.world_size, float(largest)
