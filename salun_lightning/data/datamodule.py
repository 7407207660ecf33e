"""The datamodule that knows what is to be forgotten."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from salun_lightning.data.forget import ForgetClasses, ForgetRequest
from salun_lightning.data.order import FixedOrder, Order, TrainingOrder, run_seed
from salun_lightning.data.samples import ImageRequests, ImageTensors, SampleBatches, Samples, Transform
from salun_lightning.data.split import digest, validation_split
from salun_lightning.data.targets import check_classes, targets_of
from salun_lightning.data.wrong_labels import WrongLabels, relabelled


class Sources(NamedTuple):
    """Training data, test data and class names of a data set."""

    train: Any
    test: Any
    class_names: Sequence[str] | None = None


class ForgetRetainDataModule(LightningDataModule):
    """Splits the training set into what is to be forgotten and what is to be retained.

    One split serves training, retraining, unlearning and evaluation: it follows from the data, ``val_fraction``,
    ``split_seed`` and the forget request alone. Its digest goes into each checkpoint, and a checkpoint made with another split
    is refused.

    A training batch is a dictionary with the parts ``forget`` and ``retain`` (each :class:`Samples`), of which either may be
    absent. Evaluation loaders are dictionaries by set: ``forget``, ``retain``, ``val``, ``test`` and, when whole classes are
    forgotten, ``test_forget``: the test images of those classes, which ``test`` then leaves out.

    Args:
        forget: What is to be forgotten; by default the images that ``wrong_labels`` labels wrong.
        train: Map-style dataset of (image, class) pairs, longer tuples or dictionaries, or :class:`ImageTensors`.
        test: Likewise, for testing. Without it, ``test`` leaves out what needs a test set.
        targets: The classes of ``train`` and ``test``, where these hold none that can be read without their images: in
            ``targets`` or ``labels``, in a column, or in what ``Subset``, ``ConcatDataset`` and ``TensorDataset`` are made of.
        class_names: Names of the classes; their numbers by default.
        train_transform: Augments training images: whole uint8 batches of :class:`ImageTensors`, else one image at a time.
        eval_transform: Prepares images for evaluation and for the saliency pass, likewise.
        val_fraction: How much of each class is set aside for validation, from 0 up to 1.
        split_seed: Seed of the validation split.
        batch_size: Samples a batch, on each process.
        order: How training interleaves the two sets, see ``TrainingOrder``; by default as the module's method was published.
        num_workers: Loader processes, for datasets that are not held in memory.
        generated_per_class: For generative models: how many images of each class ``test`` and ``predict`` ask for. A loader
            ``generated`` then brings the requests (batches of ``Requested``).
        generated_classes: Of which classes, by name or number; by default of all.
        input_key: Where a sample holds its image: a position in a tuple, or a key of a dictionary.
        target_key: Likewise, its class.
        wrong_labels: Labels part of the training set wrong: for every model, the original one included.

    Raises:
        ValueError: The request cannot be met, or leaves nothing to forget or nothing to retain.
    """

    forget_indices: Tensor
    """Positions of the forget set in the training data, ascending int64; after ``setup``."""

    retain_indices: Tensor
    """Positions of the retain set in the training data, ascending int64; after ``setup``."""

    forgotten_classes: list[int]
    """The classes that are forgotten whole; after ``setup``."""

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
        generated_per_class: int = 0,
        generated_classes: list[int | str] | int | str | None = None,
        input_key: int | str = 0,
        target_key: int | str = 1,
        wrong_labels: WrongLabels | None = None,
    ) -> None:
        super().__init__()
        if forget is None and wrong_labels is None:
            raise ValueError("It is not said what is to be forgotten. Give forget, or wrong_labels.")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction must be at least 0 and below 1, got {val_fraction}.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}.")
        if not 0 <= split_seed < 2**32:
            raise ValueError(f"split_seed must be a whole number from 0 to 2^32 - 1, got {split_seed}.")
        for name, number in (("num_workers", num_workers), ("generated_per_class", generated_per_class)):
            if number < 0:
                raise ValueError(f"{name} must not be negative, got {number}.")
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
        self.generated_per_class = generated_per_class
        self.generated_classes = generated_classes
        self.keys = (input_key, target_key)
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
        self._train_targets = targets_of(train, given[0], key)
        test_targets = torch.empty(0, dtype=torch.int64) if test is None else targets_of(test, given[1], key)
        named = range(int(self._train_targets.max()) + 1) if class_names is None else class_names
        self.class_names = [str(name) for name in named]
        check_classes(torch.cat([self._train_targets, test_targets]), len(self.class_names))
        true = self._train_targets
        val, trained = validation_split(true, len(self.class_names), self.val_fraction, self.split_seed)
        if self.wrong_labels is not None:
            self._train_targets = self.wrong_labels.labels(true, self.class_names, trained)
            train = relabelled(train, true, self._train_targets, key)
        self._train = train
        wrong = (self._train_targets != true).nonzero().flatten()
        self.forget_indices = (
            wrong if self.forget is None else self.forget.indices(self._train_targets, self.class_names, trained)
        )
        self.retain_indices = trained[~torch.isin(trained, self.forget_indices)]
        for name, positions in (("forget", self.forget_indices), ("retain", self.retain_indices)):
            if not len(positions):
                raise ValueError(
                    f"The {name} set is empty: the request selects {len(self.forget_indices)} of {len(trained)} training"
                    " images."
                )
        self.forgotten_classes = [] if self.forget is None else self.forget.classes(self.class_names)
        gone = torch.isin(test_targets, torch.tensor(self.forgotten_classes))
        asked = self.generated_classes
        wanted = range(self.num_classes) if asked is None else ForgetClasses(asked).classes(self.class_names)
        self._requests = ImageRequests(wanted, self.generated_per_class)
        self._sets = {
            "forget": (train, self._train_targets, self.forget_indices),
            "retain": (train, self._train_targets, self.retain_indices),
            "val": (train, self._train_targets, val),
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
        trained = torch.cat([self.forget_indices, self.retain_indices]).sort().values
        return {
            "training_set": digest(self._train_targets, trained),
            "forget_set": digest(self._train_targets, self.forget_indices),
        }

    @property
    def fingerprint(self) -> str:
        """A short digest of the split; after ``setup``."""
        return hashlib.sha256(json.dumps(self.split).encode()).hexdigest()[:16]

    @override
    def state_dict(self) -> dict[str, str]:
        return {**self.split, "order": self._training_order()}

    @override
    def load_state_dict(self, state_dict: dict[str, str]) -> None:
        """Refuse a checkpoint that was made with another split.

        Raises:
            MisconfigurationException: The training set differs or, unless the checkpoint was trained on all of it, the forget
                set; or a run is to go on in another order.
        """
        self.check_training_set(state_dict)
        resumed = self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if resumed and state_dict["order"] != self._training_order():
            raise MisconfigurationException(
                f"The checkpoint is of a run with the order '{state_dict['order']}', but this one has"
                f" '{self._training_order()}': they cannot be one run. Give the same order, or start a new run."
            )
        if state_dict["order"] != "all" and state_dict["forget_set"] != self.split["forget_set"]:
            raise MisconfigurationException(
                "The checkpoint was made with another forget set than this datamodule's. Give the forget request and seed that"
                " it was made with."
            )

    def check_training_set(self, state_dict: Mapping[str, str]) -> None:
        """Refuse an original model that was trained on another training set.

        Raises:
            MisconfigurationException: The training set differs.
        """
        if state_dict["training_set"] != self.split["training_set"]:
            raise MisconfigurationException(
                "The checkpoint was made with another split: its training set is not this datamodule's, so part of what is to"
                " be forgotten may never have been trained on. Give the data, val_fraction and split_seed it was made with."
            )

    def _training_order(self) -> Order:
        if self.order is not None:
            return self.order
        published: Order = getattr(self.trainer.lightning_module, "order", "paired") if self.trainer is not None else "paired"
        return published if published in get_args(Order) else "paired"  # a module of another project may mean something else

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        order = self._training_order()
        marked = torch.zeros(len(self._train_targets), dtype=torch.bool)
        if order != "all":
            marked[self.forget_indices] = True
        sampler = TrainingOrder(
            self.forget_indices,
            self.retain_indices,
            order,
            self.batch_size,
            run_seed(),
            *self._replicas(),
        )
        if self.trainer is not None:  # of a resumed run, worker processes fetch batches before Lightning tells the epoch
            sampler.set_epoch(self.trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
        return self._loader(self._training_samples(self.train_transform, marked), sampler)

    def forget_dataloader(self) -> DataLoader[Any]:
        """The forget set for the saliency pass: all of it on every process, in order, with evaluation transforms."""
        marked = torch.ones(len(self._train_targets), dtype=torch.bool)
        sampler = FixedOrder(self.forget_indices, self.batch_size)
        return self._loader(self._training_samples(self.eval_transform, marked), sampler)

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
        return self._evaluation(*self._sets) | self._generated()

    @override
    def predict_dataloader(self) -> dict[str, DataLoader[Any]]:
        return self._generated() or self._evaluation(*self._sets)

    def _evaluation(self, *names: str) -> dict[str, DataLoader[Any]]:
        loaders = {}
        for name in names:
            source, targets, positions = self._sets[name]
            if len(positions):
                sampler = FixedOrder(positions, self.batch_size, *self._replicas())
                batches = SampleBatches(source, self.eval_transform, targets=targets, keys=self.keys)
                loaders[name] = self._loader(batches, sampler)
        return loaders

    def _generated(self) -> dict[str, DataLoader[Any]]:
        if not len(self._requests):
            return {}
        sampler = FixedOrder(torch.arange(len(self._requests)), self.batch_size, *self._replicas())
        return {"generated": DataLoader(self._requests, sampler=sampler, batch_size=None)}

    def _replicas(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)

    def _loader(self, batches: SampleBatches, sampler: TrainingOrder | FixedOrder) -> DataLoader[Any]:
        num_workers = self.num_workers
        if isinstance(batches.source, ImageTensors):
            num_workers = 0  # a batch is one indexing operation where the images lie: a worker could only be slower
            if self.trainer is not None:
                device = self.trainer.strategy.root_device
                batches.source.images = batches.source.images.to(device)
                batches.source.targets = batches.source.targets.to(device)
        return DataLoader(
            batches,
            sampler=sampler,
            batch_size=None,  # the samplers make whole batches
            num_workers=num_workers,
            generator=sampler.generator if isinstance(sampler, TrainingOrder) else None,
        )
