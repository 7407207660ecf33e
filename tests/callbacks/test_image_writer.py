"""The images that predict writes."""

import multiprocessing
import os
import resource
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from salun_lightning.callbacks import GenerationEvaluator, ImageWriter, PredictionsWriter
from salun_lightning.callbacks.requests import Requested
from salun_lightning.data import ForgetRandom, ForgetRetainDataModule
from tests.modules.small_runs import classifier, digits, trainer
from tests.small import free_port, numbered_images

NAMES = ["cat", "a/b c", "..", "Käfer-1.5"]
FOLDERS = ["0-cat", "1-a_b_c", "2-..", "3-Käfer-1.5"]


def image(target: int, index: int, channels: int) -> Tensor:
    """The image that belongs to a class and a number: (C, H, W), uint8, not square."""
    generator = torch.Generator().manual_seed(1000 * target + index)
    return torch.randint(0, 256, (channels, 5, 6), generator=generator, dtype=torch.uint8)


class Painter(LightningModule):
    """Predicts images as a diffusion model does."""

    def __init__(self, channels: int = 1, fail_at: int | None = None) -> None:
        super().__init__()
        self.channels = channels
        self.fail_at = fail_at
        self.asked = GenerationEvaluator(per_condition=1)

    def predict_dataloader(self) -> Any:
        return self.asked.loader(self.trainer)

    def predict_step(self, batch: Requested, batch_idx: int) -> dict[str, Any]:
        if batch_idx == self.fail_at:
            raise RuntimeError("the power failed")
        pairs = zip(batch.targets.tolist(), batch.indices.tolist(), strict=True)
        images = torch.stack([image(target, index, self.channels) for target, index in pairs])
        return {"set": "generated", "image": images, "target": batch.targets, "index": batch.indices}


def data(names: list[str] = NAMES) -> ForgetRetainDataModule:
    classes = len(names)
    return ForgetRetainDataModule(
        ForgetRandom(count=2), numbered_images(12, classes), numbered_images(12, classes), class_names=names, batch_size=5
    )


def asking(per_class: int, module: Painter | None = None, classes: Any = None) -> Painter:
    module = module or Painter()
    module.asked = GenerationEvaluator(per_class, classes)
    return module


def paint(
    folder: Path, per_class: int, module: Painter | None = None, names: list[str] = NAMES, classes: Any = None, **kwargs: Any
) -> None:
    runner = trainer(folder, **{"callbacks": [ImageWriter()], **kwargs})
    runner.predict(asking(per_class, module, classes), datamodule=data(names), return_predictions=False)


