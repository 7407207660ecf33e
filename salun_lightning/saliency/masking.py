"""The callback that decides which weights may move, and holds the others still."""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from salun_lightning.saliency.mask import SaliencyMask
from salun_lightning.saliency.scores import Score, saliency_scores
from salun_lightning.saliency.selection import num_kept
from salun_lightning.saliency.weights import bits_of, fingerprint, weights_of


class SaliencyMasking(Callback):
    r"""Let only the most salient weights move: :math:`\theta_u = m_S \odot \theta + (1 - m_S) \odot \theta_o` (Fan et al., 2024).

    Works with any LightningModule, datamodule and optimizer. When training starts, the mask is restored from the checkpoint
    that is resumed, or loaded from ``mask``, or computed in one pass over the forget set: ``datamodule.forget_dataloader()``
    where there is one, else the training loader (its ``forget`` part, if it has one), in order and in eval mode. From then on

    - gradients outside the mask are zeroed before clipping, so a clipped norm is that of the weights that may move;
    - after every optimizer step each weight outside the mask gets its original bits back, whatever momentum, weight decay or a
      NaN made of it. The same holds for the average that Lightning's ``WeightAveraging`` / ``EMAWeightAveraging`` keeps.

    The mask is part of the checkpoint. When training ends, :attr:`report` tells how many weights could move, how many did, and
    the largest change outside the mask, which is measured.

    Args:
        ratio: The fraction of all trainable weights that may move, from 0 (none) to 1 (all).
        mask: In place of ``ratio``: a mask, or a file that ``SaliencyMask.load`` reads.
        score: How salience is measured, see ``saliency_scores``.
        freeze_buffers: Whether buffers, such as the running statistics of BatchNorm, are put back after every batch. They are
            not weights; by default they move, as in the released code of the paper.
        seed: Seed of the ``random`` score.

    Raises:
        ValueError: ``ratio`` is out of range, or not exactly one of ``ratio`` and ``mask`` is given.
        MisconfigurationException: The strategy holds weights in a form that cannot be masked (DeepSpeed, FSDP1).

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
        self.ratio = ratio
        self.given = mask
        self.score = score
        self.freeze_buffers = freeze_buffers
        self.seed = seed
        self.mask = None
        self.report = {}
        self._held: dict[nn.Parameter, _Held] = {}
        self._buffers: dict[Tensor, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        strategy = trainer.strategy
        if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy):
            raise MisconfigurationException(
                f"{type(strategy).__name__} keeps weights in a form of its own, so single weights cannot be held still under"
                " it. Use a single device, 'ddp', or ModelParallelStrategy (FSDP2) with SaliencyMasking."
            )
        self.mask = None
        self.report = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weights = weights_of(pl_module)
        if self.mask is None:  # not restored from a checkpoint
            self.mask = self._make_mask(trainer, pl_module)
        self.mask.check_shapes({name: weight.shape for name, weight in weights.items()})
        self._held = {weight: _Held(weight, self.mask[name]) for name, weight in weights.items()}
        if self.freeze_buffers:
            self._buffers = {buffer: buffer.detach().clone() for buffer in pl_module.buffers()}
        for optimizer in trainer.optimizers:
            self._hooks.append(optimizer.register_step_post_hook(self._put_back))
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
            scores = saliency_scores(
                pl_module,
                _forget_batches(trainer) if self.score not in {"magnitude", "random"} else (),
                self.score,
                seed=self.seed,
                strategy=trainer.strategy,
            )
            return SaliencyMask.from_scores(scores, self.ratio, {"score": self.score, **made_from})
        assert self.given is not None
        mask = self.given if isinstance(self.given, SaliencyMask) else SaliencyMask.load(self.given)
        for what, value in made_from.items():
            if value and mask.metadata.get(what, value) != value:
                rank_zero_warn(f"The saliency mask was computed with another {what} (same shapes, other values).")
        return mask

    def _hold_average(self, average: nn.Module, pl_module: LightningModule) -> None:
        """Averaging rounds: the mean of a number with itself can be off by one bit. Put the average back, too."""
        held = []
        for mean, weight in zip(average.module.parameters(), pl_module.parameters(), strict=True):  # type: ignore[union-attr]
            holder = self._held.get(weight)
            if holder is not None:
                held.append((mean, holder if mean.device == weight.device else holder.on(mean.device)))
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
            if weight not in self._held:
                if not weight.requires_grad:
                    continue
                raise MisconfigurationException(
                    f"A weight of shape {tuple(weight.shape)} is trained that the saliency mask does not know: it did not"
                    " require gradients when training started. Unfreeze it before training."
                )
            if weight.grad is not None and not weight.grad.is_sparse:
                bits_of(weight.grad).mul_(self._held[weight].movable)

    def _put_back(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for weight in _parameters(optimizer):
            if weight in self._held:
                self._held[weight].put_back(weight)

    @override
    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        with torch.no_grad():
            for buffer, original in self._buffers.items():
                buffer.copy_(original)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.mask is None or not self._held:
            return
        moved, drift = 0, 0.0
        for weight, held in self._held.items():
            moved += held.num_moved(weight)
            drift = max(drift, held.drift(weight))
            held.put_back(weight)
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
        self._hooks, self._held, self._buffers = [], {}, {}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self.mask is None else {"mask": self.mask.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not state_dict:
            return
        mask = SaliencyMask.from_state_dict(state_dict["mask"])
        if self.ratio is not None and (mask.ratio, mask.metadata.get("score")) != (self.ratio, self.score):
            raise MisconfigurationException(
                f"The checkpoint was made with a saliency mask of ratio {mask.ratio} by {mask.metadata.get('score')}, but"
                f" ratio {self.ratio} by {self.score} is asked for. Resume with the same mask, or start afresh."
            )
        self.mask = mask


class _Held:
    """One weight tensor: where it may move, and the bits it came with."""

    def __init__(self, weight: nn.Parameter, mask: Tensor) -> None:
        original = bits_of(weight)
        if isinstance(weight.data, DTensor):
            placed = distribute_tensor(
                mask.to(original.device), weight.data.device_mesh, weight.data.placements, src_data_rank=None
            )
            mask = placed.to_local()
        # laid out in memory like the weight, which makes the arithmetic of every step several times faster
        self.movable = torch.empty_like(original, dtype=torch.bool).copy_(mask)
        self.frozen = ~self.movable
        self.original = torch.empty_like(original).copy_(original)

    def on(self, device: torch.device) -> "_Held":
        """A copy on another device."""
        other = _Held.__new__(_Held)
        for name, tensor in vars(self).items():
            setattr(other, name, tensor.to(device))
        return other

    def put_back(self, weight: Tensor) -> None:
        """Give the frozen part its original bits. Selection by bits: exact for -0.0, and NaN cannot leak through."""
        bits = bits_of(weight)
        bits.bitwise_xor_((bits ^ self.original).mul_(self.frozen))

    def num_moved(self, weight: Tensor) -> int:
        return int((bits_of(weight) != self.original).sum())

    def drift(self, weight: Tensor) -> float:
        """Largest change outside the mask; the smallest positive number stands for a change of bits alone."""
        bits = bits_of(weight)
        changed = (bits != self.original) & self.frozen
        if not changed.any():
            return 0.0
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        change = (local.detach().double() - self.original.view(local.dtype).double())[changed].abs().max().item()
        return math.inf if math.isnan(change) else max(change, 5e-324)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _over_shards(trainer: Trainer, moved: int, drift: float) -> tuple[int, float]:
    device = trainer.strategy.root_device
    total = trainer.strategy.reduce(torch.tensor(moved, device=device, dtype=torch.int64), reduce_op="sum")
    largest = trainer.strategy.reduce(torch.tensor(drift, device=device, dtype=torch.float64), reduce_op="max")
    return int(total), float(largest)


def _forget_batches(trainer: Trainer) -> Iterable[Any]:
    """The forget set, once, in order, all of it on every rank."""
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if hasattr(datamodule, "forget_dataloader"):
        # all of it on every rank, that is its contract
        return _in_order(datamodule.forget_dataloader(), world_size=1)
    loaders = trainer.train_dataloader
    if isinstance(loaders, Mapping) and "forget" in loaders:
        return ({"forget": batch} for batch in _in_order(loaders["forget"], trainer.world_size))
    if isinstance(loaders, Mapping | list | tuple):
        raise MisconfigurationException(
            "There are several training loaders and none is called 'forget', so it is not clear what is to be forgotten. Give"
            " the datamodule a forget_dataloader()."
        )
    batches = _in_order(loaders, trainer.world_size)
    return (_forget_part(batch) for batch in batches)


def _forget_part(batch: Any) -> Any:
    return {"forget": batch["forget"]} if isinstance(batch, Mapping) and "forget" in batch else batch


def _in_order(loader: Any, world_size: int) -> Iterable[Any]:
    """The loader without shuffling, dropping, padding or sharing out."""
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        batch_size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
        if batch_size is not None:
            return DataLoader(
                loader.dataset, batch_size=batch_size, collate_fn=loader.collate_fn, num_workers=loader.num_workers
            )
    if world_size > 1:
        raise MisconfigurationException(
            "With several processes the forget set must be a map-style dataset, so that each sample counts exactly once."
            " Give the datamodule such a forget_dataloader(), or compute the mask in one process and pass mask=<file>."
        )
    batches: Iterable[Any] = loader
    return batches
