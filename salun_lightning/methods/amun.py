"""AMUN: train on images close to what is to be forgotten that the original model takes for another class."""

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from salun_lightning.data import Order, Samples, joined
from salun_lightning.methods.adversarial import Predict, pgd
from salun_lightning.methods.base import Kind, Method, on_device

if TYPE_CHECKING:
    from salun_lightning.modules.base import UnlearningModule
    from salun_lightning.modules.classifier import ImageClassifier


class AMUN(Method):
    r"""Adversarial machine unlearning (Ebrahimpour-Boroojeny et al., ICML 2025).

    It minimises :math:`E_{D_r \cup D_f \cup D_A} \ell`. :math:`D_A` holds an adversarial image of each forget sample: one close
    to it that the original model takes for another class, with that class as its label. The samples of :math:`D_f` keep their
    true labels. Adversarial images are looked for by projected gradient ascent in an L2 ball, whose radius is doubled until the
    answer is wrong. That is done once, in eval mode and without augmentation, and again when a run is resumed, with the same
    result. Several processes share the work. A sample and its adversarial image come in the same batch, where the paper
    shuffles all three sets together.

    Args:
        radius: Radius of the first ball, in the L2 distance of images from 0 to 1.
        doublings: How often the radius is doubled at most; not tuned. A sample that keeps its class comes without an
            adversarial image; training starts with a line that counts these.
        steps: Steps of ascent in each ball.

    Raises:
        ValueError: ``radius`` is not positive and finite, ``doublings`` is negative or ``steps`` not positive.
    """

    order: Order = "mixed"
    needs_original = True
    kind: Kind = "classifier"

    def __init__(self, radius: float = 0.25, doublings: int = 6, steps: int = 50) -> None:
        if not (0 < radius < math.inf and doublings >= 0 and steps > 0):
            raise ValueError(
                "radius and steps must be positive and finite, and doublings not negative; got radius"
                f" {radius}, steps {steps} and doublings {doublings}. Give such as 0.25, 50 and 6."
            )
        self.radius = radius
        self.doublings = doublings
        self.steps = steps
        self._found: Samples  # of the whole forget set in order; where no image was found, the class is the true one

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module, strategy = cast("ImageClassifier", pl_module), trainer.strategy
        predict, own = partial(module.logits_by, module.reference), slice(trainer.global_rank, None, trainer.world_size)
        parts, kept = [], 0
        for samples in on_device(module, module.datamodule.set_dataloader("forget")):
            images, classes = torch.zeros_like(samples.inputs), torch.zeros_like(samples.targets)
            images[own], classes[own] = self.adversarial(predict, samples.inputs[own], samples.targets[own])
            images, classes = (strategy.reduce(each, reduce_op="sum") for each in (images, classes))
            kept += int((classes == samples.targets).sum())
            parts.append(Samples(*(field.cpu() for field in (images, classes, samples.indices))))
        self._found = joined(parts)
        rank_zero_info(
            f"AMUN: {len(self._found.targets) - kept} of {len(self._found.targets)} samples to be forgotten have an adversarial"
            f" image; the other {kept} kept their class up to the radius {self.radius * 2**self.doublings:g}"
        )

    def adversarial(self, predict: Predict, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Adversarial images, and the classes that they are taken for: the true class where none was found.

        Args:
            predict: The original network, in eval mode.
            images: The images to start from.
            targets: Their true classes.
        """
        moved, answers = images.clone(), targets.clone()
        left, radius = torch.arange(len(targets), device=targets.device), self.radius
        for _ in range(self.doublings + 1):
            if not len(left):
                break
            tried = pgd(predict, images[left], targets[left], torch.full_like(images[left, 0, 0, 0], radius), self.steps)
            with torch.no_grad():
                found = predict(tried).argmax(1)
            wrong = found != targets[left]
            moved[left[wrong]], answers[left[wrong]] = tried[wrong], found[wrong]
            left, radius = left[~wrong], 2 * radius
        return moved, answers

    @override
    def loss(self, module: "UnlearningModule", batch: Mapping[str, Samples]) -> Tensor:
        parts = [*batch.values()]
        if "forget" in batch:
            parts.append(self._beside(batch["forget"]))
        samples = joined(parts)
        count = torch.tensor(len(samples.targets), dtype=torch.float32, device=samples.targets.device)
        # processes have different numbers of adversarial images, and the gradient is the mean over the processes
        return module.losses(samples).sum() / module.trainer.strategy.reduce(count, reduce_op="mean")

    def _beside(self, forget: Samples) -> Samples:
        """The adversarial images of samples that have one."""
        rows = torch.searchsorted(self._found.indices, forget.indices.cpu())
        images, classes = (field[rows].to(forget.targets.device) for field in self._found[:2])
        found = classes != forget.targets
        return Samples(images[found].to(forget.inputs.dtype), classes[found], forget.indices[found])

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        del self._found
