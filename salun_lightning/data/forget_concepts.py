"""A forget request for concepts: what prompts name, and what is to stand in its place."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor
from typing_extensions import override

from salun_lightning.data.forget import ForgetRequest, of_classes


class Place(NamedTuple):
    """Where a prompt names a concept, in characters: from ``start`` up to ``end``; its anchor goes up to ``anchor_end``."""

    start: int
    end: int
    anchor_end: int


class ForgetConcepts(ForgetRequest):
    """Forget every training image whose prompt names a concept. The prompts are the classes.

    Args:
        concepts: Each concept, and the anchor that stands in its place: in a prompt, every occurrence of the concept as whole
            words is replaced by the anchor. With ``{"church": "field"}``, "a church by a river" becomes "a field by a river".

    Raises:
        ValueError: No concept is named, an anchor is the concept itself or contains one of them, or no prompt names a concept.

    Example:
        >>> prompts = ["a seven", "an eight", "a seven beside a three"]
        >>> ForgetConcepts({"seven": "nine"}).anchors(prompts)
        {0: 'a nine', 2: 'a nine beside a three'}
    """

    def __init__(self, concepts: dict[str, str]) -> None:
        self.concepts = {concept.strip(): anchor for concept, anchor in concepts.items()}
        if not all(self.concepts) or not self.concepts:
            raise ValueError("No concept is named. Give some with their anchors, such as {church: field}.")
        if len({concept.casefold() for concept in self.concepts}) < len(concepts):
            raise ValueError(f"A concept is named twice: {', '.join(concepts)}. Give it once, with one anchor.")
        for concept, anchor in self.concepts.items():
            for other in named(anchor, self.concepts):
                raise ValueError(
                    f"The anchor '{anchor}' of '{concept}' names '{other}', which is to be forgotten. Give another."
                )

    @override
    def classes(self, class_names: Sequence[str]) -> list[int]:
        for concept in self.concepts:
            if not any(mentions(prompt, concept) for prompt in class_names):
                raise ValueError(
                    f"No prompt names the concept '{concept}'. The prompts are {', '.join(class_names[:5])}"
                    + (f" and {len(class_names) - 5} more." if len(class_names) > 5 else ".")
                )
        return [n for n, prompt in enumerate(class_names) if any(mentions(prompt, concept) for concept in self.concepts)]

    @override
    def anchors(self, class_names: Sequence[str]) -> dict[int, str]:
        anchors = {number: self.replaced(class_names[number])[0] for number in self.classes(class_names)}
        for number, anchor in anchors.items():
            for concept in named(anchor, self.concepts):
                raise ValueError(
                    f"With anchors '{class_names[number]}' becomes '{anchor}', which names '{concept}'. Give other anchors."
                )
        return anchors

    def replaced(self, prompt: str) -> tuple[str, list[Place]]:
        """A prompt with anchors in the place of its concepts, and where these are."""
        longest_first = sorted(self.concepts, key=len, reverse=True)
        pattern = "|".join(f"({_whole_words(concept)})" for concept in longest_first)
        made, done, places = "", 0, []
        for found in re.finditer(pattern, prompt, flags=re.IGNORECASE):
            made += prompt[done : found.start()] + self.concepts[longest_first[(found.lastindex or 0) - 1]]
            done = found.end()
            places.append(Place(found.start(), done, len(made)))
        return made + prompt[done:], places

    @override
    def indices(self, targets: Tensor, class_names: Sequence[str], trained: Tensor) -> Tensor:
        return of_classes(self.classes(class_names), targets, trained)


def _whole_words(phrase: str) -> str:
    return rf"(?<!\w){re.escape(phrase)}(?!\w)"


def mentions(prompt: str, words: str) -> bool:
    """Whether a prompt has these words, as whole words and whatever their case."""
    return re.search(_whole_words(words), prompt, flags=re.IGNORECASE) is not None


def named(prompt: str, words: Iterable[str]) -> list[str]:
    """Which of these words a prompt has, where they are not part of longer ones among them, such as "church organ"."""
    found = []
    for word in sorted(words, key=len, reverse=True):
        if mentions(prompt, word):
            found.append(word)
            prompt = re.sub(_whole_words(word), "", prompt, flags=re.IGNORECASE)
    return found
