"""Samples images while a generative model is tested, and measures them."""

import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm  # type: ignore[import-untyped]
from typing_extensions import override

from salun_lightning.callbacks.requests import ImageRequests, Requested
from salun_lightning.data import ForgetClasses
from salun_lightning.data.order import FixedOrder
from salun_lightning.data.targets import retained_classes
from salun_lightning.evidence.measures import judged, right
from salun_lightning.evidence.predictions import Predictions, Recorder
from salun_lightning.metrics import Distribution
from salun_lightning.metrics.distribution import Kind
from salun_lightning.networks.features import Inception, last_linear, logits_and_features
from salun_lightning.networks.frozen import Frozen
from salun_lightning.networks.loading import load_weights, read_checkpoint

_COMPARED: dict[str, Kind] = {"retain": "real", "test": "held_out"}
_EXAMPLES = 8  # of each condition


class GenerationEvaluator(Callback):
    """Samples images at the end of a test, and measures them with a classifier and with features.

    ``test`` logs what ``evidence.measures.recognition`` finds in them, and what ``Distribution`` measures of those of retained
    classes, against the training images of these. A module is asked for the images by ``predict_step`` with a batch of
    :class:`Requested`. ``predict`` of a diffusion model asks for the same images.

    Args:
        per_condition: How many images of each condition are sampled; or a list: how many of those that ask for one thing, how
            many of those that ask for two, and so on, where the datamodule's ``contents`` say what they ask for.
        conditions: Of which, by name or number; by default of all.
        classifier: Maps images (B, C, H, W) in [0, 1] to logits (B, classes); None leaves out what it measures.
        weights: Its checkpoint; None takes it as it is.
        features: Maps images (B, C, H, W) in [0, 1] to features (B, D); ``classifier`` takes what the last linear layer of the
            classifier sees. By default Inception with 2,048 features, as in the FID of torchmetrics, which needs
            ``pip install torch-fidelity`` and downloads weights.
        neighbours: For precision and recall, see ``manifold_precision_recall``; None leaves these out.

    Raises:
        ValueError: A number is not positive, or the features are to be the classifier's, and there is none, or it has no linear
            layer.
    """

    examples: dict[int, dict[int, Tensor]]
    """After a test, the first images of each condition: uint8 (C, H, W), by condition and number. Of this process."""

    predictions: Predictions | None
    """After a test, what the classifier says of every image: the set ``generated``, whose targets are the conditions that were
    asked for, and whose indices are number of the image x number of conditions + condition; or ``generated/<part>`` for each
    part of the images, whose targets are what was asked for there. None without a classifier."""

    def __init__(
        self,
        per_condition: int | list[int] = 100,
        conditions: list[int | str] | int | str | None = None,
        classifier: nn.Module | None = None,
        weights: str | os.PathLike[str] | None = None,
        features: Literal["classifier"] | nn.Module | None = None,
        neighbours: int | None = 3,
    ) -> None:
        super().__init__()
        if not per_condition or min(per_condition if isinstance(per_condition, list) else [per_condition]) < 1:
            raise ValueError(f"per_condition must be positive, got {per_condition}.")
        if features == "classifier" and (classifier is None or last_linear(classifier) is None):
            raise ValueError("features: classifier needs a classifier with a linear layer.")
        self.per_condition = per_condition
        self.conditions = conditions
        self.weights = weights
        self.classifier = None if classifier is None else Frozen(classifier)
        self.features = Frozen(features) if isinstance(features, nn.Module) else None
        self.inception = features is None
        self.distribution = Distribution(neighbours)
        self.examples, self.predictions = {}, None
        self._loaded = False
        self._recorder = Recorder()

    @property
    def description(self) -> str:
        """What the features are."""
        if self.inception:
            return "Inception (2,048 features)"
        if self.features is not None:
            return type(self.features.network).__name__
        assert self.classifier is not None
        return f"{type(self.classifier.network).__name__} before its last layer"

    def requests(self, names: Sequence[str], contents: Tensor | None = None) -> ImageRequests:
        """All images that are asked for.

        Args:
            names: The names of all conditions.
            contents: What each condition asks for in each part of an image, -1 for nothing.

        Raises:
            ValueError: A condition is not among them, or it is not known how many things each asks for.
        """
        asked = list(range(len(names))) if self.conditions is None else ForgetClasses(self.conditions).classes(names)
        if isinstance(self.per_condition, int):
            return ImageRequests(asked, self.per_condition)
        if contents is None:
            raise ValueError("per_condition is a list, and the datamodule has no contents that say what a condition asks for.")
        things = (contents[asked] >= 0).sum(1).clamp(1, len(self.per_condition))
        return ImageRequests(asked, [self.per_condition[number - 1] for number in things.tolist()])

    def loader(self, trainer: Trainer) -> DataLoader[Requested]:
        """The share of this process in what is asked for, in batches as large as those of the data."""
        requests = self.requests(_names(trainer), _contents(trainer))
        size: int = trainer.datamodule.batch_size  # type: ignore[attr-defined]
        sampler = FixedOrder(torch.arange(len(requests)), size, trainer.world_size, trainer.global_rank)
        return DataLoader(requests, sampler=sampler, batch_size=None)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.requests(_names(trainer), _contents(trainer))  # refused before hours of training

    @override
    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what was measured, and load what measures.

        Raises:
            FileNotFoundError: There are no such weights.
            ModuleNotFoundError: Inception is asked for, and torch-fidelity is not installed.
        """
        device = pl_module.device
        if self.classifier is not None and self.weights is not None and not self._loaded:
            load_weights(self.classifier.network, read_checkpoint(self.weights))
        if self.inception and self.features is None:
            self.features = Frozen(Inception())
        self._loaded = True
        for network in (self.classifier, self.features):
            if network is not None:
                network.to(device)
        self._recorder = Recorder()
        self.distribution.reset()
        self.distribution.to(device)
        self.examples, self.predictions = {}, None

    @override
    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        kind = _COMPARED.get(outputs["set"])
        if kind is not None:
            retained = _retained(trainer, batch.targets)
            self._compare(trainer, batch.inputs[retained], batch.targets[retained], kind)

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loader, limit = self.loader(trainer), trainer.limit_test_batches
        number = limit if isinstance(limit, int) else int(limit * len(loader))
        shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        for step, requested in zip(range(number), tqdm(loader, "Sampling", disable=not shown), strict=False):
            asked = trainer.strategy.batch_to_device(requested)
            self._take(trainer, trainer.strategy.predict_step(asked, step))  # which keeps precision and sharding
        results: dict[str, Any] = self.distribution.compute()
        if self.classifier is not None:
            self.predictions = self._recorder.predictions()
            results |= judged(self.predictions, _forgotten(trainer), _names(trainer))
        pl_module.log_dict(results, sync_dist=True)

    def _take(self, trainer: Trainer, generated: dict[str, Any]) -> None:
        images, targets, numbers = (generated[name] for name in ("image", "target", "index"))
        for image, target, index in zip(images, targets.tolist(), numbers.tolist(), strict=True):
            if index < _EXAMPLES:
                self.examples.setdefault(target, {})[index] = image.cpu()
        images = images.float() / 255  # what a file of it would hold
        for part in self._parts(trainer, images, targets):
            logits, features = self._look(part.images)
            if logits is not None and part.name is not None:
                indices = numbers[part.rows] * len(_names(trainer)) + targets[part.rows]
                self._recorder.add({"set": part.name, "logits": logits, "target": part.asked, "index": indices})
            retained = _retained(trainer, targets[part.rows])
            self.distribution.update(features[retained], targets[part.rows][retained], "generated")

    def _compare(self, trainer: Trainer, images: Tensor, targets: Tensor, kind: Kind) -> None:
        for part in self._parts(trainer, images, targets):
            self.distribution.update(self._look(part.images)[1], targets[part.rows], kind)

    def _parts(self, trainer: Trainer, images: Tensor, targets: Tensor) -> Iterator["_Part"]:
        """What is judged: the images, or the parts of them in which their condition asks for something.

        The latter where the datamodule has ``parts``, boxes (left, top, right, bottom) by name, and ``contents`` (conditions,
        parts): the class that is asked for in each, and -1 where nothing is. An image of which no part is judged counts as a
        whole, for its features alone.
        """
        data, contents = trainer.datamodule, _contents(trainer)  # type: ignore[attr-defined]
        if contents is None:
            yield _Part("generated", torch.arange(len(images), device=images.device), images, targets)
            return
        asked = contents.to(targets.device)[targets]
        rows = (asked < 0).all(1).nonzero().flatten()
        if len(rows):
            yield _Part(None, rows, images[rows], asked[rows, 0])
        for number, (name, (x, y, to_x, to_y)) in enumerate(data.parts.items()):
            rows = (asked[:, number] >= 0).nonzero().flatten()
            if len(rows):
                yield _Part(f"generated/{name}", rows, images[rows, :, y:to_y, x:to_x], asked[rows, number])

    def recognised(self, trainer: Trainer, images: Tensor, targets: Tensor) -> Tensor:
        """Where the classifier sees what conditions (B,) ask for in images in [0, 1]; a bool for each part that is judged."""
        assert self.classifier is not None
        parts = [part for part in self._parts(trainer, images, targets) if part.name is not None]
        with torch.autocast(images.device.type, enabled=False):
            return torch.cat([right(self.classifier(part.images.float()), part.asked) for part in parts])

    @torch.no_grad()
    def _look(self, images: Tensor) -> tuple[Tensor | None, Tensor]:
        """Logits and features of images in [0, 1], in float32 whatever the precision of the model that made them."""
        with torch.autocast(images.device.type, enabled=False):
            images = images.float()
            if self.features is None:
                assert self.classifier is not None
                return logits_and_features(self.classifier.network, images)
            logits = None if self.classifier is None else self.classifier(images)
            return logits, self.features(images).flatten(1).float()


class _Part(NamedTuple):
    """One part of some images: its name, which of them, what it shows, and the class that is asked for."""

    name: str | None
    rows: Tensor
    images: Tensor
    asked: Tensor


def _names(trainer: Trainer) -> list[str]:
    names: list[str] = trainer.datamodule.class_names  # type: ignore[attr-defined]
    return names


def _contents(trainer: Trainer) -> Tensor | None:
    contents: Tensor | None = getattr(trainer.datamodule, "contents", None)  # type: ignore[attr-defined]
    return contents


def _forgotten(trainer: Trainer) -> list[int]:
    numbers: list[int] = getattr(trainer.datamodule, "forgotten_classes", [])  # type: ignore[attr-defined]
    return numbers


def _retained(trainer: Trainer, targets: Tensor) -> Tensor:
    """Which are retained, and have images that they can be compared with."""
    retained = retained_classes(trainer.datamodule, len(_names(trainer)))  # type: ignore[attr-defined]
    return torch.isin(targets, torch.tensor(retained, dtype=torch.int64, device=targets.device))
