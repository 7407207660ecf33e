"""Membership inference: does the model still know what it was to forget?"""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

Group = Literal["member", "nonmember", "forget"]
_GROUPS: tuple[Group, ...] = ("member", "nonmember", "forget")


class MembershipInference(Metric):
    r"""MIA-efficacy: the fraction of the forget set that an attacker takes for data the model never saw.

    The attack of SalUn (Fan et al., ICLR 2024) and of Jia et al. (NeurIPS 2023): a support vector machine (RBF kernel,
    C = 3, gamma = 1 / number of features) learns from one feature, the probability of the true class, to tell members (retained
    training images) from non-members (test images), both by the unlearned model; it is then asked about the forget set. The
    target is the retrained model's value, not 1.

    There are at most as many members as non-members. The released code takes the first ones, which in a data set sorted by
    class are of a few classes only; here they are taken evenly over the retain set.

    Example:
        >>> mia = MembershipInference()
        >>> for group, confidence in (("member", 0.99), ("nonmember", 0.6), ("forget", 0.61)):
        ...     probabilities = torch.full((50, 2), confidence)
        ...     mia.update(probabilities, torch.zeros(50, dtype=torch.int64), torch.arange(50), group)
        >>> mia.compute()
        tensor(1.)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for group in _GROUPS:
            self.add_state(f"{group}_confidence", default=[], dist_reduce_fx="cat")
            self.add_state(f"{group}_index", default=[], dist_reduce_fx="cat")

    @override
    def update(self, probabilities: Tensor, targets: Tensor, indices: Tensor, group: Group) -> None:
        """Take a batch of one group.

        Args:
            probabilities: Class probabilities, (B, C).
            targets: True classes, (B,).
            indices: Positions of the samples in their set, (B,): they order the members, however they were shared out.
            group: ``member`` (retain set), ``nonmember`` (test set) or ``forget``.
        """
        confidence = probabilities.gather(1, targets.unsqueeze(1)).squeeze(1)
        getattr(self, f"{group}_confidence").append(confidence.float())
        getattr(self, f"{group}_index").append(indices)

    @override
    def compute(self) -> Tensor:
        """The fraction of the forget set that is taken for non-members, between 0 and 1; NaN if a probability is NaN.

        Raises:
            ValueError: A group is empty.
        """
        from sklearn.svm import SVC  # takes a second to import

        member, nonmember, forget = (self._confidences(group) for group in _GROUPS)
        count = min(len(member), len(nonmember))
        member = member[np.linspace(0, len(member) - 1, count).round().astype(np.int64)]
        features = np.concatenate([member, nonmember])[:, None]
        if np.isnan(features).any() or np.isnan(forget).any():  # of a model that diverged
            return torch.tensor(float("nan"), device=self.device)
        attacker = SVC(C=3, kernel="rbf", gamma="auto")
        attacker.fit(features, np.repeat([1, 0], [len(member), len(nonmember)]))
        return torch.tensor((attacker.predict(forget[:, None]) == 0).mean(), dtype=torch.float32, device=self.device)

    def _confidences(self, group: Group) -> Any:
        confidences = getattr(self, f"{group}_confidence")
        if isinstance(confidences, list) and not confidences:
            raise ValueError(f"Membership inference needs samples of the group '{group}'.")
        order = dim_zero_cat(getattr(self, f"{group}_index")).argsort()
        return dim_zero_cat(confidences)[order].cpu().numpy()