def written(folder: Path) -> dict[str, bytes]:
    """All files of a run, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_every_image_is_written_as_it_is(tmp_path: Path, channels: int, mode: str) -> None:
    paint(tmp_path, 3, Painter(channels))
    expected = [f"images/{folder}/{index:05}.png" for folder in FOLDERS for index in range(3)]
    assert sorted(written(tmp_path)) == sorted([*expected, *(f"images/{folder}.png" for folder in FOLDERS)])
    for target, folder in enumerate(FOLDERS):
        for index in range(3):
            with Image.open(tmp_path / "images" / folder / f"{index:05}.png") as opened:
                assert opened.mode == mode
            read = torch.from_numpy(pixels(tmp_path / "images" / folder / f"{index:05}.png").copy())
            assert torch.equal(read.view(5, 6, channels).permute(2, 0, 1), image(target, index, channels))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
@pytest.mark.parametrize(("number", "columns", "rows"), [(1, 1, 1), (7, 7, 1), (10, 10, 1), (23, 10, 3)])
def test_the_grid_holds_all_in_order(tmp_path: Path, channels: int, mode: str, number: int, columns: int, rows: int) -> None:
    paint(tmp_path, number, Painter(channels), names=["cat", "dog"], classes=["dog"])
    assert {path.name for path in (tmp_path / "images").iterdir()} == {"1-dog", "1-dog.png"}
    with Image.open(tmp_path / "images" / "1-dog.png") as opened:
        assert (opened.mode, opened.size) == (mode, (7 * columns - 1, 6 * rows - 1))
    expected = torch.full((channels, 6 * rows - 1, 7 * columns - 1), 255, dtype=torch.uint8)
    for index in range(number):
        top, left = 6 * (index // 10), 7 * (index % 10)
        expected[:, top : top + 5, left : left + 6] = image(1, index, channels)
    assert np.array_equal(pixels(tmp_path / "images" / "1-dog.png"), expected.permute(1, 2, 0).squeeze(2).numpy())


class Inverse(Painter):
    def predict_step(self, batch: Requested, batch_idx: int) -> dict[str, Any]:
        painted = super().predict_step(batch, batch_idx)
        return {**painted, "image": 255 - painted["image"]}


@pytest.mark.parametrize("number", [1, 10, 13])
def test_the_grid_shows_what_was_drawn_before_above_its_like(tmp_path: Path, number: int) -> None:
    paint(tmp_path / "original", number + 2)
    paint(tmp_path / "after", number, Inverse(), callbacks=[ImageWriter(tmp_path / "original" / "images")])
    paint(tmp_path / "alone", number, Inverse())
    before, after = (pixels(tmp_path / run / "images" / "0-cat.png") for run in ("original", "alone"))
    both = pixels(tmp_path / "after" / "images" / "0-cat.png")
    assert both.shape == (12 * -(-number // 10) - 1, 7 * min(10, number) - 1)
    shown = {number: (both[top - 6 : top - 1], both[top : top + 5]) for number, top in enumerate(range(6, len(both), 12))}
    for row, (above, below) in shown.items():
        width = 7 * min(10, number - 10 * row) - 1
        assert np.array_equal(below, after[6 * row : 6 * row + 5])
        assert np.array_equal(above[:, :width], before[6 * row : 6 * row + 5, :width])
        assert (above[:, width:] == 255).all()
        assert np.array_equal(above[:, :6], 255 - below[:, :6])
    images = [{name: text for name, text in written(tmp_path / run).items() if "/0000" in name} for run in ("after", "alone")]
    assert images[0] == images[1]


def test_images_to_show_before_that_are_not_there(tmp_path: Path) -> None:
    """What was drawn is kept: it may have taken hours."""
    with pytest.raises(FileNotFoundError, match=r"There is no folder '.*nothing' with images of another run: predict them f"):
        paint(tmp_path / "after", 2, callbacks=[ImageWriter(tmp_path / "nothing")])
    paint(tmp_path / "before", 2)
    Image.new("L", (60, 50)).save(tmp_path / "before" / "images" / "1-a_b_c" / "00001.png")
    with pytest.warns(UserWarning, match=r"^Of 5 images there is none of the same size in '.*', such as '.*0-cat.00002\.png'"):
        paint(tmp_path / "after", 3, callbacks=[ImageWriter(tmp_path / "before" / "images")])
    grid = pixels(tmp_path / "after" / "images" / "1-a_b_c.png")
    assert np.array_equal(grid[:5, :6], grid[6:, :6])
    assert (grid[:6, 6:] == 255).all()
    assert np.array_equal(grid[6:, 7:13], image(1, 1, 1)[0])


def test_a_later_run_replaces_all_of_an_earlier_one(tmp_path: Path) -> None:
    paint(tmp_path, 4)
    (tmp_path / "images" / "9-gone").mkdir()
    (tmp_path / "images" / "9-gone" / "00000.png").write_bytes(b"left over")
    paint(tmp_path, 2, classes=["cat"])
    paint(tmp_path / "fresh", 2, classes=["cat"])
    assert written(tmp_path / "images") == written(tmp_path / "fresh" / "images")
    assert sorted(written(tmp_path / "images")) == ["0-cat.png", "0-cat/00000.png", "0-cat/00001.png"]


@pytest.mark.parametrize("place", ["holiday.jpg", "0-cat/portrait.png", "mine/00000.png"])
def test_a_folder_of_the_user_is_set_aside(tmp_path: Path, place: str) -> None:
    """It may be called images by chance: the run folder is the working directory, unless another is given."""
    paint(tmp_path, 1)
    (tmp_path / "images" / place).parent.mkdir(exist_ok=True)
    (tmp_path / "images" / place).write_bytes(b"irreplaceable")
    before = written(tmp_path / "images")
    with pytest.warns(UserWarning, match=r"images' was set aside as 'images\.aside-\d+', because not all that it holds are"):
        paint(tmp_path, 1, classes=["cat"])
    (aside,) = tmp_path.glob("images.aside-*")
    assert written(aside) == before
    assert sorted(written(tmp_path / "images")) == ["0-cat.png", "0-cat/00000.png"]


def test_an_interrupted_run_leaves_the_images_alone(tmp_path: Path) -> None:
    paint(tmp_path, 4)
    before = written(tmp_path / "images")
    with pytest.raises(RuntimeError, match="the power failed"):
        paint(tmp_path, 3, Painter(3, fail_at=1))
    assert written(tmp_path / "images") == before
    paint(tmp_path, 2, classes=["cat"])  # nor does what it had written come back
    assert sorted(written(tmp_path)) == ["images/0-cat.png", "images/0-cat/00000.png", "images/0-cat/00001.png"]


def test_names_that_would_be_one_path_stay_apart(tmp_path: Path) -> None:
    paint(tmp_path, 1, names=["a b", "a/b", "a_b"])
    assert {path.name for path in (tmp_path / "images").iterdir() if path.is_dir()} == {"0-a_b", "1-a_b", "2-a_b"}


def test_a_name_stays_within_the_folder(tmp_path: Path) -> None:
    paint(tmp_path / "run", 1, names=["/../../escaped", ".."])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"images"}


def test_of_a_long_prompt_the_beginning_is_the_name(tmp_path: Path) -> None:
    long = ["a cat " * 60, "\u732b" * 200]  # three bytes a character
    paint(tmp_path, 1, names=[*long, "a dog"])
    names = sorted(path.stem for path in (tmp_path / "images").glob("*.png"))
    assert names == ["0-" + ("a_cat_" * 60)[:50], "1-" + "\u732b" * 50, "2-a_dog"]


class Other(LightningModule):
    """A module of another project that predicts something else."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def predict_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.output


