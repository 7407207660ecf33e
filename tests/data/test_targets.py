"""Where the classes of a dataset are read, and what is no class."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from salun_lightning.data import ForgetClasses, ForgetIndices, ForgetRetainDataModule
from salun_lightning.data.samples import SampleBatches
from salun_lightning.data.targets import class_numbers, targets_of
from tests.small import Pairs, numbered_images, numbers, small_datamodule

IMAGES = numbered_images(9)
TARGETS = [0, 1, 2] * 3
PAIRS = Pairs(list(IMAGES.images), TARGETS)


class Table(Dataset[Any]):
    """Samples are dictionaries and columns can be read whole, as in a dataset of Hugging Face."""

    column_names = ("picture", "kind")

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int | str) -> Any:
        if isinstance(index, str):
            return {"picture": IMAGES.images, "kind": TARGETS}[index]
        return {"picture": IMAGES.images[index], "kind": TARGETS[index]}


DATASETS: dict[str, tuple[Any, list[int], tuple[int | str, int | str]]] = {
    "subset": (Subset(PAIRS, [8, 1, 3]), [2, 1, 0], (0, 1)),
    "concatenation": (ConcatDataset([PAIRS, IMAGES]), TARGETS * 2, (0, 1)),
    "tensors": (TensorDataset(IMAGES.images, torch.tensor(TARGETS)), TARGETS, (0, 1)),
    "columns": (Table(), TARGETS, ("picture", "kind")),
    "longer tuples": (TensorDataset(torch.tensor(TARGETS), torch.zeros(9), IMAGES.images), TARGETS, (2, 0)),
    "all of them": (
        Subset(ConcatDataset([Subset(PAIRS, [4, 5]), TensorDataset(IMAGES.images, torch.tensor(TARGETS).double())]), [2, 0, 1]),
        [0, 1, 2],
        (0, 1),
    ),
    "a subset of columns": (Subset(Table(), [5, 0]), [2, 0], ("picture", "kind")),
}


@pytest.mark.parametrize("name", DATASETS)
def test_targets_are_read(name: str) -> None:
    dataset, expected, keys = DATASETS[name]
    targets = targets_of(dataset, key=keys[1])
    assert targets.dtype == torch.int64
    assert targets.tolist() == expected
    batch = SampleBatches(dataset, targets=targets, keys=keys).samples(torch.arange(len(expected)))
    assert batch.targets.tolist() == expected
    assert [number % 3 for number in numbers(batch.inputs)] == expected


def test_a_datamodule_over_dictionaries() -> None:
    datamodule = ForgetRetainDataModule(ForgetClasses([1]), Table(), Table(), input_key="picture", target_key="kind")
    datamodule.setup()
    assert datamodule.forget_indices.tolist() == [1, 4, 7]
    for batch in datamodule.train_dataloader():
        for part in batch.values():
            assert numbers(part.inputs) == part.indices.tolist()
    assert [numbers(batch.inputs) for batch in datamodule.test_dataloader()["test"]] == [[0, 2, 3, 5, 6, 8]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 2.0, True], [0, 2, 1]),
        (np.array([[1], [2]], np.uint8), [1, 2]),
        ([torch.tensor(1), torch.tensor([0])[0]], [1, 0]),
        ([np.int32(4)], [4]),
        (torch.tensor([1.0, 3.0], dtype=torch.bfloat16).float(), [1, 3]),
        ([], []),
    ],
)
def test_class_numbers(values: Any, expected: list[int]) -> None:
    assert class_numbers(values).tolist() == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.5, 1.0], "must be the number of a class, got 0.5"),
        (torch.tensor([1.0, float("nan")]), "must be the number of a class, got nan"),
        (["cat", "dog"], "must be the number of a class, got 'cat'. Number the classes .* class_names"),
        (np.array(["cat"]), "got 'cat'"),
        ([1, None], "got None"),
        (torch.eye(3), "one-hot rows. Give the number of the class .* argmax"),
        ([[0, 1], [1, 0]], "one-hot rows"),
        (torch.tensor([[1, 1, 0], [0, 1, 0]]), "several labels a sample"),
        ([[0, 1], [1]], "several labels a sample"),
        ([[0, 1], 1], "several labels a sample"),
        ([torch.tensor([0.2, 0.8])], "several labels a sample"),
    ],
)
def test_what_is_no_class(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_numbers(values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": PAIRS, "targets": ([0, 1, 1] * 3, None)}, "Sample 2 of the data is of class 2, but its target says class 1"),
        (
            {"train": [(image, 0) for image in IMAGES.images], "targets": ([0] * 8 + [1], None)},
            "Sample 8 of the data is of class 0, but its target says class 1",
        ),
        (
            {"train": TensorDataset(IMAGES.images)},
            "TensorDataset has neither targets nor labels; give the datamodule its targets",
        ),
        ({"train": Table()}, "Table has the columns picture, kind: set input_key and target_key"),
        ({"train": Table(), "target_key": "label"}, "There is no column 'label'"),
        ({"train": Table(), "target_key": "kind"}, "has the keys picture, kind, and nothing under 0. Set input_key"),
        ({"train": PAIRS, "input_key": 2}, "the type tuple, and nothing under 2. Set input_key"),
        (
            {"train": [(torch.zeros(1, 4 + (number == 3), 4), 0) for number in range(9)], "targets": ([0] * 9, None)},
            r"equal in size, but number \d of the data is \(1, 4, 4\) and number 3 is \(1, 5, 4\). Give transforms",
        ),
        (
            {"train": [(torch.zeros(1, 4, 4, dtype=torch.int64), 0)] * 9, "targets": ([0] * 9, None)},
            "Images of torch.int64 have no known scale",
        ),
    ],
)
def test_bad_samples(arguments: dict[str, Any], message: str) -> None:
    def use() -> None:
        datamodule = ForgetRetainDataModule(ForgetIndices([1]), order="all", **arguments)
        datamodule.setup()
        for loader in (datamodule.train_dataloader(), datamodule.test_dataloader()["retain"]):
            list(loader)

    with pytest.raises(ValueError, match=message):
        use()


def test_without_test_data_there_are_no_test_loaders() -> None:
    datamodule = ForgetRetainDataModule(ForgetClasses([1]), IMAGES)
    datamodule.setup()
    assert list(datamodule.test_dataloader()) == ["forget", "retain"]
    assert datamodule.split == small_datamodule(ForgetClasses([1]), train=9).split


@pytest.mark.parametrize("bits", [8, 16])
def test_grey_pictures_keep_their_scale(bits: int) -> None:
    """A picture that nothing has prepared, with every shade from black to white."""
    shades = np.linspace(0, 2**bits - 1, 256).round().astype(f"uint{bits}").reshape(16, 16)
    batch = SampleBatches([(Image.fromarray(shades), 0)]).samples(torch.tensor([0]))
    torch.testing.assert_close(batch.inputs.flatten(), torch.linspace(0, 1, 256), atol=1e-6, rtol=0)


def test_tensors_of_16_bits_are_scaled() -> None:
    image: Tensor = torch.tensor([[[0, 65535]]], dtype=torch.uint16)
    assert SampleBatches([(image, 0)]).samples(torch.tensor([0])).inputs.flatten().tolist() == [0, 1]
