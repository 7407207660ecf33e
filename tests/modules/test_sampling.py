"""Sampling: every image from noise of its own, as plain loops of diffusers would draw it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from salun_lightning.callbacks import GenerationEvaluator
from salun_lightning.modules import diffusion as diffusion_module
from salun_lightning.modules import sampling
from salun_lightning.modules.sampling import Sampling, sampler, training_process
from salun_lightning.networks.frozen import Frozen
from tests.modules.small_diffusion import NULL, STEPS, diffusion, images, noise_schedule, unet
from tests.modules.small_runs import trainer

KINDS = {
    "DDIM by default": lambda: None,
    "DDIM": DDIMScheduler,
    "DDIM, other steps": lambda: DDIMScheduler(timestep_spacing="trailing"),
    "DPMSolver": DPMSolverMultistepScheduler,
    "DPMSolver SDE": lambda: DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "DDPM": DDPMScheduler,
    "Euler": EulerDiscreteScheduler,
    "Euler ancestral": EulerAncestralDiscreteScheduler,
    "UniPC": UniPCMultistepScheduler,
}
TARGETS, NUMBERS = torch.tensor([0, 1, 2, 1, 0]), torch.tensor([0, 3, 0, 4, 7])


def model(kind: Any = None, noise: Any = None, **kwargs: Any) -> Any:
    return diffusion(noise=noise, sampling=Sampling(kind, **{"steps": 6, **kwargs})).eval()


@pytest.mark.parametrize("name", KINDS)
def test_an_image_does_not_depend_on_what_is_drawn_with_it(name: str) -> None:
    """Up to what float32 rounds differently in batches of other sizes."""
    module = model(KINDS[name](), steps=4, guidance=2.0)
    together = module.sample(TARGETS, NUMBERS)
    assert together.shape == (5, 1, 4, 4)
    assert together.min() >= 0
    assert together.max() <= 1
    assert len({tuple(image.flatten().tolist()) for image in together}) == 5
    torch.rand(3)  # nor on what was drawn before
    assert torch.equal(module.sample(TARGETS, NUMBERS), together)
    torch.testing.assert_close(module.sample(TARGETS.flip(0), NUMBERS.flip(0)).flip(0), together, rtol=0, atol=1e-4)
    for number in (1, 4):
        alone = module.sample(TARGETS[number : number + 1], NUMBERS[number : number + 1])
        torch.testing.assert_close(alone, together[number : number + 1], rtol=0, atol=1e-4)


def test_the_noise_of_an_image_follows_the_seed_of_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = model().sample(TARGETS, NUMBERS), model(seed=1).sample(TARGETS, NUMBERS)
    assert not torch.isclose(first, other).all(3).all(2).all(1).any()
    monkeypatch.setenv("PL_GLOBAL_SEED", "8")  # not that of the run: all models draw from the same noise
    assert torch.equal(model().sample(TARGETS, NUMBERS), first)


def noise_by_hand(seed: int = 0) -> tuple[Tensor, list[torch.Generator]]:
    pairs = zip(TARGETS.tolist(), NUMBERS.tolist(), strict=True)
    own = [torch.Generator().manual_seed((seed * 1_000_003 + target) * 1_000_003 + number) for target, number in pairs]
    return torch.stack([torch.randn(1, 4, 4, generator=generator) for generator in own]), own


@torch.no_grad()
def plain_loop(network: Any, scheduler: Any, guidance: float, steps: int, seed: int = 0) -> Tensor:
    """As the examples of diffusers write it."""
    images, own = noise_by_hand(seed)
    scheduler.set_timesteps(steps)
    images = images * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        ready = scheduler.scale_model_input(images, timestep)
        if guidance == 1:
            prediction = network(ready, timestep, class_labels=TARGETS).sample
        else:
            labels = torch.cat([TARGETS, torch.full((5,), NULL)])
            toward, without = network(torch.cat([ready, ready]), timestep, class_labels=labels).sample.chunk(2)
            prediction = without + guidance * (toward - without)
        more = {} if isinstance(scheduler, UniPCMultistepScheduler) else {"generator": own}
        if isinstance(scheduler, DDIMScheduler):
            more = {"eta": 0.0}
        images = scheduler.step(prediction, timestep, images, **more).prev_sample
    return (images / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler])
@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_images_are_those_of_a_plain_loop_of_diffusers(predicts: str, kind: Any, guidance: float) -> None:
    schedule = {"num_train_timesteps": STEPS, "beta_schedule": "squaredcos_cap_v2", "prediction_type": predicts}
    module = model(kind(), noise=DDPMScheduler(**schedule), guidance=guidance, seed=3)
    expected = plain_loop(module.network, kind(**schedule), guidance, 6, seed=3)
    assert torch.equal(module.sample(TARGETS, NUMBERS), expected)


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler])
def test_images_of_schedulers_that_scale_are_those_of_a_plain_loop(kind: Any) -> None:
    module = model(kind(), guidance=2.0)
    expected = plain_loop(module.network, kind(num_train_timesteps=STEPS), 2.0, 6)
    assert torch.equal(module.sample(TARGETS, NUMBERS), expected)


@pytest.mark.parametrize("kind", [lambda: None, DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler])
def test_a_bare_scheduler_takes_over_the_settings_of_the_training(kind: Any) -> None:
    schedule = {"num_train_timesteps": 30, "beta_start": 0.001, "beta_end": 0.3, "beta_schedule": "scaled_linear"}
    process = DDPMScheduler(**schedule, clip_sample=False, prediction_type="v_prediction")
    given = kind()
    fitted = sampler(given, process)
    assert type(fitted) is (DDIMScheduler if given is None else kind)
    assert {name: fitted.config[name] for name in schedule} == schedule
    assert fitted.config.prediction_type == "v_prediction"
    assert torch.equal(fitted.alphas_cumprod, process.alphas_cumprod)
    if "clip_sample" in dict(fitted.config):
        assert fitted.config.clip_sample is False


def test_a_scheduler_keeps_settings_of_its_own() -> None:
    process = noise_schedule(clip_sample=False)
    own = DPMSolverMultistepScheduler(solver_order=3, algorithm_type="sde-dpmsolver++", use_karras_sigmas=True)
    fitted = sampler(own, process)
    assert (fitted.config.solver_order, fitted.config.algorithm_type, fitted.config.use_karras_sigmas) == (
        3,
        "sde-dpmsolver++",
        True,
    )
    assert sampler(DDIMScheduler(clip_sample_range=2.0), process).config.clip_sample_range == 2.0


def test_trained_betas_are_taken_over() -> None:
    betas = [0.1, 0.2, 0.3]
    process = training_process(DDPMScheduler(num_train_timesteps=3, trained_betas=betas))
    torch.testing.assert_close(process.alphas_cumprod, torch.tensor([0.9, 0.72, 0.504]))
    torch.testing.assert_close(sampler(None, process).alphas_cumprod, torch.tensor([0.9, 0.72, 0.504]))


@pytest.mark.parametrize(
    "kind", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler, DDPMScheduler]
)
def test_any_scheduler_with_a_variance_schedule_trains(kind: Any) -> None:
    given = kind(num_train_timesteps=STEPS, beta_schedule="scaled_linear", beta_end=0.05, prediction_type="v_prediction")
    process = training_process(given)
    assert type(process) is DDPMScheduler
    assert process.config.prediction_type == "v_prediction"
    torch.testing.assert_close(process.alphas_cumprod, given.alphas_cumprod)


@pytest.mark.parametrize(
    "given",
    [
        lambda: DDIMScheduler(beta_end=0.5),
        lambda: DDIMScheduler(num_train_timesteps=STEPS + 1),
        lambda: DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        lambda: DPMSolverMultistepScheduler(prediction_type="v_prediction"),
        lambda: EulerDiscreteScheduler(trained_betas=[0.1] * STEPS),
    ],
)
def test_a_scheduler_of_another_schedule_is_refused(given: Any) -> None:
    with pytest.raises(
        ValueError, match=r"its noise schedule or prediction type is not that of the training\. Leave its betas"
    ):
        model(given())


def test_a_scheduler_that_says_the_same_is_not_refused() -> None:
    given = DDIMScheduler(num_train_timesteps=STEPS, beta_start=0.0001, beta_end=0.02)
    assert torch.equal(model(given).sample(TARGETS, NUMBERS), model().sample(TARGETS, NUMBERS))


def test_flow_matching_is_refused() -> None:
    with pytest.raises(
        ValueError, match="FlowMatchEulerDiscreteScheduler does not fit: it samples from another kind of process"
    ):
        model(FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler does not fit: it has no variance schedule"):
        model(noise=FlowMatchEulerDiscreteScheduler())


def test_a_network_that_predicts_the_image_is_refused() -> None:
    with pytest.raises(ValueError, match="prediction_type must be epsilon or v_prediction, got sample"):
        model(noise=noise_schedule(prediction_type="sample"))


@pytest.mark.parametrize("given", ["ddim", DDIMScheduler])
def test_what_is_no_scheduler_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        model(given)


@pytest.mark.parametrize("steps", [0, -1])
def test_steps_must_be_positive(steps: int) -> None:
    with pytest.raises(ValueError, match=rf"^steps must be positive, got {steps}\.$"):
        Sampling(steps=steps)


def test_one_step_is_enough() -> None:
    assert torch.isfinite(model(steps=1).sample(TARGETS, NUMBERS)).all()


def test_sampling_leaves_gradients_and_random_numbers_alone() -> None:
    module = model(EulerAncestralDiscreteScheduler())
    before = torch.get_rng_state()
    images = module.sample(TARGETS, NUMBERS)
    assert not images.requires_grad
    assert torch.equal(torch.get_rng_state(), before)


def test_partly_sampled_is_on_the_way_of_the_original_model() -> None:
    module = model()
    original = unet(seed=4).eval()
    module._reference = Frozen(original)
    scheduler = DDIMScheduler(num_train_timesteps=STEPS)
    scheduler.set_timesteps(6)
    stops = set()
    for seed in range(8):
        torch.manual_seed(seed)
        with torch.no_grad():
            noisy, timesteps = module.partly_sampled(TARGETS, 3.0, steps=6)
        torch.manual_seed(seed)
        stop = int(torch.randint(6, ()))
        images = torch.randn(5, 1, 4, 4)
        labels = torch.cat([TARGETS, torch.full((5,), NULL)])
        for timestep in scheduler.timesteps[:stop]:
            with torch.no_grad():
                toward, without = original(torch.cat([images, images]), timestep, class_labels=labels).sample.chunk(2)
            images = scheduler.step(without + 3 * (toward - without), timestep, images).prev_sample
        assert torch.equal(noisy, images)
        assert torch.equal(timesteps, (scheduler.timesteps[stop] + torch.randint(STEPS // 6, (5,))).clamp(max=STEPS - 1))
        stops.add(stop)
    assert len(stops) > 2


def test_images_are_drawn_in_the_precision_of_the_network() -> None:
    module = model().to(torch.bfloat16)
    images = module.sample(TARGETS, NUMBERS)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, model().sample(TARGETS, NUMBERS), rtol=0, atol=0.1)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true"])
def test_precision_does_not_change_the_noise_that_images_start_from(
    tmp_path: Path, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer makes its precision the default for new tensors."""
    module, started_from = model(), []
    module.evaluation = GenerationEvaluator(2, [1])

    def run(scheduler: Any, predict: Any, noise: Tensor, own: Any) -> Tensor:
        started_from.append(noise)
        return sampling.run(scheduler, predict, noise, own)

    monkeypatch.setattr(diffusion_module, "run", run)
    trainer(tmp_path, precision=precision).predict(module, datamodule=images())
    own = [torch.Generator().manual_seed(1_000_003 + number) for number in range(2)]
    assert len(started_from) == 1
    assert torch.equal(started_from[0], torch.stack([torch.randn(1, 4, 4, generator=generator) for generator in own]))


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-6), ("64-true", 1e-6), ("bf16-true", 2e-2)])
def test_precision_does_not_change_the_noise_of_the_losses_that_are_reported(
    tmp_path: Path, precision: Any, tolerance: float
) -> None:
    """The network of which the losses are asked predicts zero, so a loss is the mean square of the noise."""
    module, data = diffusion(), images()
    torch.nn.init.zeros_(module.network.conv_out.weight)
    torch.nn.init.zeros_(module.network.conv_out.bias)
    runner = trainer(tmp_path, precision=precision)
    results = runner.test(module, datamodule=data, verbose=False)
    noises = []
    for index in data.forget_indices.tolist():
        generator = torch.Generator().manual_seed(index)
        torch.randint(STEPS, (1,), generator=generator)
        noises.append(torch.randn(1, 4, 4, generator=generator))
    expected = torch.stack(noises).square().mean().item()
    assert results[0]["test/forget/loss"] == pytest.approx(expected, rel=tolerance)
