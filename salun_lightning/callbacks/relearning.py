"""How fast a generative model learns again what it was to forget."""

from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from salun_lightning.data import Samples
from salun_lightning.data.order import run_seed


class Relearning(Callback):
    """After a test, trains a copy of a diffusion model on a few forgotten images, until the judge sees the concept again.

    It logs ``relearning``: after how many steps of Adam the classifier of the module's ``evaluation`` recognises the share
    ``until`` of the images that the forgotten conditions ask for; ``limit`` if it never does. Compare it with the retrained
    model, which never saw the concept: a model that needs fewer steps has kept some of it. Conditions for several things at a
    time are left out. The copy has weights of 32 bits; the model that is tested stays as it is. For one device.

    Args:
        images: How many images it is trained on, taken evenly over the forget set.
        lr: The learning rate.
        batch_size: How many of them a step takes, drawn with replacement.
        every: How many steps lie between two looks.
        limit: After how many steps it is given up.
        until: Which share must be recognised.
        judged: How many images are looked at each time.

    Raises:
        ValueError: A number is not positive, nothing can be judged, no class is forgotten whole, or there are several devices.
    """

    def __init__(
        self,
        images: int = 10,
        lr: float = 2e-4,
        batch_size: int = 32,
        every: int = 2,
        limit: int = 40,
        until: float = 0.8,
        judged: int = 40,
    ) -> None:
        numbers = {"images": images, "lr": lr, "batch_size": batch_size, "every": every, "limit": limit, "until": until}
        for name, number in {**numbers, "judged": judged}.items():
            if not number > 0:
                raise ValueError(f"{name} must be positive, got {number}.")
        self.images = images
        self.lr = lr
        self.batch_size = batch_size
        self.every = every
        self.limit = limit
        self.until = until
        self.judged = judged

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        evaluation = getattr(pl_module, "evaluation", None)
        if stage == "test" and (evaluation is None or evaluation.classifier is None):
            raise ValueError("Relearning needs a module with an evaluation that has a classifier, to see the concept again.")
        if stage == "test" and trainer.world_size > 1:
            raise ValueError("Relearning trains a copy of the model on one device. Test with trainer.devices 1.")

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        mixed = isinstance(trainer.precision_plugin, MixedPrecision)
        context = trainer.precision_plugin.forward_context() if mixed else nullcontext()
        with torch.inference_mode(False), torch.enable_grad(), isolate_rng(), context:
            torch.manual_seed(run_seed())
            pl_module.log("relearning", float(self._steps(trainer, pl_module, self._samples(pl_module))))

    def _samples(self, module: Any) -> Samples:
        """Images of forgotten conditions that ask for one thing."""
        data = module.datamodule
        batches = data.set_dataloader("forget").dataset
        targets = batches.targets[data.forget_indices]
        alone = torch.isin(targets, torch.tensor(data.forgotten_classes, dtype=torch.int64))
        if getattr(data, "contents", None) is not None:
            alone &= (data.contents[targets] >= 0).sum(1) == 1
        rows = data.forget_indices[alone]
        if not len(rows):
            raise ValueError("Relearning trains on images of a forgotten class, or of one thing alone: there are none.")
        chosen = batches.samples(rows[torch.linspace(0, len(rows) - 1, min(self.images, len(rows))).round().long()])
        return Samples(*(field.to(module.device) for field in chosen))

    def _steps(self, trainer: Trainer, module: Any, samples: Samples) -> int:
        """After how many steps enough is recognised."""
        tested = module.network
        module.network = deepcopy(tested).float().requires_grad_(True)
        try:
            optimizer = torch.optim.Adam(module.network.parameters(), lr=self.lr)
            for step in range(self.limit):
                if step % self.every == 0 and self._recognised(trainer, module, samples) >= self.until:
                    return step
                rows = torch.randint(len(samples.targets), (self.batch_size,)).to(module.device)
                optimizer.zero_grad()
                module.task_loss(Samples(*(field[rows] for field in samples))).backward()
                optimizer.step()
        finally:
            module.network = tested
        return self.limit

    @torch.no_grad()
    def _recognised(self, trainer: Trainer, module: Any, samples: Samples) -> float:
        """Which share of images of these conditions show what was asked for."""
        conditions = samples.targets.unique()
        targets = conditions.repeat(-(-self.judged // len(conditions)))[: self.judged]
        numbers = torch.arange(self.judged, device=targets.device) // len(conditions)
        size = module.datamodule.batch_size
        found = [
            module.evaluation.recognised(trainer, module.sample(asked, number), asked)
            for asked, number in zip(targets.split(size), numbers.split(size), strict=True)
        ]
        return torch.cat(found).float().mean().item()
