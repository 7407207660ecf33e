"""The loader that asks a generative model for images."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from salun_lightning.data import (
    DigitsDataModule,
    ForgetClasses,
    ForgetRandom,
    ForgetRetainDataModule,
    ImageRequests,
    Requested,
    Samples,
)
from tests.small import small_datamodule

NAMES = ["cat", "dog", "owl"]


def asked(loader: Any) -> list[tuple[int, int]]:
    """The requests of a loader: class, and number within the class."""
    batches = list(loader)
    for batch in batches:
        assert isinstance(batch, Requested)
        assert batch.targets.dtype == batch.indices.dtype == torch.int64
        assert batch.targets.shape == batch.indices.shape == (len(batch.targets),)
    return [pair for batch in batches for pair in zip(batch.targets.tolist(), batch.indices.tolist(), strict=True)]


def requests(classes: list[int], per_class: int) -> list[tuple[int, int]]:
    return [(number, index) for number in classes for index in range(per_class)]


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
@pytest.mark.parametrize("per_class", [1, 5])
def test_every_class_is_asked_for_equally_often(per_class: int, batch_size: int) -> None:
    datamodule = small_datamodule(generated_per_class=per_class, batch_size=batch_size)
    for loaders in (datamodule.test_dataloader(), datamodule.predict_dataloader()):
        assert asked(loaders["generated"]) == requests([0, 1, 2], per_class)
        assert max(len(batch.targets) for batch in loaders["generated"]) <= batch_size


@pytest.mark.parametrize(
    ("classes", "numbers"),
    [
        (None, [0, 1, 2]),
        (["owl"], [2]),
        ("owl", [2]),
        (1, [1]),
        ([2, "cat"], [0, 2]),
        (["cat", 0, "cat"], [0]),
    ],
)
def test_classes_by_name_or_number(classes: Any, numbers: list[int]) -> None:
    datamodule = small_datamodule(class_names=NAMES, generated_per_class=2, generated_classes=classes)
    assert asked(datamodule.predict_dataloader()["generated"]) == requests(numbers, 2)


@pytest.mark.parametrize("classes", [["fox"], "fox", ["owl", "fox"]])
def test_a_class_that_is_not_there(classes: Any) -> None:
    with pytest.raises(ValueError, match=r"There is no class 'fox'\. The classes are: cat, dog, owl\."):
        small_datamodule(class_names=NAMES, generated_per_class=2, generated_classes=classes)


@pytest.mark.parametrize("number", [-1, 3])
def test_a_number_that_is_no_class(number: int) -> None:
    with pytest.raises(ValueError, match=rf"There is no class '{number}'\. The classes are: cat, dog, owl\."):
        small_datamodule(class_names=NAMES, generated_per_class=2, generated_classes=[number])


def test_negative_numbers_of_images() -> None:
    with pytest.raises(ValueError, match="generated_per_class must not be negative, got -1"):
        small_datamodule(generated_per_class=-1)


def test_without_requests_everything_is_as_before() -> None:
    datamodule = small_datamodule()
    assert list(datamodule.test_dataloader()) == ["forget", "retain", "test"]
    loaders = datamodule.predict_dataloader()
    assert list(loaders) == ["forget", "retain", "test"]
    assert all(isinstance(batch, Samples) for loader in loaders.values() for batch in loader)


def test_a_test_measures_both_and_predict_asks_for_images_alone() -> None:
    datamodule = small_datamodule(ForgetClasses([1]), generated_per_class=2)
    assert list(datamodule.test_dataloader()) == ["forget", "retain", "test", "test_forget", "generated"]
    assert list(datamodule.predict_dataloader()) == ["generated"]
    assert list(datamodule.val_dataloader()) == ["forget"]  # validation asks for none


def test_requests_leave_the_split_alone() -> None:
    first, second = small_datamodule(), small_datamodule(generated_per_class=3, generated_classes=[0])
    assert first.split == second.split
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize(
    ("forget", "numbers"),
    [(ForgetClasses(["dog"]), [1]), (ForgetClasses(["owl", 0]), [0, 2]), (ForgetRandom(count=12), [])],
)
def test_which_classes_are_forgotten_whole(forget: Any, numbers: list[int]) -> None:
    datamodule = small_datamodule(forget, class_names=NAMES)
    assert datamodule.forgotten_classes == numbers


def test_forgotten_classes_are_asked_for_like_any_other() -> None:
    datamodule = small_datamodule(ForgetClasses(["dog"]), class_names=NAMES, generated_per_class=2)
    assert asked(datamodule.test_dataloader()["generated"]) == requests([0, 1, 2], 2)


class Rank(ForgetRetainDataModule):
    """The datamodule as one of several processes sees it."""

    place = (1, 0)

    def _replicas(self) -> tuple[int, int]:
        return self.place


@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.parametrize(("per_class", "batch_size"), [(5, 4), (7, 2), (2, 64)])
def test_processes_share_the_requests(processes: int, per_class: int, batch_size: int) -> None:
    datamodule = small_datamodule(generated_per_class=per_class, batch_size=batch_size)
    datamodule.__class__ = Rank
    parts = []
    for rank in range(processes):
        datamodule.place = (processes, rank)  # type: ignore[attr-defined]
        loader = datamodule.predict_dataloader()["generated"]
        assert max(len(batch.targets) for batch in loader) <= batch_size
        parts.append((len(loader), asked(loader)))
    assert len({steps for steps, _ in parts}) == 1  # or the processes would wait for each other
    assert sorted(pair for _, share in parts for pair in share) == requests([0, 1, 2], per_class)
    assert max(len(share) for _, share in parts) - min(len(share) for _, share in parts) <= parts[0][0]


def test_more_processes_than_images() -> None:
    datamodule = small_datamodule(generated_per_class=1)
    datamodule.__class__ = Rank
    datamodule.place = (4, 0)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="use at most 3 processes"):
        datamodule.predict_dataloader()


def test_requests_by_themselves() -> None:
    requested = ImageRequests([4, 1], 3)
    assert len(requested) == 6
    batch = requested[[5, 0, 2]]
    assert (batch.targets.tolist(), batch.indices.tolist()) == ([1, 4, 4], [2, 0, 2])


def test_lightning_hands_the_requests_over() -> None:
    from lightning.pytorch import LightningModule

    class Echo(LightningModule):
        def predict_step(self, batch: Requested, batch_idx: int) -> Requested:
            return batch

    datamodule = DigitsDataModule(forget=ForgetClasses(["3"]), generated_per_class=3, generated_classes=["3", 7], batch_size=4)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    batches = trainer.predict(Echo(), datamodule=datamodule)
    assert asked(batches) == requests([3, 7], 3)
    assert datamodule.forgotten_classes == [3]
