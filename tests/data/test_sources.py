"""The bundled data sets, and those that torchvision reads, on small files in their real formats."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from scipy.io import savemat
from torch import Tensor, nn

from salun_lightning.data import (
    CIFAR10DataModule,
    CIFAR100DataModule,
    DigitsDataModule,
    ForgetClasses,
    ForgetRandom,
    ForgetRetainDataModule,
    ImageFolderDataModule,
    RandomCropFlip,
    STL10DataModule,
    SVHNDataModule,
)
from salun_lightning.data.images import read_image

CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR100_NAMES = [f"thing {number}" for number in range(100)]
PIXELS = np.random.RandomState(0).randint(0, 256, (60, 3, 32, 32)).astype(np.uint8)
LABELS = [number % 10 for number in range(60)]


@pytest.fixture(autouse=True)
def _any_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small files cannot have the digests of the large ones, which torchvision knows."""
    for module in ("cifar", "svhn", "utils"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda path, md5: Path(path).is_file())


def write_pickle(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))


def cifar10(root: Path) -> CIFAR10DataModule:
    folder, flat = root / "cifar-10-batches-py", PIXELS.reshape(60, -1)
    for part in range(5):
        batch = slice(10 * part, 10 * part + 10)
        write_pickle(folder / f"data_batch_{part + 1}", {"data": flat[batch], "labels": LABELS[batch]})
    write_pickle(folder / "test_batch", {"data": flat[50:], "labels": LABELS[50:]})
    write_pickle(folder / "batches.meta", {"label_names": CIFAR10_NAMES})
    return CIFAR10DataModule(root=root, forget=ForgetRandom(count=5))


def cifar100(root: Path) -> CIFAR100DataModule:
    folder, flat = root / "cifar-100-python", PIXELS.reshape(60, -1)
    write_pickle(folder / "train", {"data": flat[:50], "fine_labels": LABELS[:50]})
    write_pickle(folder / "test", {"data": flat[50:], "fine_labels": LABELS[50:]})
    write_pickle(folder / "meta", {"fine_label_names": CIFAR100_NAMES})
    return CIFAR100DataModule(root=root, forget=ForgetRandom(count=5))


def svhn(root: Path) -> SVHNDataModule:
    ones_to_ten = np.array([label or 10 for label in LABELS], np.uint8)[:, None]
    for split, part in (("train", slice(50)), ("test", slice(50, 60))):
        savemat(root / f"{split}_32x32.mat", {"X": PIXELS[part].transpose(2, 3, 1, 0), "y": ones_to_ten[part]})
    return SVHNDataModule(root=root, forget=ForgetRandom(count=5))


@pytest.mark.parametrize(
    ("make", "names"),
    [(cifar10, CIFAR10_NAMES), (cifar100, CIFAR100_NAMES), (svhn, [str(number) for number in range(10)])],
)
def test_files_of_torchvision(tmp_path: Path, make: Callable[[Path], ForgetRetainDataModule], names: list[str]) -> None:
    datamodule = make(tmp_path)
    datamodule.prepare_data()  # finds the files and downloads nothing
    datamodule.setup()
    assert datamodule.class_names == names
    assert len(datamodule.forget_indices) == 5
    loaders = datamodule.test_dataloader()
    for name, first in (("forget", 0), ("retain", 0), ("test", 50)):
        for batch in loaders[name]:
            positions = batch.indices + first
            assert torch.equal(batch.inputs, torch.from_numpy(PIXELS)[positions].float() / 255)
            assert batch.targets.tolist() == [LABELS[position] for position in positions]
    assert sum(len(batch.targets) for batch in loaders["test"]) == 10


@pytest.mark.parametrize("make", [CIFAR10DataModule, CIFAR100DataModule, SVHNDataModule, STL10DataModule])
def test_files_that_are_not_there(tmp_path: Path, make: Callable[..., ForgetRetainDataModule]) -> None:
    datamodule = make(root=tmp_path, download=False, forget=ForgetRandom(count=5))
    datamodule.prepare_data()
    with pytest.raises(RuntimeError, match="not found or corrupted"):
        datamodule.setup()


def test_cifar_is_augmented_unless_told_otherwise() -> None:
    def transform(**kwargs: Any) -> Any:
        return CIFAR10DataModule(forget=ForgetRandom(count=5), **kwargs).train_transform

    other = nn.Identity()
    assert isinstance(transform(), RandomCropFlip)
    assert transform(augment=False) is None
    assert transform(train_transform=other) is other


STL10_NAMES = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]


