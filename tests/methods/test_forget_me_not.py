"""Forget-Me-Not, against an attention processor that keeps what it looks at."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from salun_lightning.data import ForgetClasses, Samples
from salun_lightning.methods import ForgetMeNot
from salun_lightning.modules.sampling import Sampling
from salun_lightning.modules.text_to_image import TextToImage
from salun_lightning.saliency import SaliencyMasking
from tests.modules.small_runs import same, trainer, weights
from tests.modules.test_text_to_image import Photos, stable_diffusion

NAMED = {1: [2], 2: [5]}  # of "a dog" and "a cat beside a dog", behind the start token


class Keeping(AttnProcessor):  # type: ignore[misc]  # diffusers has few types
    """The plain processor, which keeps the scores of cross-attention."""

    kept: list[Tensor]

    def __call__(self, attn: Any, hidden: Tensor, encoder_hidden_states: Tensor | None = None, *rest: Any, **more: Any) -> Any:
        scores = attn.get_attention_scores

        def keep(*given: Tensor) -> Any:
            found = scores(*given)
            if encoder_hidden_states is not None:
                self.kept.append(found)
            return found

        attn.get_attention_scores = keep
        try:
            return super().__call__(attn, hidden, encoder_hidden_states, *rest, **more)
        finally:
            del attn.get_attention_scores


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def ready(folder: Path, kind: str = "1", **settings: Any) -> tuple[TextToImage, Any]:
    """A module whose method has started, and samples of both forgotten prompts."""
    method = ForgetMeNot()
    module = TextToImage(stable_diffusion(kind), method=method, optimizer=sgd, sampling=Sampling(guidance=3.0), **settings)
    fitted = trainer(folder, max_epochs=1)
    fitted.fit(module, datamodule=Photos())
    draw = torch.Generator().manual_seed(1)
    return module, Samples(torch.rand(4, 3, 16, 16, generator=draw), torch.tensor([1, 2, 2, 1]), torch.arange(4))


def gradients(module: TextToImage, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in module.network.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("kind", ["1", "xl"])
def test_loss_and_gradient_are_those_of_what_the_layers_look_at(kind: str, tmp_path: Path) -> None:
    module, samples = ready(tmp_path, kind)
    torch.manual_seed(0)
    loss = module.method.loss(module, {"forget": samples})
    found = gradients(module, loss)
    keeping = Keeping()
    keeping.kept = []
    module.network.set_attn_processor(keeping)
    torch.manual_seed(0)
    noisy, timesteps, _ = module.noised(samples)
    module.denoise(noisy, timesteps, samples.targets)
    expected = torch.tensor(0.0)
    for scores in keeping.kept:
        per_head = scores.view(4, -1, *scores.shape[1:])
        for row, target in enumerate(samples.targets.tolist()):
            expected = expected + per_head[row][..., NAMED[target]].square().sum() / 4
    assert len(keeping.kept) > 1
    assert expected > 0.1
    torch.testing.assert_close(loss, expected)
    assert found.keys() == dict(module.network.named_parameters()).keys()  # several processes wait for each of them
    wanted = gradients(module, expected)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted.get(name, torch.zeros_like(gradient)), msg=name)


def test_computing_activations_again_changes_nothing(tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        module, samples = ready(tmp_path, gradient_checkpointing=checkpointing)
        module.train()
        torch.manual_seed(0)
        found.append(gradients(module, module.method.loss(module, {"forget": samples})))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_attention_to_the_concept_falls_and_no_hook_is_left(tmp_path: Path) -> None:
    def adam(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=3e-3)

    module, samples = ready(tmp_path)

    def attention() -> float:
        torch.manual_seed(0)
        loss: Tensor = module.method.loss(module, {"forget": samples})
        module.method.on_after_backward(module, module)
        return loss.item()

    before = attention()
    module.make_optimizer = adam
    trainer(tmp_path, max_epochs=10).fit(module, datamodule=Photos())
    assert attention() < 0.7 * before
    assert not any(layer._forward_pre_hooks for layer in module.network.modules())


def test_a_mask_holds(tmp_path: Path) -> None:
    before, masking = weights(stable_diffusion("1").unet), SaliencyMasking(0.5)
    module = TextToImage(stable_diffusion("1"), method=ForgetMeNot(), sampling=Sampling(guidance=3.0))
    trainer(tmp_path, max_epochs=1, callbacks=[masking]).fit(module, datamodule=Photos())
    after = weights(module.network)
    assert masking.mask is not None
    assert all(torch.equal(after[name][~masking.mask[name]], weight[~masking.mask[name]]) for name, weight in before.items())
    assert not same(before, after)


def test_what_it_needs_is_said(tmp_path: Path) -> None:
    data = Photos()
    data.forget = ForgetClasses([1])
    module = TextToImage(stable_diffusion("1"), method=ForgetMeNot())
    with pytest.raises(ValueError, match=r"names no concept, which ForgetMeNot needs\. Give ForgetConcepts"):
        trainer(tmp_path, max_epochs=1).fit(module, datamodule=data)
