"""From noise to images, with the schedulers of diffusers."""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, SchedulerMixin
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from salun_lightning.data import epoch_seed

PROCESS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")


@dataclass(frozen=True)
class Sampling:
    """How images are sampled.

    Args:
        scheduler: A scheduler of diffusers, such as DDIMScheduler (the default), DPMSolverMultistepScheduler or DDPMScheduler.
            Settings that you leave at their defaults, and the noise schedule, are those of the training.
        steps: The number of steps.
        guidance: Scale of classifier-free guidance in the convention of diffusers: 1 is none, and the w of Ho and Salimans
            (2022) is ``guidance - 1``.
        seed: With the class and the number of an image it fixes its noise, so that all models draw from the same noise.

    Raises:
        ValueError: ``steps`` is not positive.
    """

    scheduler: SchedulerMixin | None = None
    steps: int = 50
    guidance: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be positive, got {self.steps}.")


def training_process(scheduler: Any) -> DDPMScheduler:
    """The noise schedule of any scheduler, as the one that adds noise in training.

    Raises:
        ValueError: It has no schedule of variances, or predicts something else than noise or velocity.
    """
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"{type(scheduler).__name__} does not fit: it has no variance schedule (alphas_cumprod). Use one of diffusers that"
            " has, such as DDPMScheduler."
        )
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"{type(scheduler).__name__} does not fit: prediction_type must be epsilon or v_prediction, got {kind}."
        )
    process = DDPMScheduler.from_config({**scheduler.config, **_own(scheduler)})
    _check_same(scheduler, process)
    return process


def sampler(scheduler: Any, process: DDPMScheduler) -> Any:
    """A scheduler that goes the way of the training process back.

    Args:
        scheduler: The kind of scheduler, with its own settings; None is DDIM.
        process: The process that was trained on.

    Raises:
        ValueError: It does not fit the process.
    """
    kind = DDIMScheduler if scheduler is None else type(scheduler)
    if not hasattr(kind, "from_config") or not (scheduler is None or hasattr(scheduler, "alphas_cumprod")):
        raise ValueError(f"{kind.__name__} does not fit: it samples from another kind of process than the one trained on.")
    trained = {key: process.config[key] for key in PROCESS}
    own = {} if scheduler is None else _own(scheduler)
    fitted = kind.from_config({"_class_name": "DDPMScheduler", **_own(process), **trained, **own})
    _check_same(fitted, process)
    return fitted


def _own(scheduler: Any) -> dict[str, Any]:
    """The settings that are not a scheduler's defaults."""
    defaults = {name: parameter.default for name, parameter in signature(type(scheduler).__init__).parameters.items()}
    return {key: value for key, value in scheduler.config.items() if key in defaults and value != defaults[key]}


def _check_same(scheduler: Any, process: DDPMScheduler) -> None:
    same = scheduler.alphas_cumprod.shape == process.alphas_cumprod.shape and torch.allclose(
        scheduler.alphas_cumprod.cpu(), process.alphas_cumprod.cpu(), atol=1e-6
    )
    if not same or scheduler.config.get("prediction_type", "epsilon") != process.config.prediction_type:
        raise ValueError(
            f"{type(scheduler).__name__} does not fit: its noise schedule or prediction type is not that of the training. Leave"
            " its betas, num_train_timesteps and prediction_type out."
        )


def generators(targets: Tensor, indices: Tensor, seed: int) -> list[torch.Generator]:
    """A generator for each image: its noise does not depend on what else is sampled with it, or where."""
    pairs = zip(targets.tolist(), indices.tolist(), strict=True)
    return [torch.Generator().manual_seed(epoch_seed(seed, target, index)) for target, index in pairs]


def noise_of(generators: list[torch.Generator], shape: torch.Size | tuple[int, ...], device: torch.device) -> Tensor:
    """Gaussian noise (B, *shape), a row from each generator, in float32 whatever the precision."""
    return torch.stack([torch.randn(shape, generator=generator, dtype=torch.float32) for generator in generators]).to(device)


def run(
    scheduler: Any,
    predict: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    generators: list[torch.Generator] | None = None,
    stop: int | None = None,
) -> Tensor:
    """Go from noise towards images.

    Args:
        scheduler: A scheduler whose timesteps are set.
        predict: The prediction for noisy images (B, C, H, W) at a timestep.
        noise: Gaussian noise (B, C, H, W).
        generators: One for each image, of the noise that ancestral schedulers add; by default the global one.
        stop: How many steps to take; by default all.

    Returns:
        Images (B, C, H, W), roughly in [-1, 1], or where they are after ``stop`` steps.
    """
    images: Tensor = noise * scheduler.init_noise_sigma
    takes_generator = "generator" in signature(scheduler.step).parameters
    extra = {"generator": generators} if takes_generator and generators is not None else {}
    for timestep in scheduler.timesteps[:stop]:
        prediction = predict(scheduler.scale_model_input(images, timestep), timestep)
        images = scheduler.step(prediction, timestep, images, return_dict=False, **extra)[0]
    return images


def part_way(
    scheduler: Any, predict: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...], steps: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Noisy images from which a model has still some way to go: it starts from noise, and stops after a random number of steps.

    Random numbers are those of the global generator.

    Args:
        scheduler: A scheduler that takes any number of steps, such as DDIM.
        predict: See :func:`run`.
        shape: Of the images and their number, (B, C, H, W).
        steps: How many steps the whole way has.
        device: Where to.

    Returns:
        Where the images are (B, C, H, W), and timesteps (B,), each drawn from those up to the last step that was taken.
    """
    count = scheduler.config.num_train_timesteps
    steps = min(steps, count)
    scheduler.set_timesteps(steps, device=device)
    stop = int(torch.randint(len(scheduler.timesteps), ()))
    noise = torch.randn(shape, dtype=torch.float32, device=device)
    timesteps = scheduler.timesteps[stop] + torch.randint(count // steps, (shape[0],), device=device)
    return run(scheduler, predict, noise, stop=stop), timesteps.clamp(max=count - 1)


def with_guidance(
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    noisy: Tensor,
    timesteps: Tensor,
    conditions: Tensor,
    null: Tensor,
    scale: float,
) -> Tensor:
    """The prediction with classifier-free guidance (Ho and Salimans, 2022), in the convention of diffusers: 1 is none.

    Where gradients are wanted, either half is computed anew in the backward pass, so that two graphs are never alive at once.

    Args:
        predict: Of noisy latents, timesteps and conditions.
        noisy: (B, C, H, W).
        timesteps: (B,).
        conditions: (B,).
        null: The condition that stands for none, (B,).
        scale: How far to go from the prediction for none toward that for the conditions.
    """
    if torch.is_grad_enabled():
        toward, without = (checkpoint(predict, noisy, timesteps, given, use_reentrant=False) for given in (conditions, null))
    else:
        toward, without = predict(noisy.repeat(2, 1, 1, 1), timesteps.repeat(2), torch.cat([conditions, null])).chunk(2)
    guided: Tensor = without + scale * (toward - without)
    return guided