class SmallSTL10:
    """Stands in for the data set of torchvision: images of one colour each, and what it was asked for."""

    asked: list[dict[str, Any]]

    def __init__(self, root: str, split: str = "train", download: bool = False) -> None:
        self.asked.append({"root": root, "split": split, "download": download})
        shades = torch.arange(20 if split == "train" else 30, dtype=torch.uint8) * 8
        self.data = shades.view(-1, 1, 1, 1).repeat(1, 3, 96, 96).numpy()
        self.labels = (np.arange(len(shades)) % 10).astype(np.uint8)
        self.classes = STL10_NAMES

    def __len__(self) -> int:
        return len(self.labels)


@pytest.fixture
def small_stl10(monkeypatch: pytest.MonkeyPatch) -> type[SmallSTL10]:
    monkeypatch.setattr(SmallSTL10, "asked", [], raising=False)
    monkeypatch.setattr("salun_lightning.data.stl10.STL10", SmallSTL10)
    return SmallSTL10


@pytest.mark.parametrize(("given", "size"), [({}, 64), ({"image_size": 32}, 32), ({"image_size": 96}, 96)])
def test_stl10(small_stl10: type[SmallSTL10], tmp_path: Path, given: dict[str, int], size: int) -> None:
    datamodule = STL10DataModule(tmp_path, forget=ForgetClasses(["cat"]), **given)
    datamodule.setup()
    assert datamodule.class_names == STL10_NAMES
    assert datamodule.forget_indices.tolist() == [3, 13]
    loaders = datamodule.test_dataloader()
    counts = {name: sum(len(batch.targets) for batch in loader) for name, loader in loaders.items()}
    assert counts == {"forget": 2, "retain": 18, "test": 27, "test_forget": 3}
    for loader in loaders.values():
        for batch in loader:
            shades = (8 * batch.indices / 255).view(-1, 1, 1, 1).expand(-1, 3, size, size)
            torch.testing.assert_close(batch.inputs, shades)
            assert torch.equal(batch.targets, batch.indices % 10)
    train, test, _ = datamodule.load()
    assert (train.images.dtype, test.images.dtype) == (torch.uint8, torch.uint8)
    assert (train.images.shape, test.images.shape) == ((20, 3, size, size), (30, 3, size, size))
    assert {(request["root"], request["download"]) for request in small_stl10.asked} == {(str(tmp_path), False)}
    assert {request["split"] for request in small_stl10.asked} == {"train", "test"}  # not what has no label


@pytest.mark.parametrize("download", [True, False])
def test_stl10_is_downloaded_only_if_it_may(small_stl10: type[SmallSTL10], tmp_path: Path, download: bool) -> None:
    STL10DataModule(tmp_path, download=download, forget=ForgetClasses(["cat"])).prepare_data()
    assert [request["download"] for request in small_stl10.asked] == [True] * download


def test_stl10_is_scaled_without_aliasing(small_stl10: type[SmallSTL10], monkeypatch: pytest.MonkeyPatch) -> None:
    """A pattern of single pixels becomes grey; without antialiasing some of its lines would come through."""
    load = SmallSTL10.__init__

    def striped(self: SmallSTL10, *arguments: Any, **options: Any) -> None:
        load(self, *arguments, **options)
        self.data[:] = 0
        self.data[..., ::2] = 255

    monkeypatch.setattr(SmallSTL10, "__init__", striped)
    train, _, _ = STL10DataModule(forget=ForgetClasses(["cat"]), image_size=24).load()
    assert (train.images[..., 2:-2].float() - 127.5).abs().max() <= 16


@pytest.mark.parametrize(
    "name", ["DigitsDataModule", "CIFAR10DataModule", "CIFAR100DataModule", "SVHNDataModule", "STL10DataModule"]
)
def test_a_configuration_with_all_defaults_can_be_written_and_read(name: str) -> None:
    parser = ArgumentParser()
    parser.add_argument("--data", type=ForgetRetainDataModule)
    config = parser.parse_args([f"--data={name}", "--data.forget=ForgetRandom", "--data.forget.count=5"])
    written = parser.dump(config)
    assert "Unable to serialize" not in written
    again = parser.parse_string(written)
    assert parser.dump(again) == written
    assert type(parser.instantiate(again).data).__name__ == name


