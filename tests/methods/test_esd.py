"""ESD: its loss against a few lines of torch."""

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from salun_lightning.methods import ESD
from salun_lightning.modules.sampling import Sampling
from salun_lightning.networks.frozen import Frozen
from tests.modules.small_diffusion import NULL, STEPS, Attached, attached, some_samples, unet

SAMPLES = some_samples(6)
STEPS_OF_SAMPLING = 5


def model(**kwargs: object) -> Attached:
    return attached(**{"sampling": Sampling(steps=STEPS_OF_SAMPLING), **kwargs})


def start(module: Attached, guidance: float) -> tuple[Tensor, Tensor]:
    """A point on the way of the original model, as diffusers goes it."""
    scheduler = DDIMScheduler(num_train_timesteps=STEPS)
    scheduler.set_timesteps(STEPS_OF_SAMPLING)
    stop = int(torch.randint(STEPS_OF_SAMPLING, ()))
    noisy = torch.randn(len(SAMPLES.targets), 1, 4, 4)
    for timestep in scheduler.timesteps[:stop]:
        toward, without = predictions(module, noisy, timestep.expand(6))
        noisy = scheduler.step(without + guidance * (toward - without), timestep, noisy).prev_sample
    return noisy, scheduler.timesteps[stop] + torch.randint(STEPS // STEPS_OF_SAMPLING, (6,))


def predictions(module: Attached, noisy: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Of the original model, for the class and for none."""
    labels = (SAMPLES.targets, torch.full((6,), NULL))
    toward, without = (module.reference(noisy, timesteps, class_labels=label).sample for label in labels)
    return toward, without


@pytest.mark.parametrize(("strength", "guidance"), [(1.0, 3.0), (2.5, 1.0)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_loss_and_gradient_are_those_of_the_reference(strength: float, guidance: float, seed: int) -> None:
    module = model().train()
    torch.manual_seed(seed)
    loss = ESD(strength, guidance, STEPS_OF_SAMPLING).loss(module, {"forget": SAMPLES})
    torch.manual_seed(seed)
    with torch.no_grad():
        noisy, timesteps = start(module, guidance)
        toward, without = predictions(module, noisy, timesteps)
    prediction = module.network(noisy, timesteps, class_labels=SAMPLES.targets).sample
    expected = (prediction - (without - strength * (toward - without))).square().mean()
    torch.testing.assert_close(loss, expected)
    # the same with the strength that the authors' later code takes, greater by 1, counted from the prediction for the class
    later = (prediction - (toward - (strength + 1) * (toward - without))).square().mean()
    torch.testing.assert_close(loss, later)
    weights = list(module.network.parameters())
    torch.testing.assert_close(torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights))
    assert all(weight.grad is None for weight in module.reference.parameters())


def test_a_strength_of_zero_aims_at_the_prediction_without_a_class() -> None:
    """A model that answers for every class as for none has nothing left to learn."""
    same = unet()
    with torch.no_grad():
        same.class_embedding.weight[:] = same.class_embedding.weight[NULL].clone()
    module = model(network=same)
    module._reference = Frozen(same)
    assert ESD(strength=0.0).loss(module, {"forget": SAMPLES}) == 0


def test_the_images_of_the_forget_set_are_not_looked_at() -> None:
    module, losses = model(), []
    for inputs in (SAMPLES.inputs, torch.full_like(SAMPLES.inputs, float("nan"))):
        torch.manual_seed(1)
        losses.append(ESD().loss(module, {"forget": SAMPLES._replace(inputs=inputs)}))
    assert losses[0] == losses[1]


def test_labels_are_never_dropped() -> None:
    module, labels = model(label_dropout=1.0).train(), []
    module.network.register_forward_pre_hook(lambda *call: labels.append(call[2]["class_labels"]), with_kwargs=True)
    ESD().loss(module, {"forget": SAMPLES})
    assert [label.tolist() for label in labels] == [SAMPLES.targets.tolist()]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_model_without_a_null_class(guidance: float) -> None:
    module = model(network=unet(num_class_embeds=3), null_class=None)
    with pytest.raises(ValueError, match="needs a null class, and the model has none: give null_class"):
        ESD(start_guidance=guidance).loss(module, {"forget": SAMPLES})


@pytest.mark.parametrize("strength", [-0.1, float("nan")])
def test_strength_out_of_range(strength: float) -> None:
    with pytest.raises(ValueError, match=rf"^strength must not be negative, got {strength}\.$"):
        ESD(strength)


def test_a_part_that_the_order_does_not_bring() -> None:
    with pytest.raises(ValueError, match=r"ESD needs the part 'forget' in each batch.*order 'forget'"):
        ESD().loss(model(), {"retain": SAMPLES})


def test_it_steers_away_from_the_conditions_that_are_named() -> None:
    """As if all images of the forget set were of these."""
    module = model(forgotten=(0, 1))
    torch.manual_seed(3)
    loss = ESD(conditions=["1"]).loss(module, {"forget": SAMPLES})
    torch.manual_seed(3)
    torch.randint(1, (6,))  # which of one
    assert loss == ESD().loss(module, {"forget": SAMPLES._replace(targets=torch.ones(6, dtype=torch.int64))})
    torch.manual_seed(3)
    both = ESD(conditions=[0, 1]).loss(module, {"forget": SAMPLES})
    torch.manual_seed(3)
    assert both == ESD().loss(module, {"forget": SAMPLES._replace(targets=torch.randint(2, (6,)))})


@pytest.mark.parametrize(
    ("conditions", "said"),
    [
        ("nine", r"^There is no class 'nine'\. The classes are: "),
        ([0, "2"], r"^ESD is to steer away from '2', which is not to be"),
    ],
)
def test_conditions_that_are_not_there_or_not_forgotten(conditions: list[int | str] | str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ESD(conditions=conditions).on_fit_start(None, model(forgotten=(0, 1)))  # type: ignore[arg-type]
