"""The datamodule that knows what is to be forgotten."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from salun_lightning.data.forget import ForgetRequest
from salun_lightning.data.order import FixedOrder, Order, TrainingOrder, published_order, run_seed
from salun_lightning.data.samples import SampleBatches, Samples, Transform, loader_of
from salun_lightning.data.split import check_made_with, check_split, digests, split_of
from salun_lightning.data.targets import names_of, targets_of
from salun_lightning.data.wrong_labels import WrongLabels, relabelled


class Sources(NamedTuple):
    """Training data, test data and class names of a data set."""

    train: Any
    test: Any
    class_names: Sequence[str] | None = None


class ForgetRetainDataModule(LightningDataModule):
    """Splits the training set into what is to be forgotten and what is to be retained.

    One split serves training, retraining, unlearning and evaluation: it follows from the data, ``val_fraction``,
    ``split_seed`` and the forget request alone. A checkpoint carries its digest, and one made with another split is refused.

    A training batch is a dictionary with the parts ``forget`` and ``retain`` (each :class:`Samples`), of which either may be
    absent. Evaluation loaders are dictionaries by set: ``forget``, ``retain``, ``val``, ``test`` and, when whole classes are
    forgotten, ``test_forget``: the test images of those classes, which ``test`` then leaves out.

    Args:
        forget: What is to be forgotten; by default the images that ``wrong_labels`` labels wrong.
        train: Map-style dataset of (image, class) pairs, longer tuples or dictionaries, or :class:`ImageTensors`.
        test: Likewise, for testing. Without it, ``test`` leaves out what needs a test set.
        targets: The classes of ``train`` and ``test``, if ``targets_of`` cannot read them without loading the images.
        class_names: Names of the classes; their numbers by default.
        train_transform: Augments training images: whole uint8 batches of :class:`ImageTensors`, else one image at a time.
        eval_transform: Prepares images for evaluation and for the saliency pass, likewise.
        val_fraction: How much of each class is set aside for validation, from 0 up to 1.
        split_seed: Seed of the validation split.
        batch_size: Samples a batch, on each process.
        order: How training interleaves the two sets, see ``TrainingOrder``; by default as the module's method was published.
        num_workers: Loader processes, for datasets that are not held in memory.
        input_key: Where a sample holds its image: a position in a tuple, or a key of a dictionary.
        target_key: Likewise, its class.
        wrong_labels: Labels part of the training set wrong: for every model, the original one included.
        augment_epochs: For how many epochs ``train_transform`` is used, and then ``eval_transform``; None for all of them.

    Raises:
        ValueError: The request cannot be met, or leaves nothing to forget or nothing to retain.
    """

    forget_indices: Tensor
    retain_indices: Tensor
    """Positions of either set in the training data, ascending int64; after ``setup``."""
    forgotten_classes: list[int]
    """The classes that are forgotten whole; after ``setup``. ``trained_classes`` are those that have training images at all."""

    def __init__(
        self,
        forget: ForgetRequest | None = None,
        train: Dataset | None = None,  # type: ignore[type-arg]  # jsonargparse makes no objects of Dataset[Any]
        test: Dataset | None = None,  # type: ignore[type-arg]
        targets: tuple[Sequence[int], Sequence[int] | None] | None = None,
        class_names: list[str] | None = None,
        train_transform: Transform | None = None,
        eval_transform: Transform | None = None,
        val_fraction: float = 0.0,
        split_seed: int = 0,
        batch_size: int = 256,
        order: Order | None = None,
        num_workers: int = 0,
        input_key: int | str = 0,
        target_key: int | str = 1,
        wrong_labels: WrongLabels | None = None,
        augment_epochs: int | None = None,
    ) -> None:
        super().__init__()
        check_split(forget, wrong_labels, val_fraction, split_seed)
        _check_numbers(batch_size, num_workers, augment_epochs)
        self.forget = forget
        self.wrong_labels = wrong_labels
        self.given = Sources(train, test, class_names)
        self.targets = targets
        self.train_transform = train_transform
        self.eval_transform = eval_transform
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.batch_size = batch_size
        self.order = order
        self.num_workers = num_workers
        self.keys = (input_key, target_key)
        self.augment_epochs = augment_epochs
        self._ready = False

    def load(self) -> Sources:
        """The data. A subclass for a data set overrides this."""
        if self.given.train is None:
            raise ValueError("ForgetRetainDataModule needs a train dataset.")
        return self.given

    @override
    def setup(self, stage: str | None = None) -> None:
        if self.trainer is not None and self.trainer.overfit_batches:  # type: ignore[attr-defined]
            raise MisconfigurationException("overfit_batches replaces the order of the batches. Use limit_train_batches.")
        if self._ready:
            return
        train, test, class_names = self.load()
        given, key = self.targets or (None, None), self.keys[1]
        true = targets_of(train, given[0], key)
        test_targets = torch.empty(0, dtype=torch.int64) if test is None else targets_of(test, given[1], key)
        self.class_names = names_of(class_names, true, test_targets)
        split = split_of(true, self.class_names, self.forget, self.wrong_labels, self.val_fraction, self.split_seed)
        if self.wrong_labels is not None:
            train = relabelled(train, true, split.targets, key)
        self._train, self._train_targets = train, split.targets
        self.forget_indices, self.retain_indices = split.forget, split.retain
        self.forgotten_classes = [] if self.forget is None else self.forget.classes(self.class_names)
        self.trained_classes: list[int] = self._train_targets.unique().tolist()
        self.anchors = _anchors(self.forget, self.class_names, self.trained_classes)
        gone = torch.isin(test_targets, torch.tensor(self.forgotten_classes))
        self._sets = {
            "forget": (train, self._train_targets, self.forget_indices),
            "retain": (train, self._train_targets, self.retain_indices),
            "val": (train, self._train_targets, split.val),
            "test": (test, test_targets, (~gone).nonzero().flatten()),
            "test_forget": (test, test_targets, gone.nonzero().flatten()),
        }
        self._ready = True

    @property
    def num_classes(self) -> int:
        """The number of classes; after ``setup``."""
        return len(self.class_names)

    @property
    def split(self) -> dict[str, str]:
        """Digests of the training set and of the forget set; after ``setup``."""
        return digests(self._train_targets, self.forget_indices, self.retain_indices)

    @property
    def fingerprint(self) -> str:
        """A short digest of the split; after ``setup``."""
        return hashlib.sha256(json.dumps(self.split).encode()).hexdigest()[:16]

    @override
    def state_dict(self) -> dict[str, str]:
        return {**self.split, "order": self._training_order()}

    @override
    def load_state_dict(self, state_dict: dict[str, str]) -> None:
        """Refuse a checkpoint that was made with another split; see ``check_made_with``."""
        check_made_with(state_dict, self.state_dict(), self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING)

    def _training_order(self) -> Order:
        return published_order(self.trainer) if self.order is None else self.order

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        order = self._training_order()
        marked = torch.isin(torch.arange(len(self._train_targets)), self.forget_indices) & (order != "all")
        sampler = TrainingOrder(self.forget_indices, self.retain_indices, order, self.batch_size, run_seed(), *self._replicas())
        samples = self._training_samples(self.train_transform, marked)
        if self.augment_epochs is not None:
            _stop_augmenting(samples, sampler, self.augment_epochs, self.eval_transform)
        if self.trainer is not None:  # of a resumed run, worker processes fetch batches before Lightning tells the epoch
            sampler.set_epoch(self.trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
        return self._loader(samples, sampler)

    def forget_dataloader(self) -> DataLoader[Any]:
        """The forget set for the saliency pass: all of it on every process, in order, with evaluation transforms."""
        samples = self._training_samples(self.eval_transform, torch.ones(len(self._train_targets), dtype=torch.bool))
        return self._loader(samples, FixedOrder(self.forget_indices, self.batch_size))

    def set_dataloader(self, name: str) -> DataLoader[Any]:
        """All of a set (``forget``, ``retain``, ``val``, ``test``, ``test_forget``) on every process, as evaluation sees it.

        Raises:
            ValueError: There is no set of that name.
        """
        if name not in self._sets:
            raise ValueError(f"There is no set '{name}'. Choose from {', '.join(self._sets)}.")
        return self._in_order(name, 1, 0)

    def probe(self) -> Samples:
        """Two samples as evaluation prepares them, to try a network on; after ``setup``."""
        return self._training_samples(self.eval_transform).samples(torch.cat([self.forget_indices, self.retain_indices])[:2])

    def _training_samples(self, transform: Transform | None, marked: Tensor | None = None) -> SampleBatches:
        return SampleBatches(self._train, transform, marked, self._train_targets, self.keys)

    @override
    def val_dataloader(self) -> dict[str, DataLoader[Any]]:
        return self._evaluation("forget", "val")

    @override
    def test_dataloader(self) -> dict[str, DataLoader[Any]]:
        return self._evaluation(*self._sets)

    @override
    def predict_dataloader(self) -> Any:
        """All sets, unless the module brings loaders of its own, as one that generates images does."""
        module = getattr(self.trainer, "lightning_module", None)
        if module is not None and is_overridden("predict_dataloader", module):
            return module.predict_dataloader()
        return self.test_dataloader()

    def _evaluation(self, *names: str) -> dict[str, DataLoader[Any]]:
        return {name: self._in_order(name, *self._replicas()) for name in names if len(self._sets[name][2])}

    def _in_order(self, name: str, num_replicas: int, rank: int) -> DataLoader[Any]:
        source, targets, positions = self._sets[name]
        batches = SampleBatches(source, self.eval_transform, targets=targets, keys=self.keys)
        return self._loader(batches, FixedOrder(positions, self.batch_size, num_replicas, rank))

    def _replicas(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)

    def _loader(self, batches: SampleBatches, sampler: TrainingOrder | FixedOrder) -> DataLoader[Any]:
        return loader_of(batches, sampler, self.num_workers, self.trainer.strategy.root_device if self.trainer else None)


def _anchors(forget: ForgetRequest | None, names: list[str], trained: list[int]) -> dict[int, str]:
    """What is to stand in the place of the classes that are trained on."""
    known = {} if forget is None else forget.anchors(names)
    return {number: anchor for number, anchor in known.items() if number in trained}


def _check_numbers(batch_size: int, num_workers: int, augment_epochs: int | None) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}.")
    for name, number in {"num_workers": num_workers, "augment_epochs": augment_epochs or 0}.items():
        if number < 0:
            raise ValueError(f"{name} must not be negative, got {number}.")


def _stop_augmenting(samples: SampleBatches, order: TrainingOrder, epochs: int, plain: Transform | None) -> None:
    """Let training samples come as evaluation prepares them, once there were so many epochs."""
    augmented = samples.transform

    def choose(epoch: int) -> None:
        samples.transform = augmented if epoch < epochs else plain

    order.on_epoch = choose
    choose(0)
