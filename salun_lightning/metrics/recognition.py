"""Whether a classifier recognises in generated images what they were asked for."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

_STATES = ("logits", "targets", "retained", "indices")


class Recognition(Metric):
    """Measures generated images by the answers of a classifier that knows all conditions.

    :meth:`compute` returns

    - ``UA``: unlearning accuracy, 100 minus the accuracy of the classifier on images of the forgotten conditions, in percent
      (Heng and Soh, NeurIPS 2023; Fan et al., ICLR 2024)
    - ``entropy``: the mean entropy of the classifier on those images, in nats: high for noise, low for images of another class
    - ``acc``: the accuracy on images of the retained conditions, in percent, and ``acc/<name>`` for every condition

    Args:
        names: The names of the conditions, under which accuracies are reported; their numbers by default.

    Example:
        >>> metric = Recognition(["cat", "dog"])
        >>> metric.update(torch.eye(2), torch.tensor([0, 0]), torch.tensor([True, True]), torch.arange(2))
        >>> metric.compute()
        {'acc': tensor(50.), 'acc/cat': tensor(50.)}
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    def __init__(self, names: Sequence[str] = ()) -> None:
        super().__init__()
        self.names = list(names)
        for name in _STATES:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    @override
    def update(self, logits: Tensor, targets: Tensor, retained: Tensor, indices: Tensor) -> None:
        """Take the answers to a batch of images.

        Args:
            logits: Of the classifier, (B, classes).
            targets: The conditions that the images were asked for, int64 of shape (B,).
            retained: Which of those are retained, bool of shape (B,).
            indices: The numbers of the images, int64 of shape (B,).
        """
        for name, value in zip(_STATES, (logits.float(), targets, retained, indices), strict=True):
            getattr(self, name).append(value)

    @override
    def compute(self) -> dict[str, Tensor]:
        """All that was measured."""
        logits, targets, retained, _ = (dim_zero_cat(getattr(self, name)) for name in _STATES)
        correct = ((logits.argmax(1) == targets) & ~logits.isnan().any(1)).double()
        results = {}
        if not retained.all():
            entropy = torch.special.entr(logits.double().softmax(1)).sum(1)
            results["UA"] = 100 - 100 * correct[~retained].mean()
            results["entropy"] = entropy[~retained].mean()
        if retained.any():
            results["acc"] = 100 * correct[retained].mean()
        for number in targets.unique().tolist():
            name = self.names[number] if self.names else str(number)
            results[f"acc/{name}"] = 100 * correct[targets == number].mean()
        return {name: value.float() for name, value in results.items()}

    def predictions(self) -> dict[str, Tensor]:
        """The answers to the images of all processes, on the CPU and in the order of the numbers of the images.

        Returns:
            ``logits`` (N, classes), ``targets`` (N,) and ``indices`` (N,).
        """
        with self.sync_context():
            found = {name: dim_zero_cat(getattr(self, name)).cpu() for name in ("logits", "targets", "indices")}
        order = found["indices"].argsort()
        return {name: value[order] for name, value in found.items()}