@pytest.mark.parametrize("output", [torch.ones(2), [1], {"image": torch.ones(1)}, {"target": 1, "index": 2}])
def test_other_predictions_are_left_alone(tmp_path: Path, output: Any) -> None:
    loader: DataLoader[Any] = DataLoader(torch.arange(4))
    trainer(tmp_path, callbacks=[ImageWriter()]).predict(Other(output), loader, return_predictions=False)
    assert not list(tmp_path.iterdir())


def test_other_predictions_leave_the_images_of_an_earlier_run(tmp_path: Path) -> None:
    paint(tmp_path, 2)
    before = written(tmp_path)
    loader: DataLoader[Any] = DataLoader(torch.arange(4))
    trainer(tmp_path, callbacks=[ImageWriter()]).predict(Other([1]), loader, return_predictions=False)
    assert written(tmp_path) == before


def test_it_goes_beside_the_writer_of_probabilities(tmp_path: Path) -> None:
    callbacks = [PredictionsWriter(), ImageWriter()]
    trainer(tmp_path / "a", callbacks=callbacks).predict(classifier(), datamodule=digits(), return_predictions=False)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["predictions.csv", "predictions.safetensors"]
    trainer(tmp_path / "b", callbacks=callbacks).predict(Painter(), datamodule=data(), return_predictions=False)
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["images"]


def test_loaders_without_a_datamodule(tmp_path: Path) -> None:
    """Without names the folders are numbers."""
    loader = DataLoader([Requested(torch.tensor([0, 2]), torch.tensor([0, 0]))], batch_size=None)
    trainer(tmp_path, callbacks=[ImageWriter()]).predict(Painter(), loader, return_predictions=False)
    assert sorted(written(tmp_path / "images")) == ["0-0.png", "0-0/00000.png", "2-2.png", "2-2/00000.png"]


@pytest.fixture
def few_open_files() -> Iterator[int]:
    """As many files more than are open now as a process may open."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd")) + 40
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest, limits[1]))
    yield highest
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="it cannot be told how many files are open")
def test_more_images_of_a_class_than_files_may_be_open(tmp_path: Path, few_open_files: int) -> None:
    """The limit usually is 1,024, which is no large number of images."""
    paint(tmp_path, few_open_files + 10, names=["cat", "dog"], classes=["cat"])
    assert len(list((tmp_path / "images" / "0-cat").iterdir())) == few_open_files + 10
    assert (tmp_path / "images" / "0-cat.png").is_file()


class Noting(ImageWriter):
    """Notes which process wrote which files."""

    def on_predict_batch_end(self, trainer: Any, pl_module: LightningModule, outputs: Any, *_: Any, **__: Any) -> None:
        super().on_predict_batch_end(trainer, pl_module, outputs)
        pairs = zip(outputs["target"].tolist(), outputs["index"].tolist(), strict=True)
        with (Path(trainer.default_root_dir) / f"by-{trainer.global_rank}.txt").open("a") as notes:
            notes.writelines(f"{target} {index}\n" for target, index in pairs)


def one_of_two(folder: Path, rank: str) -> None:
    os.environ["LOCAL_RANK"] = rank
    paint(folder, 7, devices=2, strategy="ddp", callbacks=[Noting()])
    torch.distributed.destroy_process_group()


def start_processes(folder: Path) -> None:
    """Forks of this process, so that the imports are paid for once."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=one_of_two, args=(folder, rank)) for rank in "01"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))


def test_two_processes_write_what_one_does(tmp_path: Path) -> None:
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0", "OMP_NUM_THREADS": "1"}
    paint(tmp_path / "two", 9)  # what was there
    command = [sys.executable, "-m", "tests.callbacks.test_image_writer", str(tmp_path / "two")]
    subprocess.run(command, env={**os.environ, **meeting, "LOCAL_RANK": "0"}, timeout=120, check=True)
    paint(tmp_path / "one", 7)
    assert written(tmp_path / "two" / "images") == written(tmp_path / "one" / "images")
    shares = [(tmp_path / "two" / f"by-{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    assert min(len(share) for share in shares) >= 12
    assert len(shares[0] + shares[1]) == len({*shares[0], *shares[1]}) == 28
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"images", "by-0.txt", "by-1.txt"}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    start_processes(Path(sys.argv[1]))
