"""Boundary shrink: train what is to be forgotten on the class on the other side of the nearest decision boundary."""

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, cast

from torch import Tensor
from typing_extensions import override

from salun_lightning.data import Order, Samples
from salun_lightning.methods.adversarial import fgsm
from salun_lightning.methods.base import Kind, Method, part

if TYPE_CHECKING:
    from salun_lightning.modules.base import UnlearningModule
    from salun_lightning.modules.classifier import ImageClassifier


class BoundaryShrink(Method):
    r"""BS: :math:`\min_\theta E_{D_f} \ell(x, y')`, where y' is the nearest class but the true one (Chen et al., CVPR 2023).

    .. math::
        y' = \arg\max_{c \neq y} f_{\theta_o}(x')_c, \quad x' = x + \epsilon \, \text{sign} \nabla_x \ell(x, y; \theta_o)

    :math:`x'` is kept in [0, 1]. The released code lets y' be the true class where this step does not change the answer, which
    trains such a sample on its true class once more, and rounds :math:`x'` to 256 levels.

    Args:
        step: :math:`\epsilon`, how far each pixel is moved, in images from 0 to 1.
        allow_true: Take the answer to :math:`x'` as it comes, even if it is the true class.

    Raises:
        ValueError: ``step`` is negative or not finite.
    """

    order: Order = "forget"
    needs_original = True
    kind: Kind = "classifier"

    def __init__(self, step: float = 0.1, allow_true: bool = False) -> None:
        if not 0 <= step < math.inf:
            raise ValueError(f"step must be a finite number that is not negative, got {step}. Give one such as 0.1.")
        self.step = step
        self.allow_true = allow_true

    @override
    def loss(self, module: "UnlearningModule", batch: Mapping[str, Samples]) -> Tensor:
        forget = part(batch, "forget", self)
        return module.task_loss(forget._replace(targets=self.nearest(cast("ImageClassifier", module), forget)))

    def nearest(self, module: "ImageClassifier", samples: Samples) -> Tensor:
        """The class on the other side of the nearest boundary, (B,).

        Args:
            module: The classifier, with its original network.
            samples: Samples with their true classes.
        """
        moved = fgsm(partial(module.logits_by, module.reference), samples.inputs, samples.targets, self.step)
        logits = module.logits(moved, original=True)
        if not self.allow_true:
            logits = logits.scatter(1, samples.targets[:, None], -math.inf)
        return logits.argmax(1)
