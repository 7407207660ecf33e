"""The digits with prompts: each image shows what its prompt says."""

from collections import Counter

import pytest
import torch

from salun_lightning.data import DigitPromptsDataModule, DigitsDataModule, ForgetConcepts, ForgetRandom

SPOKEN = ["a zero", "a one", "a two", "a three", "a four", "a five", "a six", "a seven", "an eight", "a nine"]


def test_each_image_shows_what_its_prompt_says() -> None:
    plain = DigitsDataModule(forget=ForgetRandom(count=1))
    data = DigitPromptsDataModule(pairs=300, forget=ForgetRandom(count=1))
    plain.setup()
    data.setup()
    for name in ("train", "test"):
        digits, images = (
            (module._train, module._train_targets) if name == "train" else module._sets["test"][:2] for module in (plain, data)
        )
        shown = {number: {image.numpy().tobytes() for image in digits[0].images[digits[1] == number]} for number in range(10)}
        asked = Counter()
        for image, target in zip(images[0].images, images[1].tolist(), strict=True):
            prompt = data.class_names[target].removesuffix(" in ink")
            parts = prompt.split(" beside ")
            asked[len(parts)] += 1
            halves = [image[..., :8], image[..., 8:]] if len(parts) == 2 else [image[..., 4:12]]
            for words, half in zip(parts, halves, strict=True):
                assert half.contiguous().numpy().tobytes() in shown[SPOKEN.index(words)], prompt
            if len(parts) == 1:
                assert not image[..., :4].any()
                assert not image[..., 12:].any()
        assert asked == {1: 2 * len(digits[0]), 2: 300 if name == "train" else 60}


def test_half_of_the_prompts_end_with_in_ink_and_all_digits_are_paired() -> None:
    data = DigitPromptsDataModule(forget=ForgetConcepts({"a seven": "an eight"}))
    data.setup()
    assert len(data.class_names) == len(set(data.class_names)) == 2 * (10 + 100)
    counts = torch.bincount(data._train_targets, minlength=220)
    assert counts.min() > 10
    assert counts[:110].sum().item() == pytest.approx(counts[110:].sum().item(), rel=0.05)
    assert all("seven" in data.class_names[number] for number in data.forgotten_classes)
    assert len(data.forgotten_classes) == 2 * (1 + 19)
    assert data.anchors[data.class_names.index("a seven beside a seven in ink")] == "an eight beside an eight in ink"


def test_the_images_are_the_same_every_time() -> None:
    first, second = (DigitPromptsDataModule(pairs=50, forget=ForgetRandom(count=1)) for _ in range(2))
    first.setup()
    second.setup()
    assert torch.equal(first._train.images, second._train.images)
    assert first.fingerprint == second.fingerprint
    with pytest.raises(ValueError, match="pairs must not be negative"):
        DigitPromptsDataModule(pairs=-1, forget=ForgetRandom(count=1))
