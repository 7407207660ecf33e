"""Class-conditional diffusion models."""

import os
from pathlib import Path
from typing import Any

from diffusers import SchedulerMixin
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn
from typing_extensions import override

from salun_lightning.modules.diffusion import Diffusion
from salun_lightning.networks.pipeline import save_pipeline


class ClassDiffusion(Diffusion):
    """A pixel diffusion model that is told the class.

    Args:
        network: Called as ``network(noisy, timesteps, class_labels=classes, return_dict=False)``, it returns a tuple with the
            prediction (B, C, H, W): a ``UNet2DModel`` or ``DiTTransformer2DModel`` of diffusers, or what has the same
            signature. Dropping labels of its own accord, as the latter does, is switched off.
        noise_scheduler: The noise schedule: any scheduler of diffusers that has one and predicts noise or velocity.
        null_class: The number that stands for no class, which guidance needs: one that no class of the data has. By default
            the last one that the network embeds, if it embeds exactly one more than the data has classes.
        **kwargs: See ``Diffusion``.

    Raises:
        ValueError: The scheduler does not fit, or there is guidance or label dropout without a null class.
    """

    def __init__(
        self, network: nn.Module, noise_scheduler: SchedulerMixin, *, null_class: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(network, noise_scheduler, **kwargs)
        self.null = null_class
        for child in network.modules():
            if isinstance(child, LabelEmbedding):
                child.dropout_prob = 0.0

    @override
    def setup(self, stage: str) -> None:
        classes, embedded = self.num_classes, _num_embedded(self.network)
        if self.null is None and embedded == classes + 1:
            self.null = classes
        if self.null is None and (self.label_dropout or self.sampling.guidance != 1):
            raise ValueError(
                "Guidance and label dropout need a null class, and the model has none: give null_class and a network with an"
                " embedding for it, or set guidance to 1 and label_dropout to 0."
            )
        if self.null is not None and self.null < classes:
            raise ValueError(f"null_class {self.null} is the number of a class of the data, which has {classes}.")
        needed = max(classes, 0 if self.null is None else self.null + 1)
        if embedded is not None and embedded < needed:
            raise ValueError(
                f"The network embeds {embedded} classes, but {needed} are needed: {classes} of the data"
                + (f", and null_class is {self.null}." if self.null is not None else ".")
            )
        super().setup(stage)

    @override
    def predict(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Tensor) -> Tensor:
        prediction: Tensor = network(noisy, timesteps, class_labels=conditions, return_dict=False)[0]
        return prediction

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
