"""How far generated images are from real ones."""

import warnings
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

_KID_SUBSET = 1000

Kind = Literal["real", "held_out", "generated"]


class Distribution(Metric):
    """Compares generated images with real ones, by features of both. Only images of retained conditions belong in it.

    :meth:`compute` returns

    - ``FID``, ``KID``, ``precision``, ``recall``: of generated images against real ones of the same conditions (Heusel et al.,
      NeurIPS 2017; Binkowski et al., ICLR 2018; Kynkäänniemi et al., NeurIPS 2019), the last two with ``neighbours``
    - ``num_real``, ``num_generated``: how many images those compare. They depend on these numbers and on the features: only
      figures that agree in both can be compared.
    - ``FID_real``: where ``FID`` stops telling models apart, the FID of real images that no model was trained on, of the same
      conditions against the same images; ``num_test``: how many these are

    Args:
        neighbours: For precision and recall, see ``manifold_precision_recall``; None leaves these out, whose time grows with
            the square of the number of images.

    Raises:
        ValueError: ``neighbours`` is not positive.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    real: list[Tensor] | Tensor
    held_out: list[Tensor] | Tensor
    generated: list[Tensor] | Tensor

    def __init__(self, neighbours: int | None = 3) -> None:
        super().__init__()
        if neighbours is not None and neighbours < 1:
            raise ValueError(f"neighbours must be positive, got {neighbours}.")
        self.neighbours = neighbours
        for kind in ("real", "held_out", "generated"):
            self.add_state(kind, default=[], dist_reduce_fx="cat")
            self.add_state(f"{kind}_targets", default=[], dist_reduce_fx="cat")

    @override
    def update(self, features: Tensor, targets: Tensor, kind: Kind) -> None:
        """Take the features of a batch of images.

        Args:
            features: (B, D).
            targets: The conditions of the images, int64 of shape (B,).
            kind: ``real`` for images that were trained on, ``held_out`` for those of the test set, or ``generated``.
        """
        getattr(self, kind).append(features)
        getattr(self, f"{kind}_targets").append(targets)

    @override
    def compute(self) -> dict[str, Tensor]:
        """All that was measured; nothing, unless there were both real and generated images."""
        if not len(self.real) or not len(self.generated):
            return {}
        generated, asked_for = self._all("generated"), self._all("generated_targets").unique()
        real = self._all("real")[torch.isin(self._all("real_targets"), asked_for)]
        results = self._compared(real, generated)
        if len(self.held_out):
            results |= _held_out(real, self._all("held_out")[torch.isin(self._all("held_out_targets"), asked_for)])
        return {name: value.float().to(self.device) for name, value in results.items()}

    def _all(self, state: str) -> Tensor:
        return dim_zero_cat(getattr(self, state))

    def _compared(self, real: Tensor, generated: Tensor) -> dict[str, Tensor]:
        fewest = min(len(real), len(generated))
        results = {"num_real": torch.tensor(len(real)), "num_generated": torch.tensor(len(generated))}
        if fewest <= (self.neighbours or 1):  # a covariance needs two
            return results
        measured = ("FID", "KID", *(("precision", "recall") if self.neighbours is not None else ()))
        if not (real.isfinite().all() and generated.isfinite().all()):  # LAPACK would end the process
            return results | dict.fromkeys(measured, torch.tensor(torch.nan))
        with warnings.catch_warnings(), isolate_rng():
            warnings.filterwarnings("ignore", message=".*will save all extracted features")
            torch.manual_seed(0)  # of the subsets of KID
            kid = KernelInceptionDistance(_Given(real.shape[1]), subset_size=min(_KID_SUBSET, fewest), sync_on_compute=False)
            results |= {"FID": _fid(real, generated), "KID": _distance(kid, real, generated)[0]}
        if self.neighbours is not None:
            results["precision"], results["recall"] = manifold_precision_recall(real, generated, self.neighbours)
        return results


def _held_out(real: Tensor, test: Tensor) -> dict[str, Tensor]:
    results = {"num_test": torch.tensor(len(test))}
    if min(len(real), len(test)) > 1:
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
