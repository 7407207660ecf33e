"""The split, and the loaders over it."""

from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from salun_lightning.data import (
    ForgetClasses,
    ForgetIndices,
    ForgetRandom,
    ForgetRequest,
    ForgetRetainDataModule,
    Samples,
)
from tests.small import Pairs, numbered_images, numbers, small_datamodule

REQUESTS = [ForgetRandom(fraction=0.2), ForgetClasses([1])]


def content(loader: Any) -> list[int]:
    """The positions that an evaluation loader hands out; checks that its images are the untouched ones of these positions."""
    batches = list(loader)
    for batch in batches:
        assert isinstance(batch, Samples)
        assert numbers(batch.inputs) == batch.indices.tolist()
        assert torch.equal(batch.targets, batch.indices % 3)
    return torch.cat([batch.indices for batch in batches]).tolist()


def validation_of(datamodule: ForgetRetainDataModule) -> list[int]:
    loader = datamodule.test_dataloader().get("val")
    return content(loader) if loader is not None else []


@pytest.mark.parametrize("val_fraction", [0.0, 0.25])
@pytest.mark.parametrize("request_", REQUESTS)
def test_the_sets_are_disjoint_and_together_the_training_data(request_: ForgetRequest, val_fraction: float) -> None:
    datamodule = small_datamodule(request_, val_fraction=val_fraction)
    forget, retain = datamodule.forget_indices, datamodule.retain_indices
    together = [*forget.tolist(), *retain.tolist(), *validation_of(datamodule)]
    assert sorted(together) == list(range(60))
    for indices in (forget, retain):
        assert indices.dtype == torch.int64
        assert (indices.diff() > 0).all()


def test_validation_takes_its_share_of_each_class() -> None:
    datamodule = small_datamodule(val_fraction=0.25)
    validation = torch.tensor(validation_of(datamodule))
    assert (validation % 3).bincount().tolist() == [5, 5, 5]
    # pinned: a checkpoint must find its split again with every version of this library and of NumPy
    assert validation.tolist() == [3, 4, 7, 17, 24, 30, 34, 35, 38, 41, 47, 52, 54, 55, 57]


def test_the_split_is_pinned() -> None:
    datamodule = small_datamodule(ForgetRandom(count=4, seed=5), val_fraction=0.25)
    assert datamodule.forget_indices.tolist() == [5, 31, 50, 56]
    assert datamodule.split == {"training_set": "81002b78cefa4297", "forget_set": "0714d2501e80d8d3"}
    assert datamodule.fingerprint == "3797f31b82c224c8"


@pytest.mark.parametrize(
    ("change", "same_training_set"),
    [
        ({"forget": ForgetRandom(count=12, seed=1)}, True),
        ({"forget": ForgetClasses([0])}, True),
        ({"val_fraction": 0.2}, False),
        ({"split_seed": 1}, False),
        ({"train": 63}, False),
    ],
)
def test_another_split_has_another_digest(change: dict[str, Any], same_training_set: bool) -> None:
    first, second = (small_datamodule(**{"val_fraction": 0.1, **more}) for more in ({}, change))
    assert (first.split["training_set"] == second.split["training_set"]) == same_training_set
    assert first.split["forget_set"] != second.split["forget_set"]
    assert first.fingerprint != second.fingerprint


def test_what_leaves_the_split_alone_leaves_its_digest_alone() -> None:
    first = small_datamodule()
    second = small_datamodule(batch_size=3, order="mixed", train_transform=torch.clone, eval_transform=torch.clone)
    assert first.split == second.split


def test_forgetting_a_class_takes_it_out_of_the_test_set() -> None:
    datamodule = small_datamodule(ForgetClasses([1, 2]))
    loaders = datamodule.test_dataloader()
    assert content(loaders["test"]) == [0, 3, 6, 9]
    assert content(loaders["test_forget"]) == [1, 2, 4, 5, 7, 8, 10, 11]
    assert content(loaders["forget"]) == datamodule.forget_indices.tolist()


