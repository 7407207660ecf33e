"""Concept Ablation, against a few lines of torch."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from salun_lightning.data import ForgetClasses, Samples
from salun_lightning.methods import ConceptAblation
from salun_lightning.modules.sampling import Sampling
from salun_lightning.modules.text_to_image import TextToImage
from salun_lightning.saliency import SaliencyMasking
from tests.modules.small_runs import same, trainer, weights
from tests.modules.test_text_to_image import Photos, stable_diffusion

FORGET = Samples(torch.zeros(4, 3, 16, 16), torch.tensor([1, 2, 2, 1]), torch.arange(4))  # its images are not looked at
PLACES = {1: 0, 2: 4}  # "a dog" becomes "a cat"; "a cat beside a dog" becomes the first further prompt, behind the empty one


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


def trained(folder: Path, method: ConceptAblation, epochs: int = 1, callbacks: Any = (), **settings: Any) -> TextToImage:
    sampling = Sampling(steps=2, guidance=3.0)
    module = TextToImage(stable_diffusion("1"), method=method, optimizer=adam, sampling=sampling, **settings)
    trainer(folder, max_epochs=epochs, callbacks=[*callbacks]).fit(module, datamodule=Photos())
    return module


def original_again(module: TextToImage) -> TextToImage:
    """The module with the original model beside it, as while it is trained."""
    module._reference = type(module.vae)(stable_diffusion("1").unet)
    return module


@pytest.mark.parametrize("goal", ["model", "noise"])
@pytest.mark.parametrize("prior_weight", [0.0, 0.3])
def test_the_loss_is_that_of_a_few_lines(goal: Literal["model", "noise"], prior_weight: float, tmp_path: Path) -> None:
    module = trained(tmp_path, ConceptAblation(goal, prior_weight, images=1))
    anchors = torch.tensor([PLACES[target] for target in FORGET.targets.tolist()])
    drawn = original_again(module).sample(torch.tensor([0, 4]), torch.tensor([0, 1]), original=True)
    images = drawn[(anchors == 4).long()]
    torch.manual_seed(5)
    loss = module.method.loss(module, {"forget": FORGET})
    torch.manual_seed(5)
    torch.randint(1, (4,))  # which of the images: there is one
    timesteps = torch.randint(1000, (2,))
    timesteps = torch.cat([timesteps, 999 - timesteps])
    noise = torch.randn(4, 4, 8, 8)
    kept = module.process.alphas_cumprod[timesteps].view(4, 1, 1, 1)
    noisy = kept.sqrt() * module.encode(images) + (1 - kept).sqrt() * noise

    def said(conditions: Tensor) -> Tensor:
        prompts = module.embedded.tokens[conditions]
        prediction: Tensor = module.network(noisy, timesteps, encoder_hidden_states=prompts).sample
        return prediction

    wanted = said(anchors).detach() if goal == "model" else noise
    expected = (said(FORGET.targets) - wanted).square().mean() + prior_weight * (said(anchors) - noise).square().mean()
    torch.testing.assert_close(loss, expected)


def test_the_gradient_does_not_reach_the_goal(tmp_path: Path) -> None:
    """Where concept and anchor are the same prompt, the model's goal is its own answer: nothing pulls."""
    module = trained(tmp_path, ConceptAblation(prior_weight=0.0, images=1))
    module._anchors = torch.tensor([0, 1, 2, 3])
    module.method._anchors = torch.arange(4)
    module.method._drawn = Samples(torch.rand(4, 3, 16, 16), torch.arange(4), torch.arange(4))
    module.zero_grad()
    loss = module.method.loss(module, {"forget": FORGET})
    loss.backward()
    assert loss == 0
    assert module.network.conv_in.weight.grad is not None
    assert not any(weight.grad is not None and weight.grad.any() for weight in module.network.parameters())


def test_the_concept_comes_to_mean_the_anchor_on_images_of_it(tmp_path: Path) -> None:
    def apart(module: TextToImage) -> float:
        draw = torch.Generator().manual_seed(0)
        noisy, timesteps = torch.randn(16, 4, 8, 8, generator=draw), torch.full((16,), 500)
        concept, anchor = (module.denoise(noisy, timesteps, torch.full((16,), number)) for number in (1, 0))
        return (concept - anchor).square().mean().item()

    first = trained(tmp_path, ConceptAblation(images=2), epochs=1)
    later = trained(tmp_path, ConceptAblation(images=2), epochs=30)
    assert apart(later) < 0.5 * apart(first)


def test_a_mask_holds_and_keys_and_values_alone_can_be_trained(tmp_path: Path) -> None:
    before, masking = weights(stable_diffusion("1").unet), SaliencyMasking(0.5)
    module = trained(tmp_path, ConceptAblation(images=1), callbacks=[masking], trainable="xattn-strict")
    after = weights(module.network)
    assert masking.mask is not None
    assert set(masking.mask) == {name for name in before if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    for name, weight in before.items():
        held = ~masking.mask[name] if name in masking.mask else torch.ones_like(weight, dtype=torch.bool)
        assert torch.equal(after[name][held], weight[held]), name
    assert not same(before, after)


def test_what_it_cannot_do_is_said(tmp_path: Path) -> None:
    data = Photos()
    data.forget = ForgetClasses([1])
    module = TextToImage(stable_diffusion("1"), method=ConceptAblation())
    with pytest.raises(ValueError, match=r"names no anchor, which ConceptAblation needs\. Give ForgetConcepts"):
        trainer(tmp_path, max_epochs=1).fit(module, datamodule=data)
    with pytest.raises(ValueError, match="goal must be model or noise, got images"):
        ConceptAblation("images")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="images must be positive, got 0"):
        ConceptAblation(images=0)
    with pytest.raises(ValueError, match="prior_weight must not be negative"):
        ConceptAblation(prior_weight=-1.0)
