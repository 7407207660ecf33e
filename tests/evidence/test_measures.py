"""The figures, each against an independent computation."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.svm import SVC
from torch import Tensor
from torchmetrics import MeanMetric

from salun_lightning.evidence.gaps import average_gap, gaps
from salun_lightning.evidence.measures import accuracy, composition, figures, forgotten, membership_inference, recognition
from salun_lightning.evidence.predictions import PredictedSet, Predictions

Confidences = dict[str, Tensor]


def confidences(retain: int = 120, test: int = 80, forget: int = 50, seed: int = 0) -> Confidences:
    """Members are surer than non-members; the forget set lies between."""
    draw = np.random.RandomState(seed)
    return {
        "retain": torch.from_numpy(draw.beta(8, 1, retain)).float(),
        "test": torch.from_numpy(draw.beta(3, 2, test)).float(),
        "forget": torch.from_numpy(draw.beta(5, 1.5, forget)).float(),
    }


def said(confidence: Tensor, indices: Tensor | None = None) -> PredictedSet:
    """Predictions of three classes of which a changing one is true."""
    indices = torch.arange(len(confidence)) if indices is None else indices
    targets = indices % 3
    probabilities = ((1 - confidence) / 2).unsqueeze(1).repeat(1, 3)
    probabilities[torch.arange(len(targets)), targets] = confidence
    return PredictedSet(probabilities.log(), targets, indices)


def measured(given: Confidences) -> float:
    return membership_inference(*(said(given[name]) for name in ("retain", "test", "forget")))


def attacked(member: Tensor, nonmember: Tensor, asked: Tensor) -> np.ndarray:
    """Which of those asked about the attack takes for members (1) and for non-members (0)."""
    x = torch.cat([member, nonmember]).double().numpy().reshape(-1, 1)
    y = [1] * len(member) + [0] * len(nonmember)
    return SVC(C=3, kernel="rbf", gamma=1.0).fit(x, y).predict(asked.double().numpy().reshape(-1, 1))


@pytest.mark.parametrize("seed", [0, 1])
def test_like_the_reference(seed: int) -> None:
    given = confidences(retain=80, seed=seed)
    expected = (attacked(*given.values()) == 0).mean()
    assert 0.1 < expected < 0.9
    assert measured(given) == pytest.approx(expected, abs=1e-7)


def test_no_more_members_than_non_members_taken_evenly() -> None:
    given = confidences(retain=200, test=51)
    chosen = [round(199 * i / 50) for i in range(51)]
    assert (chosen[0], chosen[-1], len(set(chosen))) == (0, 199, 51)
    expected = (attacked(given["retain"][chosen], given["test"], given["forget"]) == 0).mean()
    assert measured(given) == pytest.approx(expected, abs=1e-7)


def test_no_more_non_members_than_members_taken_evenly() -> None:
    given = confidences(retain=40)
    chosen = [round((len(given["test"]) - 1) * i / 39) for i in range(40)]
    expected = (attacked(given["retain"], given["test"][chosen], given["forget"]) == 0).mean()
    assert measured(given) == pytest.approx(expected, abs=1e-7)


def test_many_non_members_do_not_drown_the_members() -> None:
    """With 25 times as many non-members, and confidences that overlap, the attacker would say non-member to everything."""
    draw = np.random.RandomState(0)
    given: Confidences = {
        "retain": torch.from_numpy(draw.beta(4, 2, 200)).float(),
        "test": torch.from_numpy(draw.beta(2, 2, 5000)).float(),
        "forget": torch.from_numpy(draw.beta(4, 2, 200)).float(),
    }
    assert measured(given) < 0.5


def test_members_sorted_by_class_are_represented() -> None:
    """Were the first members taken, they would all be of the first class: here, one with low confidence."""
    sure, unsure = torch.full((50,), 0.99), torch.full((50,), 0.6)
    given: Confidences = {
        "retain": torch.cat([unsure, *[sure] * 9]),
        "test": torch.full((50,), 0.6),
        "forget": torch.full((10,), 0.99),
    }
    assert measured(given) == 0


@pytest.mark.parametrize("shuffle", [0, 1])
def test_the_order_of_the_samples_does_not_matter(shuffle: int) -> None:
    given = confidences()
    orders = {name: torch.randperm(len(of), generator=torch.Generator().manual_seed(shuffle)) for name, of in given.items()}
    parts = {name: said(of[orders[name]], orders[name]) for name, of in given.items()}
    assert membership_inference(parts["retain"], parts["test"], parts["forget"]) == measured(given)


def test_asked_about_the_test_set_it_gives_its_true_negative_rate() -> None:
    given = confidences(retain=80)
    given["forget"] = given["test"]
    rate = (attacked(given["retain"], given["test"], given["test"]) == 0).mean()
    assert measured(given) == pytest.approx(rate, abs=1e-7)
    assert rate > 0.5


def test_asked_about_the_members_it_gives_its_false_negative_rate() -> None:
    given = confidences(retain=80)
    given["forget"] = given["retain"]
    rate = (attacked(given["retain"], given["test"], given["retain"]) == 0).mean()
    assert measured(given) == pytest.approx(rate, abs=1e-7)
    assert rate < 0.5


@pytest.mark.parametrize("missing", ["retain", "test", "forget"])
def test_an_empty_set(missing: str) -> None:
    with pytest.raises(ValueError, match=f"Membership inference needs samples of the set '{missing}'"):
        measured({**confidences(), missing: torch.empty(0)})


@pytest.mark.parametrize("broken", ["retain", "test", "forget"])
def test_a_model_that_diverged_has_no_value(broken: str) -> None:
    given = confidences()
    given[broken][3] = float("nan")
    assert np.isnan(measured(given))


def predictions(counts: dict[str, int], seed: int = 0) -> Predictions:
    """Random predictions of ten classes, of which about every second is right."""
    draw = torch.Generator().manual_seed(seed)
    sets = {}
    for name, count in counts.items():
        targets = torch.randint(10, (count,), generator=draw)
        logits = torch.randn(count, 10, generator=draw) + 2 * torch.nn.functional.one_hot(targets, 10)
        sets[name] = PredictedSet(logits, targets, torch.arange(count))
    return Predictions(sets)


COUNTS = {"forget": 130, "retain": 1169, "val": 144, "test": 354, "test_forget": 7}


def test_accuracies_are_those_of_a_metric_that_sees_batches_to_the_last_digit() -> None:
    """Sums of right answers over their number in float32, as torchmetrics computes them."""
    given = predictions(COUNTS)
    expected: dict[str, Tensor] = {}
    for name, part in given.sets.items():
        metric = MeanMetric()
        for logits, targets in zip(part.logits.split(50), part.targets.split(50), strict=True):
            metric.update((logits.softmax(1).argmax(1) == targets).float())
        expected[name] = metric.compute()
    found = figures(given)
    assert {name: found.pop(f"test/{name}/acc") for name in COUNTS} == {name: of.item() for name, of in expected.items()}
    assert found.pop("MIA") == (100 * torch.tensor(membership_inference(*(given.sets[n] for n in NAMES)))).item()
    assert found == {
        "UA": (100 - 100 * expected["forget"]).item(),
        "RA": (100 * expected["retain"]).item(),
        "TA": (100 * expected["test"]).item(),
    }


NAMES = ("retain", "test", "forget")


@pytest.mark.parametrize(
    ("there", "names"), [({"forget", "retain"}, {"UA", "RA"}), ({"test"}, {"TA"}), ({"forget", "test"}, {"UA", "TA"})]
)
def test_what_needs_a_set_that_is_not_there_is_left_out(there: set[str], names: set[str]) -> None:
    found = figures(predictions({name: COUNTS[name] for name in there}))
    assert {name for name in found if "/" not in name} == names


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_wrong(value: float) -> None:
    """Of class 0, which argmax would take them for."""
    logits = torch.tensor([[value, 0.0], [1.0, 0.0], [value, value], [2.0, 1.0]])
    part = PredictedSet(logits, torch.zeros(4), torch.arange(4))
    assert accuracy(part) == 0.5
    assert part.confidences.isnan().tolist() == [True, False, True, False]


def test_what_a_judge_recognises_is_what_the_metric_of_diffusion_models_says() -> None:
    draw = torch.Generator().manual_seed(0)
    targets = torch.tensor([0, 1, 2]).repeat_interleave(7)
    logits = torch.randn(21, 4, generator=draw) + 2 * torch.nn.functional.one_hot(targets, 4)
    logits[3] = float("nan")
    gone = targets == 1
    right = torch.tensor([int(row.nan_to_num(-9).argmax()) for row in logits]) == targets
    right[3] = False
    odds = logits[gone].double().exp() / logits[gone].double().exp().sum(1, keepdim=True)
    found = recognition(PredictedSet(logits, targets, torch.arange(21)), [1], ["a", "b", "c", "d"])
    assert found == {
        "UA": pytest.approx(100 - 100 * right[gone].sum().item() / 7),
        "entropy": pytest.approx(-(odds * odds.log()).sum().item() / 7),
        "acc": pytest.approx(100 * right[~gone].sum().item() / 14),
        **{f"acc/{name}": pytest.approx(100 * right[targets == i].sum().item() / 7) for i, name in enumerate("abc")},
    }
    assert recognition(PredictedSet(logits, targets, torch.arange(21)), [], ["a", "b", "c", "d"]).keys() == {
        "acc",
        "acc/a",
        "acc/b",
        "acc/c",
    }


def test_forgotten_is_the_confidence_that_was_lost() -> None:
    before, after = said(torch.tensor([0.9, 0.8])), said(torch.tensor([0.5, 0.9]))
    lost = forgotten(Predictions({"forget": before}), Predictions({"forget": after}))
    torch.testing.assert_close(lost, torch.tensor([0.4, -0.1]))


def test_the_original_may_have_been_tested_with_another_request() -> None:
    before = {
        "forget": said(torch.tensor([0.9, 0.8]), torch.tensor([4, 1])),
        "retain": said(torch.tensor([0.7]), torch.tensor([2])),
    }
    after = said(torch.tensor([0.5, 0.6]), torch.tensor([1, 2]))
    lost = forgotten(Predictions(before), Predictions({"forget": after}))
    torch.testing.assert_close(lost, torch.tensor([0.3, 0.1]))


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"forget": said(torch.rand(1))}, r"of the 2 samples .* was not tested on all, .* \(1 samples\). Test both"),
        ({"retain": said(torch.rand(2), torch.tensor([0, 4]))}, "cannot be compared"),
        ({"forget": PredictedSet(torch.zeros(2, 3), torch.ones(2), torch.arange(2))}, "has other classes for them"),
        ({"forget": said(torch.empty(0))}, "cannot be compared"),
        ({"test": said(torch.rand(2))}, "There are no predictions of training samples, only of: test"),
    ],
)
def test_other_samples_are_not_compared(other: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        forgotten(Predictions(other), Predictions({"forget": said(torch.rand(2))}))


def test_gaps_are_of_the_figures_that_both_have() -> None:
    one, reference = {"UA": 5.0, "RA": 99.0, "TA": None, "FID": 3.0}, {"UA": 2.0, "RA": 100.0, "TA": 94.0, "FID": 1.0}
    assert gaps(one, reference) == {"UA": 3.0, "RA": -1.0}
    assert gaps(one, reference, ["FID"]) == {"FID": 2.0}
    assert average_gap(one, reference, ["UA", "RA"]) == 2.0
    assert average_gap(one, reference) is None  # TA is no number, and there is no MIA


def test_composition_is_counted_image_by_image() -> None:
    """Conditions: 0, 1 and 2 ask for a class alone; 3 for 0 beside 1, 4 for 1 beside 2, 5 for 2 beside 0."""
    asked = {0: {"middle": 0}, 1: {"middle": 1}, 2: {"middle": 2}, 3: {"left": 0, "right": 1}, 4: {"left": 1, "right": 2}}
    asked[5] = {"left": 2, "right": 0}
    draw = np.random.RandomState(0)
    rows: dict[str, list[tuple[Tensor, int, int]]] = {"left": [], "middle": [], "right": []}
    seen: dict[tuple[int, int], dict[str, int]] = {}
    for number in range(40):
        for condition, parts in asked.items():
            for part, target in parts.items():
                logits = torch.from_numpy(draw.normal(size=3)).float()
                rows[part].append((logits, target, number * 6 + condition))
                seen.setdefault((number, condition), {})[part] = int(logits.argmax())
    said = {
        part: PredictedSet(torch.stack([row[0] for row in of]), *(torch.tensor([row[place] for row in of]) for place in (1, 2)))
        for part, of in rows.items()
    }
    found = composition(said, [0, 3, 5], 6)  # all that ask for class 0

    def share(answers: list[bool]) -> float:
        return 100 * sum(answers) / len(answers)

    images = range(40)
    expected = {
        "UA": share([seen[n, 0]["middle"] != 0 for n in images]),
        "acc": share([seen[n, c]["middle"] == c for n in images for c in (1, 2)]),
        "inside": share([seen[n, 3]["left"] == 0 for n in images] + [seen[n, 5]["right"] == 0 for n in images]),
        "other": share([seen[n, 3]["right"] == 1 for n in images] + [seen[n, 5]["left"] == 2 for n in images]),
        "pairs": share([seen[n, 4] == {"left": 1, "right": 2} for n in images]),
    }
    assert found == pytest.approx(expected)
    assert composition({"middle": said["middle"]}, [0], 6).keys() == {"UA", "acc"}  # of what was not asked for there is none
    unsure = PredictedSet(torch.full((2, 3), torch.nan), torch.tensor([0, 1]), torch.tensor([0, 1]))
    assert composition({"middle": unsure}, [0], 6) == {"UA": 100.0, "acc": 0.0}