def test_random_forgetting_keeps_the_whole_test_set() -> None:
    loaders = small_datamodule().test_dataloader()
    assert list(loaders) == ["forget", "retain", "test"]
    assert content(loaders["test"]) == list(range(12))


def test_evaluation_loaders() -> None:
    datamodule = small_datamodule(val_fraction=0.1)
    assert list(datamodule.val_dataloader()) == ["forget", "val"]
    assert list(datamodule.test_dataloader()) == list(datamodule.predict_dataloader()) == ["forget", "retain", "val", "test"]
    assert content(datamodule.val_dataloader()["forget"]) == datamodule.forget_indices.tolist()
    assert content(datamodule.test_dataloader()["retain"]) == datamodule.retain_indices.tolist()


@pytest.mark.parametrize("order", ["paired", "sequential", "mixed", "forget", "retain"])
def test_training_batches_keep_the_sets_apart(order: Any) -> None:
    datamodule = small_datamodule(order=order)
    seen: dict[str, set[int]] = {"forget": set(), "retain": set()}
    for batch in datamodule.train_dataloader():
        for name, part in batch.items():
            assert numbers(part.inputs) == part.indices.tolist()
            seen[name].update(part.indices.tolist())
    expected = {"forget": datamodule.forget_indices, "retain": datamodule.retain_indices}
    empty = {"forget": "retain", "retain": "forget"}.get(order)
    assert seen == {name: set() if name == empty else set(indices.tolist()) for name, indices in expected.items()}


def test_order_all_marks_nothing_as_to_be_forgotten() -> None:
    batches = list(small_datamodule(order="all").train_dataloader())
    assert {name for batch in batches for name in batch} == {"retain"}
    assert sorted(i for batch in batches for i in batch["retain"].indices.tolist()) == list(range(60))


def test_batch_size() -> None:
    sizes = [len(batch["retain"].targets) for batch in small_datamodule(order="retain", batch_size=10).train_dataloader()]
    assert sizes == [10, 10, 10, 10, 8]


class Darker(nn.Module):
    """Stands for an augmentation: marks what went through it."""

    def forward(self, images: Tensor) -> Tensor:
        return images // 2


