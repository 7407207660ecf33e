"""The handwritten digits that scikit-learn ships: 1,797 real images, no download."""

from itertools import product
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from salun_lightning.data.datamodule import ForgetRetainDataModule, Sources
from salun_lightning.data.samples import ImageTensors

_WORDS = ("a zero", "a one", "a two", "a three", "a four", "a five", "a six", "a seven", "an eight", "a nine")
_TEMPLATES = ("{}", "{} in ink")
_PAIR = "{} beside {}"


class DigitsDataModule(ForgetRetainDataModule):
    """Handwritten digits of 8 x 8 grey pixels (Alpaydin and Kaynak, UCI 1998), from scikit-learn.

    A fixed fifth of each class is the test set.

    Args:
        **kwargs: See ``ForgetRetainDataModule``.
    """

    @override
    def load(self) -> Sources:
        train, test, names = _digits()
        return Sources(train, test, names)


class DigitPromptsDataModule(ForgetRetainDataModule):
    """The same digits with prompts: one in the middle of 8 x 16 pixels ("a seven"), or two ("a seven beside an eight").

    Half of the prompts end with "in ink", so a digit's word has the same place in both. Each single digit is there once with
    either. Pairs are drawn: two digits and an image of each, of training images alone or of test images alone.

    ``contents`` says which digit a prompt asks for in each of the ``parts`` of the image, and -1 where none is.

    Args:
        pairs: How many pairs are drawn for training; for testing, a fifth as many.
        **kwargs: See ``ForgetRetainDataModule``.

    Raises:
        ValueError: ``pairs`` is negative.
    """

    parts: ClassVar = {"left": (0, 0, 8, 8), "middle": (4, 0, 12, 8), "right": (8, 0, 16, 8)}
    contents = torch.tensor(
        [*((-1, one, -1) for one in range(10)), *((a, -1, b) for a, b in product(range(10), repeat=2))] * len(_TEMPLATES)
    )

    def __init__(self, pairs: int = 6700, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if pairs < 0:
            raise ValueError(f"pairs must not be negative, got {pairs}.")
        self.pairs = pairs

    @override
    def load(self) -> Sources:
        train, test, _ = _digits()
        shown = [*_WORDS, *(_PAIR.format(*two) for two in product(_WORDS, repeat=2))]
        prompts = [template.format(words) for template in _TEMPLATES for words in shown]
        return Sources(_with_pairs(train, self.pairs, 0), _with_pairs(test, self.pairs // 5, 1), prompts)


def _digits() -> tuple[ImageTensors, ImageTensors, list[str]]:
    """Training digits, test digits, and the names of the classes."""
    from sklearn.datasets import load_digits  # takes a second to import

    digits = load_digits()
    images = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8)).unsqueeze(1)
    targets = torch.from_numpy(digits.target)
    test = torch.zeros(len(targets), dtype=torch.bool)
    draw = np.random.RandomState(0)
    for number in range(10):
        members = (targets == number).nonzero().flatten().numpy()
        test[torch.from_numpy(draw.permutation(members)[: len(members) // 5])] = True
    names = digits.target_names.astype(str).tolist()
    return ImageTensors(images[~test], targets[~test]), ImageTensors(images[test], targets[test]), names


def _with_pairs(digits: ImageTensors, pairs: int, seed: int) -> ImageTensors:
    """Each digit in the middle of a canvas of double width, with either template, and pairs side by side."""
    draw = np.random.RandomState(seed)
    middle = torch.nn.functional.pad(digits.images, (4, 4))
    wanted = torch.from_numpy(draw.randint(10, size=(2, pairs)))  # digits first, so that each pair of them is as frequent
    members = [(digits.targets == number).nonzero().flatten() for number in range(10)]
    at = torch.from_numpy(draw.random_sample((2, pairs)))
    places = [
        [int(members[n][int(f * len(members[n]))]) for n, f in zip(*side, strict=True)]
        for side in zip(wanted.tolist(), at.tolist(), strict=True)
    ]
    two = torch.cat([digits.images[places[0]], digits.images[places[1]]], dim=3)
    per_template = len(_WORDS) * (1 + len(_WORDS))
    numbers = len(_WORDS) * (1 + wanted[0]) + wanted[1] + per_template * torch.from_numpy(draw.randint(2, size=pairs))
    singles: list[Tensor] = [digits.targets, digits.targets + per_template]
    return ImageTensors(torch.cat([middle, middle, two]), torch.cat([*singles, numbers]))
