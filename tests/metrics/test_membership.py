"""Membership inference."""

import numpy as np
import pytest
import torch
from sklearn.svm import SVC
from torch import Tensor

from salun_lightning.metrics import MembershipInference
from salun_lightning.metrics.membership import Group

Confidences = dict[Group, Tensor]


def confidences(members: int = 120, nonmembers: int = 80, forget: int = 50, seed: int = 0) -> Confidences:
    """Members are surer than non-members; the forget set lies between."""
    draw = np.random.RandomState(seed)
    return {
        "member": torch.from_numpy(draw.beta(8, 1, members)).float(),
        "nonmember": torch.from_numpy(draw.beta(3, 2, nonmembers)).float(),
        "forget": torch.from_numpy(draw.beta(5, 1.5, forget)).float(),
    }


def update(mia: MembershipInference, group: Group, confidence: Tensor, indices: Tensor) -> None:
    """Hand over probabilities of three classes of which a changing one is true."""
    targets = indices % 3
    probabilities = ((1 - confidence) / 2).unsqueeze(1).repeat(1, 3)
    probabilities[torch.arange(len(targets)), targets] = confidence
    mia.update(probabilities, targets, indices, group)


def measured(given: Confidences, batch_size: int = 1000, shuffle: int | None = None) -> float:
    mia = MembershipInference()
    batches = []
    for group, values in given.items():
        order = torch.arange(len(values))
        if shuffle is not None:
            order = torch.randperm(len(values), generator=torch.Generator().manual_seed(shuffle))
        batches += [(group, values[part], part) for part in order.split(batch_size)]
    for group, values, part in batches if shuffle is None else reversed(batches):
        update(mia, group, values, part)
    return mia.compute().item()


def attacked(member: Tensor, nonmember: Tensor, asked: Tensor) -> np.ndarray:
    """Which of those asked about the attack takes for members (1) and for non-members (0)."""
    x = torch.cat([member, nonmember]).double().numpy().reshape(-1, 1)
    y = [1] * len(member) + [0] * len(nonmember)
    return SVC(C=3, kernel="rbf", gamma=1.0).fit(x, y).predict(asked.double().numpy().reshape(-1, 1))


@pytest.mark.parametrize("seed", [0, 1])
def test_like_the_reference(seed: int) -> None:
    given = confidences(members=80, seed=seed)
    expected = (attacked(*given.values()) == 0).mean()
    assert 0.1 < expected < 0.9
    assert measured(given) == pytest.approx(expected, abs=1e-7)


def test_no_more_members_than_non_members_taken_evenly() -> None:
    given = confidences(members=200, nonmembers=51)
    chosen = [round(199 * i / 50) for i in range(51)]
    assert (chosen[0], chosen[-1], len(set(chosen))) == (0, 199, 51)
    expected = (attacked(given["member"][chosen], given["nonmember"], given["forget"]) == 0).mean()
    assert measured(given) == pytest.approx(expected, abs=1e-7)


def test_fewer_members_than_non_members_are_all_taken() -> None:
    given = confidences(members=40)
    assert measured(given) == pytest.approx((attacked(*given.values()) == 0).mean(), abs=1e-7)


def test_members_sorted_by_class_are_represented() -> None:
    """Were the first members taken, they would all be of the first class: here, one with low confidence."""
    sure, unsure = torch.full((50,), 0.99), torch.full((50,), 0.6)
    given: Confidences = {
        "member": torch.cat([unsure, *[sure] * 9]),
        "nonmember": torch.full((50,), 0.6),
        "forget": torch.full((10,), 0.99),
    }
    assert measured(given) == 0


@pytest.mark.parametrize("shuffle", [0, 1])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_neither_batches_nor_their_order_matter(batch_size: int, shuffle: int) -> None:
    given = confidences()
    assert measured(given, batch_size, shuffle) == measured(given)


def test_asked_about_the_test_set_it_gives_its_true_negative_rate() -> None:
    given = confidences(members=80)
    given["forget"] = given["nonmember"]
    rate = (attacked(given["member"], given["nonmember"], given["nonmember"]) == 0).mean()
    assert measured(given) == pytest.approx(rate, abs=1e-7)
    assert rate > 0.5


def test_asked_about_the_members_it_gives_its_false_negative_rate() -> None:
    given = confidences(members=80)
    given["forget"] = given["member"]
    rate = (attacked(given["member"], given["nonmember"], given["member"]) == 0).mean()
    assert measured(given) == pytest.approx(rate, abs=1e-7)
    assert rate < 0.5


@pytest.mark.parametrize("missing", ["member", "nonmember", "forget"])
def test_a_group_without_samples(missing: Group) -> None:
    mia = MembershipInference()
    for group, values in confidences().items():
        if group != missing:
            update(mia, group, values, torch.arange(len(values)))
    with pytest.raises(ValueError, match=f"Membership inference needs samples of the group '{missing}'"):
        mia.compute()


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric MembershipInference was called before")
def test_reset_forgets_what_it_was_given() -> None:
    mia, given = MembershipInference(), confidences()
    for group, values in confidences(seed=5).items():
        update(mia, group, values, torch.arange(len(values)))
    first = mia.compute()
    mia.reset()
    with pytest.raises(ValueError, match="needs samples"):
        mia.compute()
    for group, values in given.items():
        update(mia, group, values, torch.arange(len(values)))
    assert mia.compute().item() == measured(given) != first.item()


def test_half_precision_is_taken() -> None:
    mia, given = MembershipInference(), confidences()
    for group, values in given.items():
        update(mia, group, values.bfloat16(), torch.arange(len(values)))
    assert mia.compute().item() == measured({group: values.bfloat16().float() for group, values in given.items()})


@pytest.mark.parametrize("broken", ["member", "nonmember", "forget"])
def test_a_model_that_diverged_has_no_value(broken: Group) -> None:
    given = confidences()
    given[broken][3] = float("nan")
    assert np.isnan(measured(given))


def test_its_state_is_not_part_of_a_checkpoint() -> None:
    mia = MembershipInference()
    for group, values in confidences().items():
        update(mia, group, values, torch.arange(len(values)))
    assert mia.state_dict() == {}
