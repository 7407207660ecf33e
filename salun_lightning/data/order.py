"""In which order training meets what is to be forgotten and what is to be retained."""

import os
from collections.abc import Iterator
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler
from typing_extensions import override


def run_seed() -> int:
    """The seed that ``seed_everything`` was called with, as Lightning's own samplers take it; 0 if it was not."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def epoch_seed(seed: int, epoch: int, rank: int) -> int:
    """The seed of the random numbers that one process draws in one epoch."""
    return ((seed * 1_000_003 + epoch) * 1_000_003 + rank) % 2**63


Order = Literal["paired", "sequential", "mixed", "forget", "retain", "all"]


def published_order(trainer: Any) -> Order:
    """The order that the method of the trained module was published with; ``paired`` where there is none.

    In a module of another project, a callback holds the method.
    """
    holders = [] if trainer is None else [trainer.lightning_module, *trainer.callbacks]
    for holder in holders:
        order: Any = getattr(holder, "order", None)
        if isinstance(order, str) and order in get_args(Order):  # it may mean something else
            return cast("Order", order)
    return "paired"


class TrainingOrder(DistributedSampler[Any]):
    """Yields the positions of one training batch after the other.

    The order depends on the seed and the epoch alone, so a resumed run meets the same batches. Being a
    ``DistributedSampler`` it shares the samples out over the processes (padded to equal counts, as that class does), and
    Lightning tells it the epoch.

    - ``paired``: every batch holds ``batch_size`` samples of each set; the smaller set is gone through as often as the larger
      one needs.
    - ``sequential``: all batches of the forget set, then all of the retain set.
    - ``mixed``: one shuffled stream of both.
    - ``forget`` / ``retain``: that set alone.
    - ``all``: one shuffled stream of the whole training set, none of it marked as to be forgotten. Trains the original model.

    Args:
        forget: Positions of the forget set.
        retain: Positions of the retain set.
        order: See above.
        batch_size: Samples a batch, on each process.
        seed: Seed of the shuffling.
        num_replicas: How many processes share the work.
        rank: Which of them this is.

    Raises:
        ValueError: There is no such order.
    """

    generator: torch.Generator
    """Seeds the worker processes of the loader. It follows the epoch, so that a resumed run augments alike."""

    def __init__(
        self,
        forget: Tensor,
        retain: Tensor,
        order: Order,
        batch_size: int,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(range(len(forget) + len(retain)), num_replicas, rank, seed=seed)  # type: ignore[arg-type]
        if order not in get_args(Order):
            raise ValueError(f"order must be one of {', '.join(get_args(Order))}; got '{order}'.")
        self.forget = forget
        self.retain = retain
        self.order = order
        self.batch_size = batch_size
        self.generator = torch.Generator()
        self.set_epoch(0)

    @override
    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.generator.manual_seed(epoch_seed(self.seed, epoch, self.rank))

    @override
    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.order in ("mixed", "all"):
            yield from self._batches(torch.cat([self.forget, self.retain]), generator)
        elif self.order == "paired":
            forget, retain = self._batches(self.forget, generator), self._batches(self.retain, generator)
            for _ in range(len(self)):
                pair = []
                for positions, batches in ((self.forget, forget), (self.retain, retain)):
                    if not batches:
                        batches.extend(self._batches(positions, generator))
                    pair += batches.pop(0)
                yield pair
        else:
            if self.order in ("forget", "sequential"):
                yield from self._batches(self.forget, generator)
            if self.order in ("retain", "sequential"):
                yield from self._batches(self.retain, generator)

    @override
    def __len__(self) -> int:
        forget, retain, mixed = (
            -(-self._share(n) // self.batch_size)
            for n in (len(self.forget), len(self.retain), len(self.forget) + len(self.retain))
        )
        lengths = {"forget": forget, "retain": retain, "sequential": forget + retain, "paired": max(forget, retain)}
        return lengths.get(self.order, mixed)

    def _share(self, count: int) -> int:
        return -(-count // self.num_replicas)

    def _batches(self, positions: Tensor, generator: torch.Generator) -> list[list[int]]:
        shuffled = positions[torch.randperm(len(positions), generator=generator)]
        own = torch.arange(self.rank, self._share(len(positions)) * self.num_replicas, self.num_replicas)
        return [batch.tolist() for batch in shuffled[own % len(positions)].split(self.batch_size)]


class FixedOrder(DistributedSampler[Any]):
    """Yields a set in order, each sample once in all: for evaluation, and for the saliency pass.

    The processes get different samples and equally many batches, and nothing is padded: batches differ in size instead.

    Args:
        positions: Positions of the set.
        batch_size: Samples a batch at most (several processes need batches of 2 to share out an odd number one by one).
        num_replicas: How many processes share the work; 1 to see the whole set.
        rank: Which of them this is.

    Raises:
        ValueError: There are more processes than samples.
    """

    def __init__(self, positions: Tensor, batch_size: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(range(len(positions)), num_replicas, rank, shuffle=False)  # type: ignore[arg-type]
        if 0 < len(positions) < num_replicas:
            raise ValueError(
                f"{len(positions)} samples cannot be evaluated by {num_replicas} processes; use at most {len(positions)}"
                " processes (for training alone: limit_val_batches=0)."
            )
        steps = min(-(-len(positions) // (batch_size * num_replicas)), len(positions) // num_replicas)
        chunks = positions.tensor_split(steps * num_replicas) if steps else ()
        self._batches: list[list[int]] = [chunk.tolist() for chunk in chunks[rank::num_replicas]]

    @override
    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)