def test_digits() -> None:
    datamodule = DigitsDataModule(forget=ForgetClasses(["3"]), val_fraction=0.1)
    datamodule.setup()
    counts = {name: sum(len(batch.targets) for batch in loader) for name, loader in datamodule.test_dataloader().items()}
    # 183 of the 1,797 are threes: a fifth of them is for testing (36), of the others a tenth for validation (15)
    assert sum(counts.values()) == 1797
    assert counts == {"forget": 132, "retain": 1167, "val": 143, "test": 319, "test_forget": 36}
    assert (len(datamodule.forget_indices), len(datamodule.retain_indices)) == (132, 1167)
    batch = next(iter(datamodule.test_dataloader()["retain"]))
    assert batch.inputs.shape[1:] == (1, 8, 8)
    assert batch.inputs.min() == 0
    assert batch.inputs.max() == 1
    assert datamodule.num_classes == 10


def test_digits_split_is_pinned() -> None:
    datamodule = DigitsDataModule(forget=ForgetRandom(fraction=0.1), val_fraction=0.1)
    datamodule.setup()
    assert datamodule.forget_indices.tolist()[:8] == [1, 5, 19, 34, 42, 48, 55, 59]
    assert datamodule.split == {"training_set": "eb635251ed70fa79", "forget_set": "3fd2b589a9ecac94"}


