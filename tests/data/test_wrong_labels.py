"""Training images that are labelled wrong, and are forgotten for it."""

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import Dataset

from salun_lightning.data import DigitsDataModule, ForgetIndices, ForgetRetainDataModule, Samples, WrongLabels
from salun_lightning.data.split import check_training_set
from salun_lightning.lightning_cli import UnlearningCLI
from tests.small import Pairs, numbered_images, numbers

NAMES = ["cat", "dog", "owl"]
TRUE = torch.arange(60) % 3


class Records(Dataset[Any]):
    """Numbered images as dictionaries, or as tuples that hold more than image and class."""

    def __init__(self, named: bool) -> None:
        self.named = named
        self.images = numbered_images(60).images
        self.labels = TRUE.tolist()

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> Any:
        image, label = self.images[index], self.labels[index]
        return {"picture": image, "kind": label, "note": "x"} if self.named else (image, "x", label)


SOURCES: dict[str, tuple[Any, dict[str, Any]]] = {
    "tensors": (numbered_images(60), {}),
    "pairs": (Pairs(list(numbered_images(60).images), TRUE.tolist()), {}),
    "tuples": (Records(named=False), {"target_key": 2}),
    "dictionaries": (Records(named=True), {"input_key": "picture", "target_key": "kind"}),
}


def relabelled(source: Any = None, wrong: WrongLabels | None = None, **kwargs: Any) -> ForgetRetainDataModule:
    """A datamodule over numbered images, a fifth of the training set of which is labelled wrong."""
    datamodule = ForgetRetainDataModule(
        train=source or numbered_images(60), test=kwargs.pop("test", None), wrong_labels=wrong or WrongLabels(0.2), **kwargs
    )
    datamodule.setup()
    return datamodule


def handed_out(loader: Any) -> Tensor:
    """The classes that a loader gives the numbered images, in their order; -1 for those that it does not bring."""
    given = torch.full((60,), -1)
    for batch in loader:
        for part in [batch] if isinstance(batch, Samples) else batch.values():
            assert numbers(part.inputs) == part.indices.tolist()
            given[part.indices] = part.targets
    return given


@pytest.mark.parametrize("kind", SOURCES)
def test_what_is_forgotten_is_what_is_labelled_wrong(kind: str) -> None:
    source, keys = SOURCES[kind]
    datamodule = relabelled(source, val_fraction=0.25, batch_size=8, order="all", **keys)
    trained = torch.cat([datamodule.forget_indices, datamodule.retain_indices])
    assert len(datamodule.forget_indices) == round(0.2 * len(trained)) == 9
    for loader in (datamodule.train_dataloader(), datamodule.test_dataloader()["forget"], datamodule.forget_dataloader()):
        given = handed_out(loader)
        seen = given >= 0
        wrong = (seen & (given != TRUE)).nonzero().flatten()
        assert wrong.tolist() == datamodule.forget_indices.tolist()
        assert given.max() == 2
    for name in ("retain", "val"):
        given = handed_out(datamodule.test_dataloader()[name])
        assert (given == TRUE)[given >= 0].all()
        assert (given >= 0).any()


def test_the_test_set_and_the_source_keep_their_classes() -> None:
    source, test = numbered_images(60), numbered_images(12)
    datamodule = relabelled(source, test=test)
    assert torch.equal(handed_out(datamodule.test_dataloader()["test"])[:12], torch.arange(12) % 3)
    assert torch.equal(source.targets, TRUE)


def test_the_validation_set_does_not_depend_on_the_labels() -> None:
    plain = ForgetRetainDataModule(ForgetIndices([0]), numbered_images(60), val_fraction=0.25)
    plain.setup()
    kept = [handed_out(module.test_dataloader()["val"]).tolist() for module in (plain, relabelled(val_fraction=0.25))]
    assert kept[0] == kept[1]


# Literal labels: they must be the same with every version of this library and of NumPy.
@pytest.mark.parametrize(("seed", "expected"), [(0, {2: 1, 13: 2, 28: 2}), (1, {10: 0, 17: 0, 21: 2})])
def test_wrong_labels_are_pinned(seed: int, expected: dict[int, int]) -> None:
    labels = WrongLabels(0.1, seed).labels(torch.arange(30) % 3, NAMES, torch.arange(30))
    wrong = (labels != torch.arange(30) % 3).nonzero().flatten().tolist()
    assert dict(zip(wrong, labels[wrong].tolist(), strict=True)) == expected


def test_wrong_labels_are_uniform_over_the_other_classes() -> None:
    targets = torch.full((4000,), 1)
    labels = WrongLabels(0.75, 3).labels(targets, ["a", "b", "c", "d"], torch.arange(4000))
    counts = labels.bincount(minlength=4)
    assert counts[1] == 1000
    assert (counts[[0, 2, 3]] - 1000).abs().max() < 100


def test_another_request_may_be_met_where_labels_are_wrong() -> None:
    datamodule = relabelled(forget=ForgetIndices([0, 1]))
    assert datamodule.forget_indices.tolist() == [0, 1]
    given = handed_out(datamodule.test_dataloader()["retain"])
    assert (given != TRUE)[2:].sum() > 8


def test_a_checkpoint_that_was_trained_on_other_labels_is_refused() -> None:
    state = relabelled(order="all").state_dict()
    relabelled(order="all").load_state_dict(state)
    plain = ForgetRetainDataModule(ForgetIndices([0]), numbered_images(60))
    plain.setup()
    for other in (plain, relabelled(wrong=WrongLabels(0.2, seed=1))):
        with pytest.raises(MisconfigurationException, match="its training set is not this datamodule's"):
            check_training_set(state, other.split)


def test_the_shipped_request() -> None:
    """It takes the place of the task's own request."""
    words = ["--config=digits", "--config=digits/wrong_labels", "--data.wrong_labels.seed=5"]
    datamodule = UnlearningCLI(words, run=False).datamodule
    expected = DigitsDataModule(wrong_labels=WrongLabels(0.1, 5), val_fraction=0.1)
    for module in (datamodule, expected):
        module.setup()
    assert datamodule.split == expected.split
    assert len(datamodule.forget_indices) == 130


def test_classes_that_contradict_the_given_ones_are_still_found() -> None:
    source = Pairs(list(numbered_images(60).images), TRUE.tolist())
    datamodule = relabelled(source)
    source.targets[5] = 0
    with pytest.raises(ValueError, match="Sample 5 of the data is of class 0, but its target says class 2"):
        list(datamodule.train_dataloader())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "It is not said what is to be forgotten. Give forget, or wrong_labels"),
        ({"wrong_labels": WrongLabels(0.001)}, "The forget set is empty"),
        ({"wrong_labels": WrongLabels(0.1), "class_names": ["cat"], "train": numbered_images(60, classes=1)}, "two classes"),
    ],
)
def test_nothing_to_forget(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ForgetRetainDataModule(**{"train": numbered_images(60), **arguments}).setup()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction": 0.0}, "must lie between 0 and 1, got 0.0"),
        ({"fraction": 1.0}, "must lie between 0 and 1, got 1.0"),
        ({"seed": -1}, "seed .* got -1"),
    ],
)
def test_wrong_labels_refuse(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WrongLabels(**arguments)
