"""The figures of forgetting, each a pure function of what models say of the samples."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from salun_lightning.evidence.predictions import PredictedSet, Predictions


def figures(predictions: Predictions) -> dict[str, float]:
    """All figures of one classifier whose sets are there, by the names that ``test`` logs.

    - ``UA``: unlearning accuracy, 100 - accuracy on the forget set
    - ``RA``: accuracy on the retain set
    - ``TA``: accuracy on the test set
    - ``MIA``: see :func:`membership_inference`

    in percent, and the accuracy on every set, such as ``test/val/acc``, as a fraction.
    """
    sets = predictions.sets
    accuracies = {name: accuracy(part) for name, part in sets.items() if not name.startswith("generated")}
    percent = {name: 100 * value for name, value in accuracies.items()}
    found = {figure: percent[name] for figure, name in (("RA", "retain"), ("TA", "test")) if name in percent}
    if "forget" in percent:
        found["UA"] = 100 - percent["forget"]
    if {"retain", "test", "forget"} <= sets.keys():
        found["MIA"] = 100 * torch.tensor(membership_inference(sets["retain"], sets["test"], sets["forget"]))
    return {name: value.item() for name, value in found.items()} | {
        f"test/{name}/acc": value.item() for name, value in accuracies.items()
    }


def accuracy(part: PredictedSet) -> Tensor:
    """The fraction of a set that is right, a float32 scalar; a sample whose logits are not finite counts as wrong."""
    return right(part.probabilities, part.targets).float().mean()


def right(scores: Tensor, targets: Tensor) -> Tensor:
    """Which samples are right by logits or probabilities, bool of shape (N,). NaN is not: argmax would call it class 0."""
    return (scores.argmax(1) == targets) & ~scores.isnan().any(1)


def membership_inference(retain: PredictedSet, test: PredictedSet, forget: PredictedSet) -> float:
    """MIA-efficacy: the fraction of the forget set that an attacker takes for data the model never saw.

    The attack of SalUn (Fan et al., ICLR 2024) and of Jia et al. (NeurIPS 2023): a support vector machine (RBF kernel,
    C = 3, gamma = 1 / number of features) learns from one feature, the probability of the true class, to tell members (retained
    training images) from non-members (test images), both by the unlearned model; it is then asked about the forget set. The
    target is the retrained model's value, not 1.

    There are as many members as non-members: of the larger set, samples are taken evenly over it. (The released code takes the
    first members, which in a data set sorted by class are of a few classes only, and all non-members. Where these are many
    more, its attacker says non-member to everything.)

    Args:
        retain: What the model says of retained training images.
        test: What it says of test images.
        forget: What it says of the images it was to forget.

    Returns:
        A fraction between 0 and 1; NaN if a confidence is NaN.

    Raises:
        ValueError: A set is empty.

    Example:
        >>> def said(confidence: float) -> PredictedSet:
        ...     logits = torch.tensor([confidence, 1 - confidence]).log().repeat(50, 1)
        ...     return PredictedSet(logits, torch.zeros(50), torch.arange(50))
        >>> membership_inference(said(0.99), said(0.6), said(0.61))
        1.0
    """
    from sklearn.svm import SVC  # takes a second to import

    for name, part in (("retain", retain), ("test", test), ("forget", forget)):
        if not len(part):
            raise ValueError(f"Membership inference needs samples of the set '{name}', which is empty.")
    member, nonmember, asked = (part.confidences.numpy() for part in (retain, test, forget))
    count = min(len(member), len(nonmember))
    member, nonmember = (part[np.linspace(0, len(part) - 1, count).round().astype(np.int64)] for part in (member, nonmember))
    features = np.concatenate([member, nonmember])[:, None]
    if np.isnan(features).any() or np.isnan(asked).any():  # of a model that diverged
        return math.nan
    attacker = SVC(C=3, kernel="rbf", gamma="auto")
    attacker.fit(features, np.repeat([1, 0], count))
    return float((attacker.predict(asked[:, None]) == 0).mean())


def recognition(generated: PredictedSet, forgotten_classes: Sequence[int], class_names: Sequence[str]) -> dict[str, float]:
    """What a classifier says of the images that a diffusion model made.

    - ``UA``: 100 minus its accuracy on images of the forgotten classes, in percent (Heng and Soh, NeurIPS 2023)
    - ``entropy``: its mean entropy on those images, in nats: high for noise, low for images of another class
    - ``acc``: its accuracy on images of the other classes, and ``acc/<class>`` for every class, in percent

    Args:
        generated: Its logits; the targets are the classes that were asked for.
        forgotten_classes: Which of them are forgotten.
        class_names: The names of all classes.
    """
    logits, targets = generated.logits, generated.targets
    found = right(logits, targets)
    gone = torch.isin(targets, torch.tensor(forgotten_classes, dtype=torch.int64))
    results: dict[str, Tensor] = {}
    if gone.any():
        results["UA"] = 100 - 100 * found[gone].double().mean()
        results["entropy"] = torch.special.entr(logits[gone].double().softmax(1)).sum(1).mean()
    if not gone.all():
        results["acc"] = 100 * found[~gone].double().mean()
    for number in targets.unique().tolist():
        results[f"acc/{class_names[number]}"] = 100 * found[targets == number].double().mean()
    return {name: value.float().item() for name, value in results.items()}


def judged(predictions: Predictions, forgotten: Sequence[int], class_names: Sequence[str]) -> dict[str, float]:
    """What a classifier says of generated images, if it was asked: see :func:`recognition` and :func:`composition`.

    Args:
        predictions: What it says.
        forgotten: The conditions that are forgotten.
        class_names: The names of all conditions.
    """
    whole = predictions.sets.get("generated")
    parts = {name: part for name, part in predictions.sets.items() if name.startswith("generated/")}
    return {
        **({} if whole is None else recognition(whole, forgotten, class_names)),
        **(composition(parts, forgotten, len(class_names)) if parts else {}),
    }


def composition(parts: Mapping[str, PredictedSet], forgotten: Sequence[int], conditions: int) -> dict[str, float]:
    """What a classifier says of the parts of images that were asked for by prompts of one or several things, in percent.

    A concept is what stands in forgotten prompts alone.

    - ``UA``: 100 minus its accuracy where a forgotten prompt asks for the concept by itself
    - ``acc``: its accuracy where another prompt asks for one thing
    - ``inside``: how often the concept is seen where a forgotten prompt asks for it beside something else
    - ``other``: how often that something else is seen
    - ``pairs``: how often all is seen that another prompt asks for, of those that ask for several things

    Args:
        parts: By part of the image, its logits; the targets are what was asked for there, and the indices number the images:
            number x ``conditions`` + condition.
        forgotten: The conditions that are forgotten.
        conditions: How many conditions there are.
    """
    found, targets, images = (
        torch.cat([of(part) for part in parts.values()])
        for of in (lambda part: right(part.logits, part.targets), lambda part: part.targets, lambda part: part.indices)
    )
    gone = torch.isin(images % conditions, torch.tensor(forgotten, dtype=torch.int64))
    concept = gone & ~torch.isin(targets, targets[~gone])
    numbers, counts = images.unique(return_inverse=True, return_counts=True)[1:]
    alone = counts[numbers] == 1
    whole = torch.ones(len(counts), dtype=torch.bool).index_put((numbers[~found],), torch.tensor(False))[numbers]
    rates = {
        "UA": (~found, concept & alone),
        "acc": (found, ~gone & alone),
        "inside": (found, concept & ~alone),
        "other": (found, gone & ~concept & ~alone),
        "pairs": (whole, ~gone & ~alone),
    }
    return {name: 100 * seen[where].double().mean().item() for name, (seen, where) in rates.items() if where.any()}


def forgotten(before: Predictions, after: Predictions) -> Tensor:
    """How much confidence each sample of the forget set lost, (N,), in the order of their indices.

    Args:
        before: What the original model says. It may have been tested with another request: any training sample will do.
        after: What the unlearned model says.

    Raises:
        ValueError: The original was not tested on these samples.
    """
    asked = after.sets["forget"]
    return before.training.of(asked).confidences - asked.confidences