@pytest.mark.parametrize("in_memory", [True, False])
def test_augmentation_is_for_training_alone(in_memory: bool) -> None:
    images = numbered_images(60)
    data = images if in_memory else Pairs(list(images.images), images.targets.tolist())
    datamodule = ForgetRetainDataModule(ForgetRandom(count=12), data, data, train_transform=Darker(), val_fraction=0.1)
    datamodule.setup()
    for loader in datamodule.test_dataloader().values():
        assert content(loader)
    for batch in datamodule.forget_dataloader():
        assert numbers(batch["forget"].inputs) == batch["forget"].indices.tolist()
    for batch in datamodule.train_dataloader():
        for part in batch.values():
            assert numbers(part.inputs) == (part.indices // 2).tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_may_end_before_training(workers: int) -> None:
    data = Pairs(list(numbered_images(60).images), [0, 1, 2] * 20)
    datamodule = ForgetRetainDataModule(
        ForgetRandom(count=12), data, train_transform=Darker(), augment_epochs=2, num_workers=workers
    )
    datamodule.setup()
    loader = datamodule.train_dataloader()
    for epoch in (0, 1, 2, 3, 1):  # the last one as a run is resumed
        loader.sampler.set_epoch(epoch)  # as Lightning does
        for batch in loader:
            for part in batch.values():
                assert numbers(part.inputs) == (part.indices // (2 if epoch < 2 else 1)).tolist()


@pytest.mark.parametrize("in_memory", [True, False])
def test_evaluation_transform_is_for_evaluation_and_the_saliency_pass(in_memory: bool) -> None:
    images = numbered_images(60)
    data = images if in_memory else Pairs(list(images.images), images.targets.tolist())
    datamodule = ForgetRetainDataModule(ForgetRandom(count=12), data, data, eval_transform=Darker(), val_fraction=0.1)
    datamodule.setup()
    evaluated = [*datamodule.test_dataloader().values(), *datamodule.val_dataloader().values()]
    batches = [batch for loader in evaluated for batch in loader]
    for batch in [*batches, *(batch["forget"] for batch in datamodule.forget_dataloader())]:
        assert numbers(batch.inputs) == (batch.indices // 2).tolist()
    for batch in datamodule.train_dataloader():
        for part in batch.values():
            assert numbers(part.inputs) == part.indices.tolist()


def test_the_saliency_pass_meets_the_forget_set_once_in_order() -> None:
    datamodule = small_datamodule(val_fraction=0.1)
    batches = list(datamodule.forget_dataloader())
    assert {name for batch in batches for name in batch} == {"forget"}
    assert [i for batch in batches for i in batch["forget"].indices.tolist()] == datamodule.forget_indices.tolist()


def test_targets_may_be_given() -> None:
    images = numbered_images(9)
    data = [(image, int(target)) for image, target in zip(images.images, images.targets, strict=True)]
    datamodule = ForgetRetainDataModule(ForgetClasses([0]), data, data, targets=([0, 1, 2] * 3, torch.arange(9) % 3))
    datamodule.setup()
    assert datamodule.forget_indices.tolist() == [0, 3, 6]
    assert content(datamodule.test_dataloader()["test"]) == [1, 2, 4, 5, 7, 8]


def test_labels_serve_as_targets() -> None:
    images = numbered_images(9)
    data = Pairs(list(images.images), images.targets.tolist())
    data.labels = vars(data).pop("targets")  # type: ignore[attr-defined]
    data.__class__ = type("Labelled", (Pairs,), {"__getitem__": lambda self, index: (self.images[index], self.labels[index])})
    datamodule = ForgetRetainDataModule(ForgetClasses([2]), data, data)
    datamodule.setup()
    assert datamodule.forget_indices.tolist() == [2, 5, 8]
    assert datamodule.num_classes == 3
    assert datamodule.class_names == ["0", "1", "2"]


def test_class_names() -> None:
    datamodule = small_datamodule(ForgetClasses(["dog"]), class_names=["cat", "dog", "owl", "emu"])
    assert (datamodule.forget_indices % 3 == 1).all()
    assert datamodule.num_classes == 4


IMAGES = numbered_images(9)
NAMELESS = list(zip(IMAGES.images, IMAGES.targets.tolist(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": NAMELESS, "test": IMAGES}, "list has neither targets nor labels; give the datamodule its targets"),
        ({"test": IMAGES}, "needs a train dataset"),
        ({"train": IMAGES, "test": IMAGES, "class_names": ["cat", "dog"]}, "class 2, but there are names for 2 classes"),
        ({"train": NAMELESS, "test": NAMELESS, "targets": ([0, 1], [0] * 9)}, "2 targets for 9 samples"),
        ({"train": Pairs([], []), "test": IMAGES}, "0 targets for 0 samples"),
        ({"train": NAMELESS, "test": NAMELESS, "targets": ([-1] * 9, [0] * 9)}, "class -1"),
        ({"train": IMAGES, "test": IMAGES, "val_fraction": 1.0}, "val_fraction must be at least 0 and below 1, got 1.0"),
        ({"train": IMAGES, "test": IMAGES, "batch_size": 0}, "batch_size must be positive, got 0"),
        ({"train": IMAGES, "test": IMAGES, "order": "random"}, "order must be one of .* got 'random'"),
    ],
)
def test_bad_data(arguments: dict[str, Any], message: str) -> None:
    def use() -> None:
        datamodule = ForgetRetainDataModule(ForgetIndices([0]), **arguments)
        datamodule.setup()
        datamodule.train_dataloader()

    with pytest.raises(ValueError, match=message):
        use()


def test_setup_makes_one_split(monkeypatch: pytest.MonkeyPatch) -> None:
    datamodule = small_datamodule()
    monkeypatch.setattr(datamodule, "load", lambda: pytest.fail("the data was loaded twice"))
    before = datamodule.forget_indices
    datamodule.setup("fit")
    datamodule.setup("test")
    assert datamodule.forget_indices is before


class Attached(LightningModule):
    """A module of another project whose attribute ``order`` has nothing to do with ours."""

    order = 3


@pytest.mark.parametrize(("own", "expected"), [(None, "paired"), ("mixed", "mixed")])
def test_order_of_a_module_that_is_not_ours(own: Any, expected: str) -> None:
    datamodule = small_datamodule(order=own)
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(Attached())
    datamodule.trainer = trainer
    assert datamodule.state_dict()["order"] == expected
    assert len(list(datamodule.train_dataloader())) > 0


def test_overfit_batches_is_refused() -> None:
    datamodule = small_datamodule()
    datamodule.trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", overfit_batches=2)
    with pytest.raises(MisconfigurationException, match="Use limit_train_batches"):
        datamodule.setup("fit")


def test_datasets_from_a_configuration() -> None:
    parser = ArgumentParser()
    parser.add_argument("--data", type=ForgetRetainDataModule)
    dataset = {"class_path": "tests.small.Numbered", "init_args": {"count": 9}}
    forget = {"class_path": "ForgetRandom", "init_args": {"count": 2}}
    arguments = {"train": dataset, "test": dataset, "forget": forget}
    config = parser.parse_object({"data": {"class_path": "ForgetRetainDataModule", "init_args": arguments}})
    datamodule = parser.instantiate(config).data
    datamodule.setup()
    assert len(datamodule.forget_indices) == 2
    assert content(datamodule.test_dataloader()["test"]) == list(range(9))


@pytest.mark.parametrize("name", ["forget", "retain", "val", "test"])
def test_a_set_by_its_name_is_whole_and_in_order(name):
    datamodule = small_datamodule(val_fraction=0.2)
    batches = list(datamodule.set_dataloader(name))
    indices = torch.cat([batch.indices for batch in batches])
    expected = {**datamodule.val_dataloader(), **datamodule.test_dataloader()}[name]
    assert torch.equal(indices, torch.cat([batch.indices for batch in expected]))
    assert indices.tolist() == sorted(set(indices.tolist()))
    assert numbers(torch.cat([batch.inputs for batch in batches])) == indices.tolist()


def test_a_set_is_whole_on_each_of_several_processes():
    datamodule = small_datamodule()
    datamodule._replicas = lambda: (2, 1)
    assert len(torch.cat([batch.indices for batch in datamodule.set_dataloader("forget")])) == 12
    assert len(torch.cat([batch.indices for batch in datamodule.val_dataloader()["forget"]])) == 6


def test_a_set_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"^There is no set 'train'\. Choose from forget, retain, val, test, test_forget\.$"):
        small_datamodule().set_dataloader("train")


@pytest.mark.parametrize(
    ("forget", "numbers"),
    [(ForgetClasses(["dog"]), [1]), (ForgetClasses(["owl", 0]), [0, 2]), (ForgetRandom(count=12), [])],
)
def test_which_classes_are_forgotten_whole(forget: Any, numbers: list[int]) -> None:
    assert small_datamodule(forget, class_names=["cat", "dog", "owl"]).forgotten_classes == numbers


class Foreign(LightningModule):
    """A module of another project, which predicts what it is given."""

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return batch


class Bringing(Foreign):
    def predict_dataloader(self) -> Any:
        return DataLoader(torch.arange(3))


def test_predict_is_of_all_sets_unless_the_module_brings_loaders() -> None:
    settings = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer, datamodule = Trainer(accelerator="cpu", **settings), small_datamodule(ForgetClasses([1]))
    of_sets = trainer.predict(Foreign(), datamodule=datamodule)
    assert [sum(len(batch.targets) for batch in batches) for batches in of_sets] == [20, 40, 8, 4]
    assert torch.cat(trainer.predict(Bringing(), datamodule=datamodule)).tolist() == [0, 1, 2]
