"""How good generated images are, and whether the forgotten class is still among them."""

import os
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance  # torchmetrics.image names it only beside torch-fidelity
from torchmetrics.image.kid import KernelInceptionDistance
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

from salun_lightning.metrics.manifold import manifold_precision_recall
from salun_lightning.networks.loading import load_weights, read_checkpoint

_KID_SUBSET = 1000
_STATES = ("real", "real_target", "held_out", "held_out_target", "generated", "retained", "target", "correct", "entropy")


class GenerationQuality(Metric):
    """Measures generated images with a classifier that knows all classes, and with features of another network.

    :meth:`compute` returns

    - ``UA``: unlearning accuracy, 100 minus the accuracy of the classifier on images of the forgotten classes, in percent
      (Heng and Soh, NeurIPS 2023; Fan et al., ICLR 2024)
    - ``entropy``: the mean entropy of the classifier on those images, in nats: high for noise, low for images of another class
    - ``acc``: the accuracy on images of the retained classes, in percent, and ``acc/<class>`` for every class
    - ``FID``, ``KID``, ``precision``, ``recall``: of generated images of the retained classes against real ones of those
      classes (Heusel et al., NeurIPS 2017; Binkowski et al., ICLR 2018; Kynkäänniemi et al., NeurIPS 2019)
    - ``num_real``, ``num_generated``: how many images those compare, of the retained classes that images were asked of. They
      depend on these numbers and on the features: only figures that agree in both can be compared.
    - ``FID_real``: where ``FID`` stops telling models apart, the FID of real images that no model was trained on, of the same
      classes against the same images; ``num_test``: how many these are

    Args:
        classifier: Maps images (B, C, H, W) in [0, 1] to logits (B, classes); None leaves out what it measures.
        weights: Its checkpoint; None takes it as it is.
        features: Maps images (B, C, H, W) in [0, 1] to features (B, D); ``classifier`` takes what the last linear layer of the
            classifier sees. By default Inception with 2,048 features, as in the FID of torchmetrics, which needs
            ``pip install torch-fidelity`` and downloads weights.
        neighbours: For precision and recall, see ``manifold_precision_recall``.

    Raises:
        ValueError: The features are to be the classifier's, and there is none, or it has no linear layer; or ``neighbours`` is
            not positive.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    def __init__(
        self,
        classifier: nn.Module | None = None,
        weights: str | os.PathLike[str] | None = None,
        features: Literal["classifier"] | nn.Module | None = None,
        neighbours: int = 3,
    ) -> None:
        super().__init__()
        if features == "classifier" and (classifier is None or _last_linear(classifier) is None):
            raise ValueError("features: classifier needs a classifier with a linear layer.")
        if neighbours < 1:
            raise ValueError(f"neighbours must be positive, got {neighbours}.")
        self.weights = weights
        self.neighbours = neighbours
        self.class_names: list[str] = []
        # in lists, so that they are neither trained nor saved with the module that this is a part of
        self._classifier = [] if classifier is None else [classifier]
        self._extractor = [features] if isinstance(features, nn.Module) else []
        self._inception = features is None
        self._loaded = False
        for name in _STATES:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def start(self, class_names: Sequence[str]) -> None:
        """Forget what was measured, and load what measures.

        Args:
            class_names: The names under which accuracies are reported.

        Raises:
            FileNotFoundError: There are no such weights.
            ModuleNotFoundError: Inception is asked for, and torch-fidelity is not installed.
        """
        self.reset()
        self.class_names = list(class_names)
        if not self._loaded and self.weights is not None and self._classifier:
            load_weights(self._classifier[0], read_checkpoint(self.weights))
        if self._inception and not self._extractor:
            self._extractor = [_Inception()]
        self._loaded = True
        for network in (*self._classifier, *self._extractor):
            network.eval().requires_grad_(False).to(self.device)

    @property
    def description(self) -> str:
        """What the features are."""
        if self._inception:
            return "Inception (2,048 features)"
        if self._extractor:
            return type(self._extractor[0]).__name__
        return f"{type(self._classifier[0]).__name__} before its last layer"

    @override
    def update(self, images: Tensor, targets: Tensor, retained: Tensor, real: bool, held_out: bool = False) -> None:
        """Take a batch of images, after :meth:`start`.

        Args:
            images: (B, C, H, W) in [0, 1].
            targets: Their classes, or for generated images the classes they were asked for, int64 of shape (B,).
            retained: Which of those are retained, bool of shape (B,).
            real: Whether the images are real ones.
            held_out: Whether these are of the test set: compared, too, instead of compared with.
        """
        logits, features = self._look(images[retained] if real else images)
        if real:
            name = "held_out" if held_out else "real"
            getattr(self, name).append(features)
            getattr(self, f"{name}_target").append(targets[retained])
            return
        values = {"generated": features[retained], "retained": retained, "target": targets}
        if logits is not None:
            correct = (logits.argmax(1) == targets) & ~logits.isnan().any(1)
            values |= {"correct": correct, "entropy": torch.special.entr(logits.double().softmax(1)).sum(1)}
        for name, value in values.items():
            getattr(self, name).append(value)

    @torch.no_grad()
    def _look(self, images: Tensor) -> tuple[Tensor | None, Tensor]:
        """Logits and features of images in [0, 1], in float32 whatever the precision of the model that made them."""
        with torch.autocast(images.device.type, enabled=False):
            return self._look_at(images.float())

    def _look_at(self, images: Tensor) -> tuple[Tensor | None, Tensor]:
        classifier = self._classifier[0] if self._classifier else None
        if self._extractor:
            features = self._extractor[0](images).flatten(1).float()
            return None if classifier is None else classifier(images), features
        assert classifier is not None
        last = _last_linear(classifier)
        assert last is not None
        seen: list[Tensor] = []
        handle = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            return classifier(images), seen[0].flatten(1).float()
        finally:
            handle.remove()

    @override
    def compute(self) -> dict[str, Tensor]:
        """All that was measured."""
        values = {name: dim_zero_cat(getattr(self, name)) for name in _STATES if len(getattr(self, name))}
        results: dict[str, Tensor] = {}
        if "correct" in values:
            results |= self._recognised(values["correct"].double(), values["target"], values["retained"], values["entropy"])
        if "real" in values and "generated" in values:
            asked_for = values["target"][values["retained"]].unique()
            real = values["real"][torch.isin(values["real_target"], asked_for)]
            results |= self._compared(real, values["generated"])
            if "held_out" in values:
                results |= _held_out(real, values["held_out"][torch.isin(values["held_out_target"], asked_for)])
        return {name: value.float().to(self.device) for name, value in results.items()}

    def _recognised(self, correct: Tensor, targets: Tensor, retained: Tensor, entropy: Tensor) -> dict[str, Tensor]:
        results = {}
        if not retained.all():
            results["UA"] = 100 - 100 * correct[~retained].mean()
            results["entropy"] = entropy[~retained].mean()
        if retained.any():
            results["acc"] = 100 * correct[retained].mean()
        for number in targets.unique().tolist():
            name = self.class_names[number] if self.class_names else str(number)
            results[f"acc/{name}"] = 100 * correct[targets == number].mean()
        return results

    def _compared(self, real: Tensor, generated: Tensor) -> dict[str, Tensor]:
        fewest = min(len(real), len(generated))
        results = {"num_real": torch.tensor(len(real)), "num_generated": torch.tensor(len(generated))}
        if fewest <= self.neighbours:
            return results
        if not (real.isfinite().all() and generated.isfinite().all()):  # LAPACK would end the process
            return results | dict.fromkeys(("FID", "KID", "precision", "recall"), torch.tensor(torch.nan))
        with warnings.catch_warnings(), isolate_rng():
            warnings.filterwarnings("ignore", message=".*will save all extracted features")
            torch.manual_seed(0)  # of the subsets of KID
            kid = KernelInceptionDistance(_Given(real.shape[1]), subset_size=min(_KID_SUBSET, fewest), sync_on_compute=False)
            results |= {"FID": _fid(real, generated), "KID": _distance(kid, real, generated)[0]}
        results["precision"], results["recall"] = manifold_precision_recall(real, generated, self.neighbours)
        return results


def _held_out(real: Tensor, test: Tensor) -> dict[str, Tensor]:
    results = {"num_test": torch.tensor(len(test))}
    if min(len(real), len(test)) > 1:  # a covariance needs two
        finite = bool(real.isfinite().all() and test.isfinite().all())
        results["FID_real"] = _fid(real, test) if finite else torch.tensor(torch.nan)
    return results


def _fid(real: Tensor, others: Tensor) -> Tensor:
    distance: Tensor = _distance(FrechetInceptionDistance(_Given(real.shape[1]), sync_on_compute=False), real, others)
    return distance


def _distance(metric: Metric, real: Tensor, others: Tensor) -> Any:
    """Of features that are those of all processes already, so the metric must not gather them."""
    metric = metric.to(real.device)
    metric.update(real, real=True)
    metric.update(others, real=False)
    return metric.compute()


class _Given(nn.Module):
    """Stands in for a feature extractor where features are at hand."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    @override
    def forward(self, features: Tensor) -> Tensor:
        return features


class _Inception(nn.Module):
    """Inception as the FID of torchmetrics takes it: from uint8 images with three channels."""

    def __init__(self) -> None:
        super().__init__()
        self.network = FrechetInceptionDistance(2048).inception

    @override
    def forward(self, images: Tensor) -> Tensor:
        coloured = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        features: Tensor = self.network((255 * coloured).round().to(torch.uint8))
        return features


def _last_linear(network: nn.Module) -> nn.Linear | None:
    layers = [child for child in network.modules() if isinstance(child, nn.Linear)]
    return layers[-1] if layers else None
