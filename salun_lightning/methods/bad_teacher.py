"""Bad Teacher: learn what is to be forgotten from a network that knows nothing, and the rest from the original model."""

import math
from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from typing_extensions import override

from salun_lightning.data import Order, Samples, epoch_seed, joined, run_seed
from salun_lightning.methods.answers import divergence
from salun_lightning.methods.base import Kind, Method

if TYPE_CHECKING:
    from salun_lightning.modules.base import UnlearningModule
    from salun_lightning.modules.classifier import ImageClassifier


class BadTeacher(Method):
    r"""Bad Teacher, with a competent and an incompetent teacher (Chundawat et al., AAAI 2023).

    .. math::
        \min_\theta E_{(x, l)} \; l \, KL_T(\theta_d \| \theta) + (1 - l) \, KL_T(\theta_o \| \theta)

    :math:`l` is 1 for samples of the forget set and else 0, :math:`\theta_o` the original model, and :math:`\theta_d` a network
    with fresh weights, both in eval mode. Both sets are one shuffled stream, and each sample counts alike. (The released code
    also divides the divergence by the number of classes, so its rates for plain SGD mean something else.)

    Fresh weights are those of ``reset_parameters``. Where no module of the network resets a weight, such as the class token of
    a vision transformer, it is drawn from the normal distribution with its own mean and deviation.

    Args:
        temperature: :math:`T`, by which logits are divided.
        seed: Seed of the fresh weights; by default that of the run.

    Raises:
        ValueError: ``temperature`` is not positive or not finite.
    """

    order: Order = "mixed"
    needs_original = True
    kind: Kind = "classifier"

    def __init__(self, temperature: float = 1.0, seed: int | None = None) -> None:
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {temperature}. Give one such as 1.")
        self.temperature = temperature
        self.seed = seed
        self._incompetent: nn.Module | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reference = cast("UnlearningModule", pl_module).reference
        # other numbers than the original began with, which may come of the same seed
        seed = epoch_seed(run_seed(), -1, 0) if self.seed is None else self.seed
        fresh = with_fresh_weights(reference, seed)
        self._incompetent = fresh.to(pl_module.device)

    @override
    def loss(self, module: "UnlearningModule", batch: Mapping[str, Samples]) -> Tensor:
        model = cast("ImageClassifier", module)
        assert self._incompetent is not None
        teachers = {"forget": self._incompetent, "retain": model.reference}
        with torch.no_grad():
            taught = torch.cat([model.logits_by(teachers[name], samples.inputs) for name, samples in batch.items()])
        return divergence(model.logits(joined(list(batch.values())).inputs), taught, self.temperature).mean()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._incompetent = None


def with_fresh_weights(network: nn.Module, seed: int) -> nn.Module:
    """A copy of a network, on the CPU, with weights of its own: the same on every device and in every process.

    Args:
        network: The network, which is left as it is.
        seed: Seed of the weights; the random numbers of the run are not touched.
    """
    fresh = deepcopy(network).cpu()
    before = {name: weight.detach().clone() for name, weight in fresh.named_parameters()}
    with isolate_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for child in fresh.modules():
            reset = getattr(child, "reset_parameters", None)
            if callable(reset):
                reset()
        for name, weight in fresh.named_parameters():
            if torch.equal(weight, before[name]):
                weight.copy_(torch.randn_like(weight) * weight.std(correction=0) + weight.mean())
    return fresh
