"""Noise on latents in training: how much, which, and what a network should make of it."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDPMScheduler
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from salun_lightning.data import run_seed
from salun_lightning.modules.sampling import PROCESS, generators, noise_of


def with_noise(process: DDPMScheduler, latents: Tensor, timesteps: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Add noise to latents.

    Args:
        process: The noise schedule, which also says whether noise or velocity is predicted.
        latents: (B, C, H, W).
        timesteps: How much noise, (B,).
        noise: Gaussian noise (B, C, H, W).

    Returns:
        Noisy latents (B, C, H, W), the timesteps (B,), and what the network should predict (B, C, H, W).
    """
    noisy = process.add_noise(latents, noise, timesteps)
    wanted = noise if process.config.prediction_type == "epsilon" else process.get_velocity(latents, noise, timesteps)
    return noisy, timesteps, wanted


def paired_timesteps(size: int, process: DDPMScheduler, device: torch.device) -> Tensor:
    """Random timesteps (size,), in pairs t and T - 1 - t."""
    last = process.config.num_train_timesteps - 1
    half = torch.randint(last + 1, ((size + 1) // 2,), device=device)
    return torch.cat([half, last - half])[:size]


def checked_min_snr(gamma: float | None) -> float | None:
    """The gamma of :func:`min_snr_weights`; None weighs nothing.

    Raises:
        ValueError: It is not positive.
    """
    if gamma is not None and not gamma > 0:
        raise ValueError(f"min_snr must be positive, got {gamma}.")
    return gamma


def min_snr_weights(process: DDPMScheduler, timesteps: Tensor, gamma: float) -> Tensor:
    r"""Weights of the squared error at timesteps (B,), so that no timestep counts much more than another in terms of images.

    With the signal-to-noise ratio :math:`\bar\alpha_t / (1 - \bar\alpha_t)` it is :math:`\min(SNR, \gamma) / SNR` for a model
    that predicts noise, and :math:`\min(SNR, \gamma) / (SNR + 1)` for one that predicts velocity (Hang et al., ICCV 2023,
    section 3.4).

    Args:
        process: The noise schedule.
        timesteps: How much noise, (B,).
        gamma: The largest ratio that counts.
    """
    kept: Tensor = process.alphas_cumprod.to(timesteps.device)[timesteps]
    ratio = kept / (1 - kept)
    if process.config.prediction_type == "epsilon":
        return (gamma / ratio).clamp(max=1)  # also where the ratio is 0
    return ratio.clamp(max=gamma) / (ratio + 1)


def seeded_noise(latents: Tensor, indices: Tensor, process: DDPMScheduler) -> tuple[Tensor, Tensor]:
    """Timesteps (B,) and noise (B, C, H, W) that depend on the seed of the run and the numbers (B,) of the samples alone."""
    own = generators(torch.zeros_like(indices), indices, run_seed())
    count = process.config.num_train_timesteps
    timesteps = torch.cat([torch.randint(count, (1,), generator=generator) for generator in own]).to(latents.device)
    return timesteps, noise_of(own, latents.shape[1:], latents.device)


def check_schedule(process: DDPMScheduler, schedule: Mapping[str, Any]) -> None:
    """Refuse a model that was trained with another noise schedule, or to predict something else.

    Args:
        process: The noise schedule here.
        schedule: The settings there, as far as they are known.

    Raises:
        ValueError: A setting differs.
    """
    for key in PROCESS:
        own = process.config[key]
        if schedule.get(key, own) != own:
            raise ValueError(
                f"The checkpoint was trained with another noise schedule: {key} {schedule[key]}, here it is {own}. Give the"
                " noise_scheduler that it was trained with."
            )


def check_shape(prediction: Tensor, noisy: Tensor) -> None:
    """Refuse a prediction that has not the shape of what it was made of.

    Raises:
        ValueError: It has not.
    """
    if prediction.shape != noisy.shape:
        raise ValueError(
            f"The network makes {tuple(prediction.shape[1:])} of images of {tuple(noisy.shape[1:])}: a prediction must have"
            " the shape of the images. Variances cannot be learned."
        )


def shape_from_config(network: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of what a network denoises, as its configuration has them.

    Raises:
        MisconfigurationException: It has no such configuration.
    """
    config = getattr(network, "config", {})
    size = config.get("sample_size")
    if size is None:
        raise MisconfigurationException(
            "It is not known which images the network makes: give it a config with sample_size and in_channels, as those of"
            " diffusers have."
        )
    height, width = (size, size) if isinstance(size, int) else size
    return int(config["in_channels"]), int(height), int(width)
