"""Text-to-image pipelines, such as Stable Diffusion."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from salun_lightning.data import ForgetRetainDataModule
from salun_lightning.methods.base import Kind
from salun_lightning.modules.diffusion import Diffusion
from salun_lightning.modules.latent_cache import LatentCache
from salun_lightning.modules.sampling import Sampling
from salun_lightning.networks.adapters import add_adapters, merged
from salun_lightning.networks.frozen import Frozen
from salun_lightning.networks.pipeline import write_pipeline
from salun_lightning.networks.text_to_image import Embedded, embed, text_to_image


class TextToImage(Diffusion):
    """The UNet of a text-to-image pipeline, which is trained; its VAE and text encoders are frozen.

    A condition is the number of a prompt: ``class_names`` of the datamodule are the prompts. All are embedded once. The empty
    prompt, which guidance needs, comes behind them, and then the anchors: what is drawn in the place of a prompt that is to be
    forgotten, if the request names any (:attr:`anchors`).

    Args:
        pipeline: A directory, the name of a pipeline on the hub of Hugging Face, or a pipeline: Stable Diffusion 1, 2 or XL.
            Its UNet is the original model, unless ``original`` names another one.
        sampling: How images are sampled.
        lora: Trains adapters of low rank (Hu et al., ICLR 2022) in the place of the weights: arguments of ``peft.LoraConfig``,
            such as ``{r: 8}``. By default they are in all projections of attention. A mask then covers the adapters.
        latents: A folder where the latents of images are kept, on disk, so that the VAE sees each image once. It saves nothing
            where images are new each time: augmented at random, or the noise of Selective Amnesia.
        **kwargs: See ``Diffusion``.

    Raises:
        ModuleNotFoundError: peft is not installed, which ``lora`` needs.
        ValueError: It is no such pipeline, a prompt is too long, adapters are to start from another ``original``, or the images
            of the datamodule have another size than the pipeline draws.
    """

    kind: Kind = "text-to-image"
    pretrained = True

    def __init__(
        self,
        pipeline: str | DiffusionPipeline,
        *,
        sampling: Sampling = Sampling(guidance=7.5),  # noqa: B008  # frozen
        lora: dict[str, Any] | None = None,
        latents: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        read = text_to_image(pipeline)
        if lora is not None:
            if kwargs.get("original") is not None:
                raise ValueError("Adapters (lora) start from the pipeline itself. Leave original unset.")
            add_adapters(read.unet, lora)
        # DDIM as diffusers would run it; latents are no images, whose range could be kept
        settings = {name: value for name, value in read.scheduler.config.items() if name != "_use_default_values"}
        usual = DDIMScheduler.from_config({"clip_sample": False, **settings})
        if sampling.scheduler is None:
            sampling = replace(sampling, scheduler=usual)
        super().__init__(read.unet.train(), usual, sampling=sampling, **kwargs)
        self.pipeline = read
        encoders = [read.components[name] for name in ("text_encoder", "text_encoder_2") if read.components.get(name)]
        self.encoders = nn.ModuleList(Frozen(encoder) for encoder in encoders)
        self.vae = Frozen(read.vae)
        self.latents = latents
        self._cache: LatentCache | None = None
        self._embedded: Embedded | None = None
        self._prompts: list[str] = []

    @override
    def setup(self, stage: str) -> None:
        names = getattr(self.datamodule, "class_names", None)
        if names is None:
            raise MisconfigurationException("The prompts are not known: give the datamodule class_names, a list of them.")
        anchored: Mapping[int, str] = getattr(self.datamodule, "anchors", {})
        further = [prompt for prompt in dict.fromkeys(anchored.values()) if prompt not in names]
        prompts = [*names, "", *further]
        if prompts != self._prompts:
            self._prompts, self._embedded = prompts, None
        self.null = len(names)
        self._anchors = torch.tensor([prompts.index(anchored.get(n, name)) for n, name in enumerate(names)])
        super().setup(stage)

    @override
    def check_network(self) -> None:
        if not isinstance(self.datamodule, ForgetRetainDataModule):
            return
        channels, *given = self.datamodule.probe().inputs.shape[1:]
        height, width = (self.pipeline.vae_scale_factor * side for side in self.latent_shape[1:])
        if channels == self._vae().config.in_channels and given != [height, width]:  # of other channels encode tells
            raise ValueError(
                f"The images have {given[0]} x {given[1]} pixels, and the pipeline draws {height} x {width}. Give images of"
                f" that size (image_size: {height}), so that what is drawn is what was trained."
            )

    def anchors(self, targets: Tensor) -> Tensor:
        """The prompt in the place of each prompt that is forgotten, and each other one itself; int64 of shape (B,)."""
        return self._anchors.to(targets.device)[targets]

    @property
    def embedded(self) -> Embedded:
        """What the text encoders make of all prompts, on the device of the module."""
        if self._embedded is None:
            self._embedded = embed(self.pipeline, self._prompts, self.device)
        if self._embedded.tokens.device != self.device:
            tokens, pooled = self._embedded
            self._embedded = Embedded(tokens.to(self.device), None if pooled is None else pooled.to(self.device))
        return self._embedded

    @override
    def predict(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Tensor) -> Tensor:
        tokens, pooled = self.embedded
        added = None if pooled is None else {"text_embeds": pooled[conditions].to(noisy), "time_ids": self._sizes(noisy)}
        prediction: Tensor = network(
            noisy,
            timesteps,
            encoder_hidden_states=tokens[conditions].to(noisy),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return prediction

    def _sizes(self, noisy: Tensor) -> Tensor:
        """What Stable Diffusion XL is told of each image: its size, and that nothing of it was cut off."""
        height, width = (self.pipeline.vae_scale_factor * side for side in noisy.shape[2:])
        return noisy.new_tensor([height, width, 0, 0, height, width]).expand(len(noisy), -1)

    @override
    def encode(self, images: Tensor) -> Tensor:
        vae = self._vae()
        if images.shape[1] != vae.config.in_channels:
            raise ValueError(f"The images have {images.shape[1]} channels, and the VAE takes {vae.config.in_channels}.")
        if self.latents is None:
            return self._encoded(images)
        if self._cache is None:
            self._cache = LatentCache(self.latents, vae, vae.dtype, vae.config.scaling_factor)
        return self._cache.latents(images, self._encoded)

    def _encoded(self, images: Tensor) -> Tensor:
        vae = self._vae()
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            made = vae.encode((2 * images - 1).to(vae.dtype))
        latents: Tensor = made.latents if hasattr(made, "latents") else made.latent_dist.mode()
        return latents.float() * float(vae.config.scaling_factor)

    @override
    def decode(self, latents: Tensor) -> Tensor:
        vae = self._vae()
        with torch.autocast(latents.device.type, enabled=False):
            images: Tensor = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]
        return (images.float() + 1) / 2

    def _vae(self) -> Any:
        vae: Any = self.vae.network
        if vae.dtype == torch.float16 and vae.config.get("force_upcast", False):  # that of Stable Diffusion XL overflows
            vae.float()
        return vae

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Save the pipeline with the UNet as it is now, as a directory that plain diffusers loads.

        No mask is part of it: where the weights were changed may help to revive what was erased (arXiv 2603.06640). Adapters
        are merged into the UNet, and also lie beside it, as ``load_lora_weights`` of diffusers reads them.

        Args:
            folder: The directory; it appears whole or not at all.

        Raises:
            ValueError: ``folder`` is something else than such a directory.
        """
        with merged(self.pipeline) as (whole, adapters):
            write_pipeline(whole, Path(folder), adapters)