def image_folder(root: Path, size: tuple[int, int] = (12, 8), train: str = "ab", test: str = "ab") -> Path:
    """Files of one colour each: class a is dark, class b bright, and the shade tells the number."""
    for split, classes, count in (("train", train, 6), ("test", test, 2)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                shade = 10 * number + (0 if name == "a" else 100)
                Image.new("RGB", size, (shade, shade + 1, shade + 2)).save(root / split / name / f"{number}.png")
    return root


SHADES = torch.tensor([10.0 * number + offset for offset in (0, 100) for number in range(6)])


def check_folder(datamodule: ForgetRetainDataModule, size: int) -> None:
    datamodule.setup()
    assert datamodule.class_names == ["a", "b"]
    loaders = datamodule.test_dataloader()
    batches = [batch for name in ("forget", "retain") for batch in loaders[name]]
    assert sorted(i for batch in batches for i in batch.indices.tolist()) == list(range(12))
    for batch in batches:
        assert batch.inputs.shape[1:] == (3, size, size)
        channels = torch.stack([SHADES[batch.indices] + c for c in range(3)], 1) / 255
        torch.testing.assert_close(batch.inputs, channels[:, :, None, None].expand_as(batch.inputs))
        assert torch.equal(batch.targets, (batch.indices >= 6).long())
    for batch in datamodule.train_dataloader():
        assert all(part.inputs.shape[1:] == (3, size, size) for part in batch.values())


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("size", [6, 16])
def test_image_folder(tmp_path: Path, in_memory: bool, size: int) -> None:
    root = image_folder(tmp_path)
    check_folder(
        ImageFolderDataModule(root, image_size=size, in_memory=in_memory, forget=ForgetRandom(count=3), batch_size=2), size
    )


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_first_images_of_each_class(tmp_path: Path, in_memory: bool) -> None:
    root = image_folder(tmp_path)
    settings: dict[str, Any] = {"image_size": 6, "in_memory": in_memory, "forget": ForgetRandom(count=3)}
    first, whole = (ImageFolderDataModule(root, per_class=count, **settings) for count in (4, None))
    shades = []
    for datamodule in (first, whole):
        datamodule.setup()
        samples = [batch for name in ("forget", "retain") for batch in datamodule.set_dataloader(name)]
        images, indices = (torch.cat(fields) for fields in zip(*((s.inputs, s.indices) for s in samples), strict=True))
        shades.append(images[indices.argsort(), 0, 0, 0])
    assert shades[0].tolist() == shades[1][[0, 1, 2, 3, 6, 7, 8, 9]].tolist()
    assert len(first.test_dataloader()["test"].dataset) == len(whole.test_dataloader()["test"].dataset)
    with pytest.raises(ValueError, match=r"per_class must be positive, got 0\."):
        ImageFolderDataModule(root, per_class=0, forget=ForgetRandom(count=3))


def test_images_in_memory_are_decoded_once_for_many_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And again when a file has changed: the copy that is held is of files as they are."""
    root = image_folder(tmp_path)
    read: list[str] = []

    def noted(path: str) -> Image.Image:
        read.append(path)
        return read_image(path)

    def shades() -> Tensor:
        datamodule = ImageFolderDataModule(root, image_size=6, in_memory=True, forget=ForgetRandom(count=3))
        datamodule.setup()
        samples = [batch for name in ("forget", "retain") for batch in datamodule.set_dataloader(name)]
        images, indices = (torch.cat(fields) for fields in zip(*((s.inputs, s.indices) for s in samples), strict=True))
        return images[indices.argsort()]

    monkeypatch.setattr("salun_lightning.data.image_folder.read_image", noted)
    first = shades()
    of_first = len(read)
    assert of_first == len({*read}) > len(first)  # every file once, those of the test set too
    assert torch.equal(shades(), first)
    assert len(read) == of_first
    changed = next(path for path in sorted(read) if f"{os.sep}train{os.sep}" in path)
    Image.new("RGB", (8, 8), (1, 2, 3)).save(changed)
    assert (shades() != first).flatten(1).any(1).sum() == 1
    assert changed in read[of_first:]


def test_image_folder_with_workers(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    check_folder(ImageFolderDataModule(root, image_size=6, num_workers=2, forget=ForgetRandom(count=3), batch_size=2), 6)


def test_image_folder_augments_training_images_only(tmp_path: Path) -> None:
    """Left half black, right half white: a random crop or a mirror image shows; the centre crop is known."""
    for split in ("train", "test"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            picture = np.zeros((8, 8, 3), np.uint8)
            picture[:, 4:] = 255
            for number in range(8):
                Image.fromarray(picture).save(tmp_path / split / name / f"{number}.png")
    datamodule = ImageFolderDataModule(tmp_path, image_size=8, forget=ForgetRandom(count=3))
    datamodule.setup()
    torch.manual_seed(0)
    known = torch.zeros(8, 8)
    known[:, 4:] = 1
    evaluated = [batch for loader in datamodule.test_dataloader().values() for batch in loader]
    for batch in [*evaluated, *(batch["forget"] for batch in datamodule.forget_dataloader())]:
        assert torch.equal(batch.inputs, known.expand_as(batch.inputs))
    trained = torch.cat([part.inputs for batch in datamodule.train_dataloader() for part in batch.values()])
    assert len(trained.flatten(1).unique(dim=0)) > 4
    assert (trained[:, 0, 0, 0] > trained[:, 0, 0, -1]).any()  # mirrored


def test_image_folder_takes_other_transforms(tmp_path: Path) -> None:
    def black(image: Any) -> Tensor:
        return torch.zeros(3, 5, 5)

    root = image_folder(tmp_path)
    datamodule = ImageFolderDataModule(root, forget=ForgetRandom(count=3), train_transform=black, eval_transform=black)
    datamodule.setup()
    batches = [next(iter(datamodule.train_dataloader()))["retain"], next(iter(datamodule.test_dataloader()["test"]))]
    assert all(batch.inputs.shape[1:] == (3, 5, 5) for batch in batches)


def test_an_empty_transform_is_one_too(tmp_path: Path) -> None:
    nothing = nn.Sequential()
    datamodule = ImageFolderDataModule(tmp_path, forget=ForgetRandom(count=3), train_transform=nothing, eval_transform=nothing)
    assert datamodule.train_transform is datamodule.eval_transform is nothing


def test_image_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no folder '.*train'. Images are expected in train/<class>/"):
        ImageFolderDataModule(tmp_path, forget=ForgetRandom(count=3)).setup()


def test_image_folder_of_other_classes(tmp_path: Path) -> None:
    root = image_folder(tmp_path, train="ab", test="ac")
    with pytest.raises(ValueError, match="Training and test images have different classes: b, c"):
        ImageFolderDataModule(root, forget=ForgetRandom(count=3)).setup()


def folder(root: Path, **kwargs: Any) -> ImageFolderDataModule:
    return ImageFolderDataModule(root, forget=ForgetRandom(count=3), **{"image_size": 6, **kwargs})


def test_image_folder_without_a_test_folder(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images", test="")
    datamodule = folder(root)
    datamodule.setup()
    assert list(datamodule.test_dataloader()) == ["forget", "retain"]


def test_hidden_folders_and_files_are_no_images(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images")
    for hidden in (".ipynb_checkpoints", ".git/objects", "a/.ipynb_checkpoints"):
        (root / "train" / hidden).mkdir(parents=True)
        shutil.copy(root / "train" / "a" / "0.png", root / "train" / hidden)
    (root / "train" / "b" / "._0.png").write_bytes(b"what a Mac leaves behind")
    check_folder(folder(root), 6)


def test_an_empty_class_is_named(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images")
    for split in ("train", "test"):
        (root / split / "c").mkdir()
    (root / "train" / "c" / "notes.txt").write_text("none yet")
    with pytest.raises(ValueError, match=r"There is no image in '.*train/c'. Put images there, or remove the folder"):
        folder(root).setup()


def test_a_folder_without_classes(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"There is no class folder in '.*train'"):
        folder(tmp_path).setup()


def damaged(path: Path, damage: str) -> None:
    """An image of noise, so that it has many bytes, of which the second half is lost; or one of many pixels."""
    if damage == "enormous":
        Image.new("1", (40, 40)).save(path)
    elif damage == "text":
        path.write_text("no image")
    else:
        noise = np.random.RandomState(0).randint(0, 256, (64, 64, 3)).astype(np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize(
    ("name", "damage"),
    [("x.jpg", "truncated"), ("x.png", "truncated"), ("x.bmp", "truncated"), ("x.jpg", "text"), ("x.png", "enormous")],
)
def test_an_image_that_cannot_be_read_is_named_before_training(
    tmp_path: Path, name: str, damage: str, in_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000 if damage == "enormous" else 100_000)
    root = image_folder(tmp_path / "images")
    damaged(root / "train" / "b" / name, damage)
    with pytest.raises(ValueError, match=rf"'.*train/b/{name}' cannot be read: .*\. Repair it"):
        folder(root, in_memory=in_memory).setup()


def test_a_jpeg_with_something_behind_its_end_is_read(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images")
    path = root / "train" / "a" / "6.jpg"
    Image.new("RGB", (8, 8)).save(path)
    path.write_bytes(path.read_bytes() + b"what a camera adds")
    datamodule = folder(root)
    datamodule.setup()
    assert len(datamodule.forget_indices) + len(datamodule.retain_indices) == 13


def test_images_need_not_be_checked(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images")
    damaged(root / "test" / "b" / "9.jpg", "truncated")
    datamodule = folder(root, check_images=False)
    datamodule.setup()
    with pytest.raises(ValueError, match=r"'.*test/b/9\.jpg' cannot be read"):
        list(datamodule.test_dataloader()["test"])


@pytest.mark.parametrize("in_memory", [False, True])
def test_files_of_every_kind_become_rgb(tmp_path: Path, in_memory: bool) -> None:
    """Each of one colour: what is read is that colour, whatever the file's numbers mean."""
    kinds = {
        "0.png": Image.new("RGBA", (8, 8), (10, 20, 30, 128)),
        "1.png": Image.new("P", (8, 8), 3),
        "2.tif": Image.new("CMYK", (8, 8), (245, 235, 225, 0)),
        "3.png": Image.fromarray(np.full((8, 8), 20 * 257, np.uint16)),
        "4.tif": Image.fromarray(np.full((8, 8), 20 * 257, np.uint16)),
        "5.png": Image.new("LA", (8, 8), (20, 7)),
        "6.png": Image.new("1", (8, 8), 1),
    }
    kinds["1.png"].putpalette([0] * 9 + [10, 20, 30])
    kinds["1.png"].info["transparency"] = bytes(4)
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        for name, image in kinds.items():
            image.save(tmp_path / split / "a" / name)
    datamodule = folder(tmp_path, in_memory=in_memory)
    datamodule.setup()
    (batch,) = datamodule.test_dataloader()["test"]
    colour, grey = [10, 20, 30], [20, 20, 20]
    expected = torch.tensor([colour, colour, colour, grey, grey, grey, [255, 255, 255]])
    assert torch.equal((batch.inputs * 255).round()[:, :, 3, 3], expected.float())


def test_shades_of_16_bits_are_not_cut_off(tmp_path: Path) -> None:
    shades = np.arange(0, 65536, 1024, dtype=np.uint16)[None].repeat(64, 0)
    (tmp_path / "train" / "a").mkdir(parents=True)
    for number in range(4):
        Image.fromarray(shades).save(tmp_path / "train" / "a" / f"{number}.png")
    datamodule = folder(tmp_path, image_size=64)
    datamodule.setup()
    (batch,) = datamodule.test_dataloader()["forget"]
    expected = torch.from_numpy(shades.astype(np.float32) / 65535)
    torch.testing.assert_close(batch.inputs, expected.expand_as(batch.inputs), atol=0.5 / 255 + 1e-6, rtol=0)


def test_floating_point_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    for number in range(4):
        Image.new("F", (8, 8), 0.5).save(tmp_path / "train" / "a" / f"{number}.tif")
    with pytest.raises(ValueError, match="cannot be read: The image has floating-point numbers, whose scale is not known"):
        folder(tmp_path).setup()
