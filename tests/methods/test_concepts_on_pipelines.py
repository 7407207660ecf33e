"""Every method that forgets a concept, on each architecture of Stable Diffusion: under a mask, saved, and drawn from."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from salun_lightning.methods import (
    ESD,
    UCE,
    ConceptAblation,
    FineTune,
    ForgetMeNot,
    GradientAscent,
    Method,
    NegGradPlus,
    Remap,
    SelectiveAmnesia,
)
from salun_lightning.modules.sampling import Sampling
from salun_lightning.modules.text_to_image import TextToImage
from salun_lightning.saliency import Patch, SaliencyMasking
from tests.modules.small_diffusion import adamw
from tests.modules.small_runs import same, trainer, weights
from tests.modules.test_text_to_image import NUMBERS, PROMPTS, TARGETS, Photos, drawn, stable_diffusion

METHODS: list[Method] = [
    ConceptAblation(images=2),
    ESD(steps=2),
    FineTune(),
    ForgetMeNot(),
    GradientAscent(),
    NegGradPlus(),
    Remap(to="anchor"),
    SelectiveAmnesia(images=2, timesteps=2),
    UCE(),
]
PIPELINES = [("1", "epsilon"), ("2", "v_prediction"), ("xl", "epsilon")]


@pytest.mark.parametrize(("kind", "prediction"), PIPELINES)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_it_moves_what_the_mask_leaves_free_and_plain_diffusers_draws_the_result(
    method: Method, kind: str, prediction: str, tmp_path: Path
) -> None:
    before, masking = weights(stable_diffusion(kind, prediction).unet), SaliencyMasking(0.5)
    optimizer: Any = partial(torch.optim.SGD, lr=1.0) if isinstance(method, UCE) else adamw
    sampling = Sampling(steps=3, guidance=3.0)
    module = TextToImage(stable_diffusion(kind, prediction), method=method, sampling=sampling, optimizer=optimizer)
    trainer(tmp_path, callbacks=[masking], max_steps=1).fit(module, datamodule=Photos())
    after = weights(module.network)
    assert masking.mask is not None
    for name, allowed in masking.mask.items():
        assert torch.equal(after[name][~allowed], before[name][~allowed])
    moved = {name: int((after[name] != tensor).sum()) for name, tensor in before.items()}
    assert {name for name, count in moved.items() if count} <= masking.mask.keys()
    assert 0 < sum(moved.values()) <= sum(int(allowed.sum()) for allowed in masking.mask.values())
    assert all(tensor.isfinite().all() for tensor in after.values())
    module.save_pretrained(tmp_path / "pipeline")
    expected = drawn(DiffusionPipeline.from_pretrained(tmp_path / "pipeline"), module, PROMPTS)
    torch.testing.assert_close(module.eval().sample(TARGETS, NUMBERS), expected, atol=1e-5, rtol=0)


def test_one_concept_after_the_other(tmp_path: Path) -> None:
    """The second run starts from the pipeline of the first; what both moved lies in the union of their masks."""
    sampling, unets, masks = Sampling(steps=3, guidance=3.0), [weights(stable_diffusion("1").unet)], []
    pipeline: Any = stable_diffusion("1")
    for number, concepts in enumerate([{"dog": "cat"}, {"cat": "dog"}]):
        masking = SaliencyMasking(0.3)
        module = TextToImage(pipeline, method=Remap(to="anchor"), sampling=sampling, optimizer=adamw)
        trainer(tmp_path, callbacks=[masking], max_epochs=1).fit(module, datamodule=Photos(concepts))
        pipeline = str(tmp_path / str(number))
        module.save_pretrained(pipeline)
        unets.append(weights(DiffusionPipeline.from_pretrained(pipeline).unet))
        assert masking.mask is not None
        masks.append(masking.mask)
    union = masks[0] | masks[1]
    assert union.num_kept > max(mask.num_kept for mask in masks)
    for name, tensor in unets[0].items():
        assert torch.equal(unets[2][name][~union[name]], tensor[~union[name]])
    both = Patch.between(unets[0], unets[1]).then(Patch.between(unets[1], unets[2]))
    unet = stable_diffusion("1").unet
    both.apply(unet)
    assert same(weights(unet), unets[2])
