"""UCE, against the least-squares problem that it solves."""

from pathlib import Path
from typing import Any

import pytest
import torch

from salun_lightning.data import ForgetClasses
from salun_lightning.methods import UCE, SelectiveAmnesia
from salun_lightning.modules.sampling import Sampling
from salun_lightning.modules.text_to_image import TextToImage
from salun_lightning.saliency import SaliencyMask, SaliencyMasking
from tests.modules.small_runs import trainer, weights
from tests.modules.test_text_to_image import PROMPTS, Photos, stable_diffusion

ONE_STEP = {"max_epochs": -1, "max_steps": 1}


def edited(folder: Path, method: UCE, *callbacks: Any, data: Any = None, **settings: Any) -> TextToImage:
    def plain(weights: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(weights, lr=1.0)

    module = TextToImage(stable_diffusion("1"), method=method, optimizer=plain, sampling=Sampling(guidance=3.0), **settings)
    trainer(folder, callbacks=[*callbacks], **ONE_STEP).fit(module, datamodule=data or Photos())
    return module


def test_it_is_the_solution_of_the_least_squares_problem(tmp_path: Path) -> None:
    """Photos forgets "dog" for "cat": of "a cat", "a dog" and "a cat beside a dog" the last two go, for two other prompts."""
    before = weights(stable_diffusion("1").unet)
    module = edited(tmp_path, UCE(erase=2.0, preserve=0.5, ridge=0.25))
    pipeline = module.pipeline
    said = {
        prompt: pipeline.encode_prompt(prompt, torch.device("cpu"), 1, False)[0][0].double().detach()
        for prompt in ("a cat", "a dog", "a cat beside a dog", "a cat beside a cat", "")
    }
    concepts = [said["a dog"][2], said["a cat beside a dog"][5]]  # behind the start token
    anchors = [said["a cat"][2], said["a cat beside a cat"][5]]
    kept = [*said["a cat"][:4], *said[""][:2]]  # with start and end
    changed = 0
    for name, weight in weights(module.network).items():
        if not name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            assert torch.equal(weight, before[name]), name
            continue
        old = before[name].double()
        rows, wanted = [], []
        for factor, inputs, outputs in (
            (2.0, concepts, anchors),
            (0.5, kept, kept),
            (0.25, torch.eye(16).double(), torch.eye(16).double()),
        ):
            for given, answer in zip(inputs, outputs, strict=True):
                rows.append(factor**0.5 * given)
                wanted.append(factor**0.5 * (old @ answer))
        expected = torch.linalg.lstsq(torch.stack(rows), torch.stack(wanted)).solution.T
        torch.testing.assert_close(weight.double(), expected, atol=1e-5, rtol=0)
        changed += 1
    assert changed > 4


def test_without_a_ridge_a_concept_is_read_as_its_anchor(tmp_path: Path) -> None:
    module = edited(tmp_path, UCE(preserve=0.0, ridge=1e-9))
    old, tokens = weights(stable_diffusion("1").unet), module.embedded.tokens
    for name, weight in weights(module.network).items():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            torch.testing.assert_close(tokens[1, 2] @ weight.T, tokens[0, 2] @ old[name].T, atol=1e-4, rtol=0)


def test_a_mask_holds(tmp_path: Path) -> None:
    original = stable_diffusion("1").unet
    mask = SaliencyMask({name: (torch.arange(w.numel()) % 2 == 0).view_as(w) for name, w in original.named_parameters()})
    whole, masked = edited(tmp_path, UCE()), edited(tmp_path, UCE(), SaliencyMasking(mask=mask))
    for name, before in original.named_parameters():
        allowed = mask[name]
        weight = weights(masked.network)[name]
        assert torch.equal(weight[~allowed], before[~allowed])
        assert torch.equal(weight[allowed], weights(whole.network)[name][allowed])


def test_what_it_cannot_edit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none is trained\. Leave trainable and lora unset"):
        edited(tmp_path, UCE(), trainable=r"attn1\.")
    data = Photos()
    data.forget = ForgetClasses([1])
    with pytest.raises(ValueError, match=r"names no anchor, which UCE needs\. Give ForgetConcepts"):
        edited(tmp_path, UCE(), data=data)
    with pytest.raises(ValueError, match="ridge must not be negative"):
        UCE(ridge=-1.0)


class FurtherPhotos(Photos):
    """With two prompts more, without images: one of them names the concept."""

    def load(self) -> Any:
        return super().load()._replace(class_names=[*PROMPTS, "a dog beside", "beside"])


@pytest.mark.parametrize("method", ["uce", "sa"])
def test_prompts_that_are_evaluated_alone_change_nothing(method: str, tmp_path: Path) -> None:
    made = []
    for data in (Photos(), FurtherPhotos()):
        if method == "uce":
            module = edited(tmp_path, UCE(), data=data)
        else:
            amnesia = SelectiveAmnesia(images=2, timesteps=1)
            module = TextToImage(stable_diffusion("1"), method=amnesia, sampling=Sampling(steps=2, guidance=3.0))
            trainer(tmp_path, max_epochs=1).fit(module, datamodule=data)
        made.append(weights(module.network))
    assert made[0].keys() == made[1].keys()
    # more prompts are embedded in one batch, which may round in another way
    assert all(torch.allclose(weight, made[1][name], atol=1e-5) for name, weight in made[0].items())
    assert any((weight - weights(stable_diffusion("1").unet)[name]).abs().max() > 1e-4 for name, weight in made[0].items())


def test_an_anchor_without_words_is_read_as_what_stands_before_it(tmp_path: Path) -> None:
    module = edited(tmp_path, UCE(preserve=0.0, ridge=1e-9), data=Photos({"dog": ""}))
    old, tokens = weights(stable_diffusion("1").unet), module.embedded.tokens
    for name, weight in weights(module.network).items():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            anchored = tokens[4, 1]  # "a", of the prompt "a " behind the empty one
            torch.testing.assert_close(tokens[1, 2] @ weight.T, anchored @ old[name].T, atol=1e-4, rtol=0)
