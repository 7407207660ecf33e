"""The CLIP score of what a model draws, against cosines of embeddings."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from salun_lightning.callbacks import ClipScore, GenerationEvaluator
from salun_lightning.modules.sampling import Sampling
from salun_lightning.modules.text_to_image import TextToImage
from salun_lightning.networks import SmallResNet
from salun_lightning.networks.text_to_image import small_text_to_image
from tests.modules.small_runs import trainer
from tests.modules.test_text_to_image import WORDS, digits


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of CLIP with random weights that tells images apart, as transformers saves it."""
    torch.manual_seed(0)
    folder, tokenizer = tmp_path_factory.mktemp("clip"), small_text_to_image(WORDS).tokenizer
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 1}
    text = {**small, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    config = CLIPConfig(text_config=text, vision_config={**small, "image_size": 16, "patch_size": 8}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    size = {"shortest_edge": 16}
    CLIPProcessor(CLIPImageProcessor(size=size, crop_size={"height": 16, "width": 16}), tokenizer).save_pretrained(folder)
    return folder


def cosine(clip: Path, image: torch.Tensor, prompt: str) -> float:
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    with torch.no_grad():
        seen = model.get_image_features(processor(images=image, return_tensors="pt").pixel_values).pooler_output
        read = model.get_text_features(**processor.tokenizer(prompt, return_tensors="pt")).pooler_output
    return functional.cosine_similarity(seen, read).item()


def test_scores_are_cosines_of_embeddings(clip: Path) -> None:
    callback = ClipScore(str(clip))
    images = torch.randint(0, 256, (5, 3, 16, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    prompts = ["a seven in ink", "a seven beside a three", "an eight", "a one", "a zero"]
    callback.on_predict_start(trainer(clip), TextToImage(small_text_to_image(WORDS)))
    expected = [100 * max(cosine(clip, image, prompt), 0) for image, prompt in zip(images, prompts, strict=True)]
    assert callback.scores(images, prompts).tolist() == pytest.approx(expected, abs=1e-3)
    assert 0.0 in expected  # one whose cosine is negative
    assert max(expected) > 1
    grey = images[:1, :1]
    assert torch.equal(callback.scores(grey, prompts[:1]), callback.scores(grey.repeat(1, 3, 1, 1), prompts[:1]))


def test_what_is_forgotten_is_counted_apart(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[tuple[str, float]] = []
    scores = ClipScore.scores

    def noted(self: ClipScore, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        found = scores(self, images, prompts)
        scored.extend(zip(prompts, found.tolist(), strict=True))
        return found

    monkeypatch.setattr(ClipScore, "scores", noted)
    judge = SmallResNet(10, in_channels=1, width=4, stages=1)
    asked = GenerationEvaluator(2, ["a seven", "a three", "a one beside a seven"], judge, features="classifier")
    module = TextToImage(small_text_to_image(WORDS), sampling=Sampling(steps=1), evaluation=asked)
    run = trainer(tmp_path, callbacks=[ClipScore(str(clip))])
    run.predict(module, datamodule=digits(), return_predictions=False)
    found: dict[str, Any] = json.loads((tmp_path / "clip_score.json").read_text())
    of_seven = [score for prompt, score in scored if "seven" in prompt]
    others = [score for prompt, score in scored if "seven" not in prompt]
    assert (len(of_seven), len(others)) == (4, 2)
    assert found["model"] == str(clip)
    assert found["forgotten"] == {"images": 4, "clip_score": pytest.approx(sum(of_seven) / 4, rel=1e-5)}
    assert found["others"] == {"images": 2, "clip_score": pytest.approx(sum(others) / 2, rel=1e-5)}


def test_what_is_no_clip_is_refused(tmp_path: Path) -> None:
    callback = ClipScore(str(tmp_path))
    with pytest.raises(ValueError, match=r"cannot be read as a model of CLIP: .*\. Give a directory"):
        callback.on_predict_start(trainer(tmp_path), TextToImage(small_text_to_image(WORDS)))
