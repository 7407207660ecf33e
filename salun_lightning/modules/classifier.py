"""Image classifiers."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MeanMetric
from typing_extensions import override

from salun_lightning.data import Samples
from salun_lightning.metrics import MembershipInference
from salun_lightning.metrics.membership import Group
from salun_lightning.modules.base import SETS, UnlearningModule, set_name

_GROUPS: dict[str, Group] = {"retain": "member", "test": "nonmember", "forget": "forget"}


class ImageClassifier(UnlearningModule):
    """Trains, unlearns and tests an image classifier.

    ``test`` logs, in percent (Fan et al., ICLR 2024), with the network in eval mode and without augmentation:

    - ``UA``: unlearning accuracy, 100 - accuracy on the forget set
    - ``RA``: accuracy on the retain set
    - ``TA``: accuracy on the test set (without the classes that are forgotten whole)
    - ``MIA``: membership inference, see ``MembershipInference``

    and the accuracy on every set, such as ``test/val/acc``. None of them has a best direction of its own: the target is the
    value of the retrained model.

    Args:
        network: Maps images (B, C, H, W) in [0, 1] to logits (B, classes).
        channels_last: Lay images and weights out with the channels last, which is faster with bf16.
        **kwargs: See ``UnlearningModule``.
    """

    def __init__(self, network: nn.Module, channels_last: bool = False, **kwargs: Any) -> None:
        super().__init__(network, **kwargs)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.network.to(memory_format=self.memory_format)
        self.accuracy = nn.ModuleDict({name: MeanMetric() for name in SETS})
        self.mia = MembershipInference()

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W) in [0, 1]."""
        logits: Tensor = self.network(images.contiguous(memory_format=self.memory_format))
        return logits

    @override
    def task_loss(self, samples: Samples) -> Tensor:
        """Cross-entropy, as a mean over the samples."""
        return functional.cross_entropy(self(samples.inputs), samples.targets)

    @override
    def validation_step(self, samples: Samples, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._count("val", set_name(self, self.trainer.val_dataloaders, dataloader_idx), self(samples.inputs), samples)

    @override
    def on_test_epoch_start(self) -> None:
        self.mia.reset()  # of what a test that was broken off left

    @override
    def test_step(self, samples: Samples, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        prediction = self.predicted(set_name(self, self.trainer.test_dataloaders, dataloader_idx), samples)
        name = prediction["set"]
        self._count("test", name, prediction["probabilities"], samples)
        if name in _GROUPS:
            self.mia.update(prediction["probabilities"], samples.targets, samples.indices, _GROUPS[name])
        return prediction

    def _count(self, stage: str, name: str, outputs: Tensor, samples: Samples) -> None:
        accuracy = self._accuracy(name)
        accuracy.update((outputs.argmax(1) == samples.targets).float())
        self.log(f"{stage}/{name}/acc", accuracy, add_dataloader_idx=False)

    def _accuracy(self, name: str) -> MeanMetric:
        metric = self.accuracy[name]
        assert isinstance(metric, MeanMetric)
        return metric

    @override
    def on_test_epoch_end(self) -> None:
        forget, retain, test = (100 * self._accuracy(name).compute() for name in ("forget", "retain", "test"))
        results = {"UA": 100 - forget, "RA": retain, "TA": test, "MIA": 100 * self.mia.compute()}
        self.log_dict(results, sync_dist=True)

    @override
    def predict_step(self, samples: Samples, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        return self.predicted(set_name(self, self.trainer.predict_dataloaders, dataloader_idx), samples)

    def predicted(self, name: str, samples: Samples) -> dict[str, Any]:
        """Class probabilities of the samples of one set.

        Returns:
            ``set`` (its name), ``index`` (B,), ``target`` (B,) and ``probabilities`` (B, classes).
        """
        probabilities = self(samples.inputs).float().softmax(1)
        return {"set": name, "index": samples.indices, "target": samples.targets, "probabilities": probabilities}
