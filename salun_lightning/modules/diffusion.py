"""What all diffusion models share."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from diffusers import SchedulerMixin
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from typing_extensions import override

from salun_lightning.callbacks import GenerationEvaluator
from salun_lightning.callbacks.requests import Requested
from salun_lightning.data import Samples
from salun_lightning.data.targets import retained_classes
from salun_lightning.evidence.predictions import Predictions
from salun_lightning.methods.base import Kind
from salun_lightning.modules.base import UnlearningModule, set_name
from salun_lightning.modules.noise import (
    check_schedule,
    check_shape,
    checked_min_snr,
    min_snr_weights,
    paired_timesteps,
    seeded_noise,
    shape_from_config,
    with_noise,
)
from salun_lightning.modules.sampling import (
    PROCESS,
    Sampling,
    generators,
    noise_of,
    part_way,
    run,
    sampler,
    training_process,
    with_guidance,
)


class Diffusion(UnlearningModule):
    """Trains, unlearns, samples and tests a model that predicts noise, told a condition: a number, here ``targets``.

    A subclass knows what a condition means, and says how the network is called with it (:meth:`predict`). It may also say which
    condition stands for none (:attr:`null`), and how images become the latents that noise is added to (:meth:`encode`,
    :meth:`decode`, :attr:`latent_shape`), by default their pixels. Latents and predictions have shape (B, C, H, W). ``test``
    logs the noise-prediction error on every set (``test/val/loss``), if ``test_loss``, and what ``evaluation`` measures.

    Args:
        network: What is trained.
        noise_scheduler: The noise schedule: any scheduler of diffusers that has one and predicts noise or velocity.
        label_dropout: How often training puts the null condition in the place of the condition.
        min_snr: Weighs each timestep as Hang et al. (ICCV 2023) do, with their gamma; None weighs all alike.
        sampling: How images are sampled.
        evaluation: Samples images in ``test`` and measures them; it also says which images ``predict`` samples.
        test_loss: Whether ``test`` measures the noise-prediction error, which takes a pass over all images.
        gradient_checkpointing: Whether the network computes activations again in the backward pass, which saves memory.
        optimizer: Makes the optimizer from the parameters.
        **kwargs: See ``UnlearningModule``.

    Raises:
        ValueError: The scheduler or a number does not fit.
    """

    kind: Kind = "diffusion"
    null: int | None = None
    """The condition that stands for none, which guidance and label dropout need."""
    retained_classes: Tensor
    """The conditions that are trained on and not forgotten whole, ascending int64."""

    def __init__(
        self,
        network: nn.Module,
        noise_scheduler: SchedulerMixin,
        *,
        label_dropout: float = 0.0,
        min_snr: float | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008  # frozen
        evaluation: GenerationEvaluator | None = None,
        test_loss: bool = True,
        gradient_checkpointing: bool = False,
        optimizer: OptimizerCallable = lambda p: torch.optim.Adam(p, lr=2e-4),
        **kwargs: Any,
    ) -> None:
        super().__init__(network, optimizer=optimizer, **kwargs)
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout must lie between 0 and 1, got {label_dropout}.")
        self.min_snr = checked_min_snr(min_snr)
        self.process = training_process(noise_scheduler)
        self.scheduler = sampler(sampling.scheduler, self.process)
        self.ddim = sampler(None, self.process)
        self.label_dropout = label_dropout
        self.sampling = sampling
        self.evaluation = evaluation
        self.test_loss = test_loss
        _checkpoint_gradients(network, gradient_checkpointing)

    @abstractmethod
    def predict(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Tensor) -> Tensor:
        """Call a network, that in training or the original one, with noisy latents, timesteps (B,) and conditions (B,)."""

    def encode(self, images: Tensor) -> Tensor:
        """The latents of images in [0, 1]."""
        return 2 * images - 1

    def decode(self, latents: Tensor) -> Tensor:
        """Images, roughly in [0, 1], of latents."""
        return (latents + 1) / 2

    @property
    def predictions(self) -> Predictions | None:
        """After a test, what the classifier of ``evaluation`` says of the images that were sampled: the set ``generated``."""
        return None if self.evaluation is None else self.evaluation.predictions

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of latents."""
        return shape_from_config(self.network)

    @override
    def configure_callbacks(self) -> list[Callback]:
        own = [] if self.evaluation is None else [self.evaluation]
        return [*super().configure_callbacks(), *own]

    @override
    def setup(self, stage: str) -> None:
        self.trained_classes: list[int] = getattr(self.datamodule, "trained_classes", [*range(self.num_classes)])
        retained = torch.tensor(retained_classes(self.datamodule, self.num_classes), dtype=torch.int64)
        self.register_buffer("retained_classes", retained, persistent=False)  # which follows to the device
        super().setup(stage)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["noise_schedule"] = {key: self.process.config[key] for key in PROCESS}

    @override
    def check_original(self, checkpoint: Mapping[str, Any]) -> None:
        check_schedule(self.process, checkpoint.get("noise_schedule", {}))

    def denoise(self, noisy: Tensor, timesteps: Tensor, targets: Tensor | None = None, original: bool = False) -> Tensor:
        """The prediction for conditions (B,), or for none, by the network or by the original model; always in float32."""
        if targets is None:
            targets = torch.full((len(noisy),), self._null("A prediction without a class"), device=noisy.device)
        network = self.reference if original else self.network
        prediction = self.predict(network, noisy.to(next(network.parameters()).dtype), timesteps, targets)
        check_shape(prediction, noisy)
        return prediction.float()

    def _null(self, what: str) -> int:
        if self.null is None:
            raise ValueError(f"{what} needs a null class, and the model has none: give null_class.")
        return self.null

    def guided(
        self, noisy: Tensor, timesteps: Tensor, targets: Tensor, guidance: float | None = None, original: bool = False
    ) -> Tensor:
        """The prediction with guidance, by default that of the sampling; 1 is none. See ``with_guidance``."""
        scale = self.sampling.guidance if guidance is None else guidance
        if scale == 1:
            return self.denoise(noisy, timesteps, targets, original)
        null = torch.full_like(targets, self._null("Guidance"))
        return with_guidance(partial(self.denoise, original=original), noisy, timesteps, targets, null, scale)

    def _toward(self, targets: Tensor, guidance: float | None, original: bool) -> Callable[[Tensor, Tensor], Tensor]:
        """The guided prediction on the way to images: all of them are at one timestep."""
        return lambda noisy, timestep: self.guided(noisy, timestep.expand(len(noisy)), targets, guidance, original)

    def noised(self, samples: Samples) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents of a training batch, their timesteps (B,), and what the network should predict from them."""
        latents = self.encode(samples.inputs.float())
        timesteps = paired_timesteps(len(latents), self.process, latents.device)
        noise = torch.randn(latents.shape, dtype=latents.dtype, device=latents.device)  # whatever their memory layout
        return with_noise(self.process, latents, timesteps, noise)

    @override
    def losses(self, samples: Samples) -> Tensor:
        """The squared error of each prediction, a mean over its elements (Ho et al., NeurIPS 2020, equation 14), weighted."""
        return self._losses(samples, self.label_dropout if self.training else 0.0)

    @override
    def unlearned_loss(self, samples: Samples) -> Tensor:
        """The task loss without label dropout: the prediction for no condition is not to be unlearned."""
        return self._losses(samples, label_dropout=0.0).mean()

    def _losses(self, samples: Samples, label_dropout: float) -> Tensor:
        noisy, timesteps, wanted = self.noised(samples)
        targets = _dropped(samples.targets, label_dropout, self._null("Label dropout")) if label_dropout else samples.targets
        error = functional.mse_loss(self.denoise(noisy, timesteps, targets), wanted, reduction="none")
        weights = 1.0 if self.min_snr is None else min_snr_weights(self.process, timesteps, self.min_snr)
        return weights * error.flatten(1).mean(1)

    @override
    def forget_loss(self, samples: Samples) -> Tensor:
        """The task loss with guidance, as SalUn's saliency is measured, and with noise that repeats; see ``seeded_loss``."""
        return self.seeded_loss(samples, self.sampling.guidance)

    def seeded_loss(self, samples: Samples, guidance: float = 1.0) -> Tensor:
        """The task loss with guidance and without label dropout, with noise that depends on seed and number alone."""
        latents = self.encode(samples.inputs.float())
        noisy, timesteps, wanted = with_noise(self.process, latents, *seeded_noise(latents, samples.indices, self.process))
        return functional.mse_loss(self.guided(noisy, timesteps, samples.targets, guidance), wanted)

    @torch.no_grad()
    def sample(self, targets: Tensor, indices: Tensor, original: bool = False) -> Tensor:
        """Images in [0, 1] of conditions (B,), each from the noise that belongs to its condition and its number (B,)."""
        own, targets = generators(targets, indices, self.sampling.seed), targets.to(self.device)
        self.scheduler.set_timesteps(self.sampling.steps, device=self.device)
        noise = noise_of(own, self.latent_shape, self.device)
        return self.decode(run(self.scheduler, self._toward(targets, None, original), noise, own)).clamp(0, 1)

    def partly_sampled(self, targets: Tensor, guidance: float, steps: int) -> tuple[Tensor, Tensor]:
        """Where the original model is on its way to images of classes (B,), after some of the ``steps``; see ``part_way``."""
        shape = (len(targets), *self.latent_shape)
        return part_way(self.ddim, self._toward(targets, guidance, original=True), shape, steps, self.device)

    @override
    def validation_step(self, samples: Samples, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._log_loss("val", set_name(self, self.trainer.val_dataloaders, dataloader_idx), samples)

    @override
    def test_step(self, samples: Samples, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        name = set_name(self, self.trainer.test_dataloaders, dataloader_idx)
        if self.test_loss:
            self._log_loss("test", name, samples)
        return {"set": name}

    def _log_loss(self, stage: str, name: str, samples: Samples) -> None:
        loss, size = self.seeded_loss(samples), len(samples.targets)
        self.log(f"{stage}/{name}/loss", loss, add_dataloader_idx=False, batch_size=size, on_epoch=True, sync_dist=True)

    @override
    def predict_dataloader(self) -> dict[str, DataLoader[Requested]]:
        return {"generated": _needed(self.evaluation).loader(self.trainer)}

    @override
    def predict_step(self, batch: Requested, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """The images (uint8) that are requested, as ``image``, with ``target`` (B,), ``index`` (B,) and ``set``."""
        images = (255 * self.sample(batch.targets, batch.indices)).round().to(torch.uint8)
        return {"set": "generated", "image": images, "target": batch.targets, "index": batch.indices}


def _dropped(conditions: Tensor, share: float, null: int) -> Tensor:
    """Conditions (B,), of which at random such a share is the null one."""
    return torch.where(torch.rand(len(conditions), device=conditions.device) < share, null, conditions)


def _needed(evaluation: GenerationEvaluator | None) -> GenerationEvaluator:
    if evaluation is None:
        raise MisconfigurationException(
            "A diffusion model predicts images that are asked for: give its evaluation, a GenerationEvaluator."
        )
    return evaluation


def _checkpoint_gradients(network: nn.Module, wanted: bool) -> None:
    if wanted and not hasattr(network, "enable_gradient_checkpointing"):
        raise ValueError(f"{type(network).__name__} offers no gradient checkpointing.")
    if wanted:
        network.enable_gradient_checkpointing()  # type: ignore[operator]
