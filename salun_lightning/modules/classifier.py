"""Image classifiers."""

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MeanMetric
from typing_extensions import override

from salun_lightning.data import ForgetRetainDataModule, Samples
from salun_lightning.evidence.measures import figures, right
from salun_lightning.evidence.predictions import Predictions, Recorder
from salun_lightning.modules.base import SETS, UnlearningModule, set_name
from salun_lightning.networks.head import logits_of


class ImageClassifier(UnlearningModule):
    """Trains, unlearns and tests an image classifier.

    ``test`` logs, in percent (Fan et al., ICLR 2024), with the network in eval mode and without augmentation:

    - ``UA``: unlearning accuracy, 100 - accuracy on the forget set
    - ``RA``: accuracy on the retain set
    - ``TA``: accuracy on the test set (without the classes that are forgotten whole)
    - ``MIA``: membership inference, see ``evidence.measures.membership_inference``

    and the accuracy on every set, such as ``test/val/acc``, all computed from ``predictions``. None of them has a best
    direction of its own: the target is the value of the retrained model. What needs a set that is not there is left out. A
    sample whose logits are NaN counts as wrong.

    Args:
        network: Maps images (B, C, H, W) in [0, 1] to logits (B, classes), or to something that holds them, see ``logits_of``.
        channels_last: Lay images and weights out with the channels last, which is faster with bf16.
        **kwargs: See ``UnlearningModule``.
    """

    kind = "classifier"

    def __init__(self, network: nn.Module, *, channels_last: bool = False, **kwargs: Any) -> None:
        super().__init__(network, **kwargs)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.network.to(memory_format=self.memory_format)
        self.accuracy = nn.ModuleDict({name: MeanMetric() for name in SETS})
        self.predictions: Predictions | None = None
        """What the model said of every sample, after ``test`` and ``predict``."""
        self._recorder = Recorder()

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W) in [0, 1]."""
        return self.logits(images)

    def logits(self, images: Tensor, original: bool = False) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W) in [0, 1].

        Args:
            images: The images.
            original: By the original network, see ``reference``, and without gradients.
        """
        if not original:
            return self.logits_by(self.network, images)
        with torch.no_grad():
            return self.logits_by(self.reference, images)

    def logits_by(self, network: nn.Module, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W) in [0, 1] by another network of this kind, such as a teacher."""
        return logits_of(network(images.contiguous(memory_format=self.memory_format)))

    @override
    def check_network(self) -> None:
        """Try the network on two samples, in eval mode and with random numbers put back, so that nothing is changed.

        Raises:
            ValueError: It cannot take the images, or has fewer outputs than the data has classes. (More are no harm.)
        """
        if not isinstance(self.datamodule, ForgetRetainDataModule):
            return
        network = getattr(self.network, "_orig_mod", self.network)  # to compile for two samples would take long
        modes = {module: module.training for module in network.modules()}
        strategy = self.trainer.strategy
        with isolate_rng(), torch.no_grad(), strategy.precision_plugin.forward_context():
            samples = strategy.batch_to_device(strategy.precision_plugin.convert_input(self.datamodule.probe()))
            try:
                logits = self.logits_by(network.eval(), samples.inputs)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
                reason = str(error).partition("\n")[0].rstrip(".")
                raise ValueError(
                    f"The network cannot take the images of the data, which have shape {tuple(samples.inputs.shape[1:])}:"
                    f" {reason}. Make the network for these channels and this size, or the images for the network."
                ) from error
            finally:
                for module, training in modes.items():
                    module.training = training
        if logits.ndim != 2 or len(logits) != len(samples.targets):
            raise ValueError(
                f"The network must give a row of logits for each image; for {len(samples.targets)} images it gave"
                f" {tuple(logits.shape)}."
            )
        if logits.shape[1] < self.num_classes:
            raise ValueError(
                f"The network has {logits.shape[1]} outputs, but the data has {self.num_classes} classes. Give the network at"
                " least as many (num_classes)."
            )

    @override
    def losses(self, samples: Samples) -> Tensor:
        """The cross-entropy of each sample, (B,)."""
        return functional.cross_entropy(self(samples.inputs), samples.targets, reduction="none")

    @override
    def validation_step(self, samples: Samples, batch_idx: int, dataloader_idx: int = 0) -> None:
        name = set_name(self, self.trainer.val_dataloaders, dataloader_idx)
        accuracy = self.accuracy[name]
        assert isinstance(accuracy, MeanMetric)
        accuracy.update(right(self(samples.inputs).float().softmax(1), samples.targets).float())
        self.log(f"val/{name}/acc", accuracy, add_dataloader_idx=False)

    @override
    def on_test_epoch_start(self) -> None:
        self._recorder = Recorder()  # without what a test that was broken off left

    @override
    def test_step(self, samples: Samples, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        return self.predicted(set_name(self, self.trainer.test_dataloaders, dataloader_idx), samples)

    @override
    def on_test_epoch_end(self) -> None:
        self.predictions = self._recorder.predictions()
        if "test" not in self.predictions.sets:
            rank_zero_info("There is no test set, so TA and MIA are left out.")
        self.log_dict(figures(self.predictions), sync_dist=True)

    @override
    def on_predict_epoch_start(self) -> None:
        self._recorder = Recorder()

    @override
    def predict_step(self, samples: Samples, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        return self.predicted(set_name(self, self.trainer.predict_dataloaders, dataloader_idx), samples)

    @override
    def on_predict_epoch_end(self) -> None:
        self.predictions = self._recorder.predictions()

    def predicted(self, name: str, samples: Samples) -> dict[str, Any]:
        """What the network says of the samples of one set, which is kept for ``predictions``.

        Returns:
            ``set`` (its name), ``index`` (B,), ``target`` (B,) and ``logits`` (B, C).
        """
        logits = self(samples.inputs).float()
        output = {"set": name, "index": samples.indices, "target": samples.targets, "logits": logits}
        self._recorder.add(output)
        return output
