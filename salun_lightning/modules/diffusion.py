"""Class-conditional diffusion models."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin
from diffusers.models.embeddings import LabelEmbedding
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from salun_lightning.data import Requested, Samples, run_seed
from salun_lightning.metrics import GenerationQuality
from salun_lightning.modules.base import UnlearningModule, set_name
from salun_lightning.modules.sampling import PROCESS, Sampling, generators, noise_of, run, sampler, training_process
from salun_lightning.networks.pipeline import save_pipeline


class ClassDiffusion(UnlearningModule):
    """Trains, unlearns, samples and tests a pixel diffusion model that is told the class.

    ``test`` logs the noise-prediction error on every set (``test/val/loss``), and, with ``quality``, what
    ``GenerationQuality`` measures on the images that the datamodule requests (``generated_per_class``), against the training
    images of the classes that are retained.

    Args:
        network: Called as ``network(noisy, timesteps, class_labels=classes, return_dict=False)``, it returns a tuple with the
            prediction (B, C, H, W): a ``UNet2DModel`` or ``DiTTransformer2DModel`` of diffusers, or what has the same
            signature. Dropping labels of its own accord, as the latter does, is switched off.
        noise_scheduler: The noise schedule: any scheduler of diffusers that has one and predicts noise or velocity.
        null_class: The number that stands for no class, which guidance needs: one that no class of the data has, such as 10 for
            a network of 11 class embeddings and data of 10 classes.
        label_dropout: How often training puts the null class in the place of the class.
        sampling: How images are sampled.
        quality: Judges the images that are sampled in ``test``.
        gradient_checkpointing: Whether the network computes activations again in the backward pass, which saves memory.
        optimizer: Makes the optimizer from the parameters.
        **kwargs: See ``UnlearningModule``.

    Raises:
        ValueError: The scheduler does not fit, or there is guidance or label dropout without a null class.
    """

    kind = "diffusion"

    def __init__(
        self,
        network: nn.Module,
        noise_scheduler: SchedulerMixin,
        null_class: int | None = None,
        label_dropout: float = 0.0,
        sampling: Sampling = Sampling(),  # noqa: B008  # frozen
        quality: GenerationQuality | None = None,
        gradient_checkpointing: bool = False,
        optimizer: OptimizerCallable = lambda p: torch.optim.Adam(p, lr=2e-4),
        **kwargs: Any,
    ) -> None:
        super().__init__(network, optimizer=optimizer, **kwargs)
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout must lie between 0 and 1, got {label_dropout}.")
        if null_class is None and (label_dropout or sampling.guidance != 1):
            raise ValueError(
                "Guidance and label dropout need a null class, and the model has none: give null_class and a network with an"
                " embedding for it, or set guidance to 1 and label_dropout to 0."
            )
        self.process = training_process(noise_scheduler)
        self.scheduler = sampler(sampling.scheduler, self.process)
        self.ddim = sampler(None, self.process)
        self.null_class = null_class
        self.label_dropout = label_dropout
        self.sampling = sampling
        self.quality = quality
        for child in network.modules():
            if isinstance(child, LabelEmbedding):
                child.dropout_prob = 0.0
        if gradient_checkpointing:
            if not hasattr(network, "enable_gradient_checkpointing"):
                raise ValueError(f"{type(network).__name__} offers no gradient checkpointing.")
            network.enable_gradient_checkpointing()  # type: ignore[operator]

    @override
    def setup(self, stage: str) -> None:
        classes, embedded = self.num_classes, _num_embedded(self.network)
        if self.null_class is not None and self.null_class < classes:
            raise ValueError(f"null_class {self.null_class} is the number of a class of the data, which has {classes}.")
        needed = max(classes, 0 if self.null_class is None else self.null_class + 1)
        if embedded is not None and embedded < needed:
            raise ValueError(
                f"The network embeds {embedded} classes, but {needed} are needed: {classes} of the data"
                + (f", and null_class is {self.null_class}." if self.null_class is not None else ".")
            )
        forgotten = getattr(self.datamodule, "forgotten_classes", [])
        self._retained = torch.tensor([number for number in range(classes) if number not in forgotten], dtype=torch.int64)
        super().setup(stage)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["noise_schedule"] = {key: self.process.config[key] for key in PROCESS}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.check_original(checkpoint)

    @override
    def check_original(self, checkpoint: Mapping[str, Any]) -> None:
        """Refuse a model that was trained with another noise schedule, or to predict something else.

        Raises:
            ValueError: A setting differs.
        """
        schedule = checkpoint.get("noise_schedule", {})
        for key in PROCESS:
            own = self.process.config[key]
            if schedule.get(key, own) != own:
                raise ValueError(
                    f"The checkpoint was trained with another noise schedule: {key} {schedule[key]}, here it is {own}. Give the"
                    " noise_scheduler that it was trained with."
                )

    @property
    def retained_classes(self) -> Tensor:
        """The classes that are not forgotten whole, ascending int64."""
        if self._retained.device != self.device:  # once: a step is not to wait for a copy to the device
            self._retained = self._retained.to(self.device)
        return self._retained

    @override
    def forward(self, noisy: Tensor, timesteps: Tensor, targets: Tensor) -> Tensor:
        """The prediction (B, C, H, W) from noisy images at timesteps (B,) for classes (B,)."""
        return self.denoise(noisy, timesteps, targets)

    def denoise(self, noisy: Tensor, timesteps: Tensor, targets: Tensor | None = None, original: bool = False) -> Tensor:
        """The prediction for classes, or for none, by the network or by the original model.

        Args:
            noisy: Images with noise, (B, C, H, W).
            timesteps: Of their noise, (B,).
            targets: Classes (B,); None for the null class.
            original: Whether the original model is asked, which is there for methods that need it.

        Returns:
            (B, C, H, W), in float32 whatever the network computes in.

        Raises:
            ValueError: The null class is asked for and the model has none, or the prediction has not the shape of the images.
        """
        if targets is None:
            if self.null_class is None:
                raise ValueError("A prediction without a class needs a null class, and the model has none: give null_class.")
            targets = torch.full((len(noisy),), self.null_class, device=noisy.device)
        network = self.reference if original else self.network
        weight = next(network.parameters())
        prediction: Tensor = network(noisy.to(weight.dtype), timesteps, class_labels=targets, return_dict=False)[0]
        if prediction.shape != noisy.shape:
            raise ValueError(
                f"The network makes {tuple(prediction.shape[1:])} of images of {tuple(noisy.shape[1:])}: a prediction must have"
                " the shape of the images. Variances cannot be learned."
            )
        return prediction.float()

    def guided(
        self, noisy: Tensor, timesteps: Tensor, targets: Tensor, guidance: float | None = None, original: bool = False
    ) -> Tensor:
        """The prediction with classifier-free guidance (Ho and Salimans, 2022), both halves in one pass.

        Args:
            noisy: Images with noise, (B, C, H, W).
            timesteps: Of their noise, (B,).
            targets: Classes (B,).
            guidance: Scale, 1 is none; by default that of the sampling.
            original: Whether the original model is asked.
        """
        scale = self.sampling.guidance if guidance is None else guidance
        if scale == 1:
            return self.denoise(noisy, timesteps, targets, original)
        if self.null_class is None:
            raise ValueError("Guidance needs a null class, and the model has none: give null_class.")
        both = torch.cat([targets, torch.full_like(targets, self.null_class)])
        toward, without = self.denoise(noisy.repeat(2, 1, 1, 1), timesteps.repeat(2), both, original).chunk(2)
        return without + scale * (toward - without)

    def noised(self, samples: Samples) -> tuple[Tensor, Tensor, Tensor]:
        """Noise the images of a training batch, to timesteps that come in pairs t and T - 1 - t.

        Returns:
            Noisy images (B, C, H, W), timesteps (B,), and what the network should predict (B, C, H, W).
        """
        size, last = len(samples.targets), self.process.config.num_train_timesteps - 1
        half = torch.randint(last + 1, ((size + 1) // 2,), device=samples.inputs.device)
        timesteps = torch.cat([half, last - half])[:size]
        return self._with_noise(samples, timesteps, torch.randn_like(samples.inputs, dtype=torch.float32))

    def _with_noise(self, samples: Samples, timesteps: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        images = 2 * samples.inputs.float() - 1
        noisy = self.process.add_noise(images, noise, timesteps)
        if self.process.config.prediction_type == "epsilon":
            return noisy, timesteps, noise
        return noisy, timesteps, self.process.get_velocity(images, noise, timesteps)

    @override
    def losses(self, samples: Samples) -> Tensor:
        """The squared error of each prediction, as a mean over its elements (Ho et al., NeurIPS 2020, equation 14)."""
        noisy, timesteps, wanted = self.noised(samples)
        targets = samples.targets
        if self.label_dropout and self.training:
            dropped = torch.rand(len(targets), device=targets.device) < self.label_dropout
            targets = torch.where(dropped, self.null_class or 0, targets)
        error = functional.mse_loss(self.denoise(noisy, timesteps, targets), wanted, reduction="none")
        return error.flatten(1).mean(1)

    @override
    def forget_loss(self, samples: Samples) -> Tensor:
        """The task loss with guidance, as SalUn's saliency is measured, and with noise that repeats; see ``seeded_loss``."""
        return self.seeded_loss(samples, self.sampling.guidance)

    def seeded_loss(self, samples: Samples, guidance: float = 1.0) -> Tensor:
        """The task loss without label dropout. Noise and timestep of a sample depend on the seed and its number alone.

        Args:
            samples: Images in [0, 1].
            guidance: Scale of classifier-free guidance in the prediction.
        """
        device = samples.inputs.device
        own = generators(torch.zeros_like(samples.indices), samples.indices, run_seed())
        count = self.process.config.num_train_timesteps
        timesteps = torch.cat([torch.randint(count, (1,), generator=generator) for generator in own]).to(device)
        noisy, _, wanted = self._with_noise(samples, timesteps, noise_of(own, samples.inputs.shape[1:], device))
        return functional.mse_loss(self.guided(noisy, timesteps, samples.targets, guidance), wanted)

    @torch.no_grad()
    def sample(self, targets: Tensor, indices: Tensor, original: bool = False) -> Tensor:
        """Sample images, each from the noise that belongs to its class and number.

        Args:
            targets: Classes, int64 of shape (B,).
            indices: Numbers of the images within their class, int64 of shape (B,).
            original: Whether the original model is asked, which is there for methods that need it.

        Returns:
            (B, C, H, W) in [0, 1].
        """
        own, targets = generators(targets, indices, self.sampling.seed), targets.to(self.device)
        self.scheduler.set_timesteps(self.sampling.steps, device=self.device)

        def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
            return self.guided(noisy, timestep.expand(len(noisy)), targets, original=original)

        images = run(self.scheduler, predict, noise_of(own, self.image_shape, self.device), own)
        return ((images + 1) / 2).clamp(0, 1)

    def partly_sampled(self, targets: Tensor, guidance: float, steps: int) -> tuple[Tensor, Tensor]:
        """Where the original model is, after a random number of DDIM steps, on its way to images of these classes.

        Args:
            targets: Classes, int64 of shape (B,).
            guidance: Scale of classifier-free guidance.
            steps: How many steps the whole way has.

        Returns:
            Noisy images (B, C, H, W) and timesteps (B,), each drawn from those up to the last step that was taken.
        """
        count = self.process.config.num_train_timesteps
        steps = min(steps, count)
        self.ddim.set_timesteps(steps, device=self.device)
        stop = int(torch.randint(len(self.ddim.timesteps), ()))

        def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
            return self.guided(noisy, timestep.expand(len(noisy)), targets, guidance, original=True)

        noise = torch.randn(len(targets), *self.image_shape, dtype=torch.float32, device=self.device)
        timesteps = self.ddim.timesteps[stop] + torch.randint(count // steps, (len(targets),), device=self.device)
        return run(self.ddim, predict, noise, stop=stop), timesteps.clamp(max=count - 1)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images, as the network's configuration has them."""
        config = getattr(self.network, "config", {})
        size = config.get("sample_size")
        if size is None:
            raise MisconfigurationException(
                "It is not known which images the network makes: give it a config with sample_size and in_channels, as those of"
                " diffusers have."
            )
        height, width = (size, size) if isinstance(size, int) else size
        return int(config["in_channels"]), int(height), int(width)

    @override
    def validation_step(self, samples: Samples, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._log_loss("val", set_name(self, self.trainer.val_dataloaders, dataloader_idx), samples)

    def _log_loss(self, stage: str, name: str, samples: Samples) -> None:
        loss, size = self.seeded_loss(samples), len(samples.targets)
        self.log(f"{stage}/{name}/loss", loss, add_dataloader_idx=False, batch_size=size, on_epoch=True, sync_dist=True)

    @override
    def on_test_epoch_start(self) -> None:
        if self.quality is None:
            return
        if "generated" not in (self.trainer.test_dataloaders or {}):
            raise MisconfigurationException(
                "There are no generated images to judge: set the datamodule's generated_per_class, or leave quality out."
            )
        self.quality.start(getattr(self.datamodule, "class_names", ()))

    @override
    def test_step(self, batch: Samples | Requested, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        name = set_name(self, self.trainer.test_dataloaders, dataloader_idx)
        real = isinstance(batch, Samples)
        if isinstance(batch, Samples):
            self._log_loss("test", name, batch)
            output: dict[str, Any] = {"set": name}
            images = batch.inputs
        else:
            output = self.generated(batch)
            images = output["image"].float() / 255  # what a file of it would hold
        if self.quality is not None and name in ("retain", "test", "generated"):
            retained = torch.isin(batch.targets, self.retained_classes)
            self.quality.update(images, batch.targets, retained, real, held_out=name == "test")
        return output

    @override
    def on_test_epoch_end(self) -> None:
        if self.quality is not None:
            self.log_dict(self.quality.compute(), sync_dist=True)

    @override
    def predict_step(self, batch: Samples | Requested, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        if isinstance(batch, Samples):
            raise MisconfigurationException(
                "A diffusion model predicts images that are asked for: set the datamodule's generated_per_class."
            )
        return self.generated(batch)

    def generated(self, batch: Requested) -> dict[str, Any]:
        """Sample what is requested.

        Returns:
            ``set`` ("generated"), ``image`` (uint8 of shape (B, C, H, W)), ``target`` (B,) and ``index`` (B,).
        """
        images = self.sample(batch.targets, batch.indices)
        return {
            "set": "generated",
            "image": (255 * images).round().to(torch.uint8),
            "target": batch.targets,
            "index": batch.indices,
        }

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Save the network and its noise schedule as a pipeline directory that plain diffusers loads.

        Args:
            folder: The directory; it appears whole or not at all.

        Raises:
            ValueError: The network is not one of diffusers.
        """
        save_pipeline(self.network, self.process, Path(folder))


def _num_embedded(network: nn.Module) -> int | None:
    """How many classes a network of diffusers embeds."""
    config = getattr(network, "config", {})
    if config.get("num_class_embeds") is not None:
        return int(config["num_class_embeds"])
    adaptive = config.get("num_embeds_ada_norm")
    return None if adaptive is None else int(adaptive) + 1  # such networks have a null class of their own
