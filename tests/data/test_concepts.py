"""Images with prompts: from tables, from folders, and drawn by a pipeline."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from salun_lightning.callbacks import GenerationEvaluator
from salun_lightning.data import ConceptDataModule, DrawnImages, ForgetConcepts
from salun_lightning.methods import Remap
from salun_lightning.modules.sampling import Sampling
from salun_lightning.modules.text_to_image import TextToImage
from salun_lightning.networks import SmallResNet
from salun_lightning.networks.text_to_image import small_text_to_image
from tests.modules.small_runs import trainer
from tests.modules.test_text_to_image import stable_diffusion

CHURCH = ForgetConcepts({"church": "golf ball"})


def picture(path: Path, colour: int, size: tuple[int, int] = (20, 12)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), colour, np.uint8)).save(path)


def imagenette(root: Path) -> Path:
    """Four images of three classes, with others to test."""
    for folder, colour in {"n03028079": 10, "n03445777": 20, "a pond": 30}.items():
        for number in range(4):
            picture(root / "train" / folder / f"{number}.JPEG", colour + number)
        picture(root / "val" / folder / "9.JPEG", colour)
    return root


def table(folder: Path, rows: list[tuple[str, str]], header: tuple[str, str] = ("file_name", "text")) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return folder


def ready(root: Path, **settings: Any) -> ConceptDataModule:
    data = ConceptDataModule(root, **{"forget": CHURCH, "image_size": 8, "batch_size": 3, **settings})
    data.setup()
    return data


def test_the_folders_of_imagenette_by_their_names(tmp_path: Path) -> None:
    data = ready(imagenette(tmp_path), further=["an image of a chapel"])
    things = ["a pond", "church", "golf ball", "chapel"]
    assert data.class_names == [f"an image of a {thing}" for thing in things]
    assert data.anchors == {1: "an image of a golf ball"}
    assert data.forgotten_classes == [1]
    assert data.forget_indices.tolist() == [4, 5, 6, 7]
    assert data.contents.tolist() == [[-1], [497], [574], [-1]]
    samples = data.probe()
    assert samples.inputs.shape == (2, 3, 8, 8)
    torch.testing.assert_close(samples.inputs[0].mean(), torch.tensor(10 / 255), atol=0.01, rtol=0)
    sets = {
        name: {int(target) for batch in loader for target in batch.targets} for name, loader in data.test_dataloader().items()
    }
    assert sets == {"forget": {1}, "retain": {0, 2}, "test": {0, 2}, "test_forget": {1}}


def test_further_prompts_are_evaluated_alone(tmp_path: Path) -> None:
    """Methods are not told of them: neither those to preserve, nor those that name the concept."""
    known = ready(imagenette(tmp_path))
    told = ready(imagenette(tmp_path), further=["an image of a chapel", "a drawing of a church"])
    assert told.class_names[:3] == known.class_names
    assert told.trained_classes == known.trained_classes == [0, 1, 2]
    assert told.anchors == known.anchors
    assert told.forgotten_classes == [1, 4]


def test_a_longer_thing_is_not_taken_for_a_shorter_one(tmp_path: Path) -> None:
    data = ready(imagenette(tmp_path), further=["a church organ"], classes={"church": 497, "church organ": 1, "pond": 5})
    assert data.contents.tolist() == [[5], [497], [-1], [1]]


def test_a_prompt_and_names_and_classes_of_ones_own(tmp_path: Path) -> None:
    settings = {"prompt": "a photo of one {}", "names": {"n03028079": "old church", "a pond": "lake"}, "classes": {"lake": 3}}
    data = ready(imagenette(tmp_path), **settings)
    assert data.class_names == ["a photo of one lake", "a photo of one old church", "a photo of one golf ball"]
    assert data.contents.tolist() == [[3], [-1], [-1]]


def test_a_table_of_images_and_prompts(tmp_path: Path) -> None:
    for number in range(3):
        picture(tmp_path / "images" / f"{number}.png", 40 * number)
    rows = [
        ("images/0.png", "a church by a river"),
        ("images/1.png", "a river, in spring"),
        ("images/2.png", "a church by a river"),
    ]
    data = ready(table(tmp_path, rows), forget=ForgetConcepts({"church": "mill"}))
    assert data.class_names == ["a church by a river", "a river, in spring"]
    assert data.anchors == {0: "a mill by a river"}
    assert data.forget_indices.tolist() == [0, 2]
    forget = next(iter(data.forget_dataloader())).get("forget")
    torch.testing.assert_close(forget.inputs.mean((1, 2, 3)), torch.tensor([0.0, 80 / 255]), atol=1e-6, rtol=0)
    assert "test" not in data.test_dataloader()


def test_images_to_test_do_not_lie_among_those_to_train(tmp_path: Path) -> None:
    for thing in ("church", "golf ball"):
        picture(tmp_path / thing / "0.png", 5)
        picture(tmp_path / "test" / thing / "1.png", 7)
    data = ready(tmp_path)
    assert data.class_names == ["an image of a church", "an image of a golf ball"]
    assert [path.name for path in data._train.paths] == ["0.png", "0.png"]
    assert [path.name for path in data._sets["test"][0].paths] == ["1.png", "1.png"]


def test_an_image_is_scaled_and_its_centre_taken(tmp_path: Path) -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    picture(tmp_path / "other.png", 3)
    data = ready(table(tmp_path, [("wide.png", "a church"), ("other.png", "a golf ball")]), image_size=10)
    image = data.probe().inputs[0]
    assert image.shape == (3, 10, 10)
    torch.testing.assert_close(image, torch.ones_like(image))


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (
            [("0.png", "a church"), ("7.png", "a golf ball")],
            ("file_name", "text"),
            r"Line 3 of '.*' names '7\.png', which is no file",
        ),
        ([("0.png", " ")], ("file_name", "text"), "Line 2 of '.*' needs a file_name and a text"),
        ([("0.png", "a church")], ("image", "prompt"), "Line 2 of '.*' needs a file_name and a text"),
        ([], ("file_name", "text"), r"There is no image in '.*'\. Give it a table 'metadata\.csv'"),
        ([("0.png", "a pond")], ("file_name", "text"), "No prompt names the concept 'church'"),
    ],
)
def test_a_table_that_is_wrong(rows: Any, header: Any, message: str, tmp_path: Path) -> None:
    picture(tmp_path / "0.png", 0)
    with pytest.raises(ValueError, match=message):
        ready(table(tmp_path, rows, header))


def test_the_types_of_image_files_that_torchvision_reads(tmp_path: Path) -> None:
    for number, suffix in enumerate([".tif", ".ppm", ".webp"]):
        picture(tmp_path / "a church" / f"{number}{suffix}", number)
    for number, suffix in enumerate([".png", ".bmp", ".tiff"]):
        picture(tmp_path / "a golf ball" / f"{number}{suffix}", number)
    data = ready(tmp_path, prompt="{}")
    assert [len(part) for part in (data.forget_indices, data.retain_indices)] == [3, 3]


def test_folders_that_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no image in"):
        ready(tmp_path)
    with pytest.raises(ValueError, match=r"There is no folder '.*nothing'"):
        ready(tmp_path / "nothing")
    (imagenette(tmp_path) / "train" / "a tree").mkdir()
    with pytest.raises(ValueError, match=r"There is no image in '.*a tree'\. Put images there, or remove the folder"):
        ready(tmp_path)
    (tmp_path / "train" / "a tree" / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"0\.png' cannot be read: it is not an image"):
        ready(tmp_path)
    with pytest.raises(ValueError, match=r"names nothing: put \{\} where the name is to stand"):
        ConceptDataModule(tmp_path, prompt="an image", forget=CHURCH)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("pipeline") / "small"
    small_text_to_image("a an person in clothes nude photo of").save_pretrained(folder)
    return str(folder)


def drawn(pipeline: str, **settings: Any) -> DrawnImages:
    prompts = {"a nude person": 3, "a person in clothes": 2}
    return DrawnImages(pipeline, **{"prompts": prompts, "steps": 2, "guidance": 2.0, "batch_size": 2, **settings})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def test_images_are_drawn_and_trained_on(pipeline: str, tmp_path: Path) -> None:
    data = ConceptDataModule(
        tmp_path / "images",
        drawn=drawn(pipeline),
        image_size=8,
        forget=ForgetConcepts({"a nude person": "a person in clothes"}),
    )
    with pytest.raises(ValueError, match="are not drawn yet"):
        data.setup()
    data.prepare_data()
    data.setup()
    assert data.class_names == ["a nude person", "a person in clothes"]
    assert data._train_targets.tolist() == [0, 0, 0, 1, 1]
    assert data.forget_indices.tolist() == [0, 1, 2]


def test_what_was_broken_off_goes_on_with_the_same_images(
    pipeline: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn(pipeline).draw(tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    assert len(whole) == len(set(whole.values())) == 5
    drawn(pipeline).draw(tmp_path / "parts")
    for name in sorted(whole)[1:4]:
        (tmp_path / "parts" / name).unlink()
    drawn(pipeline, batch_size=3).draw(tmp_path / "parts")
    apart = [
        np.abs(
            np.asarray(Image.open(tmp_path / "whole" / name), float) - np.asarray(Image.open(tmp_path / "parts" / name), float)
        )
        for name in whole
    ]
    assert contents(tmp_path / "parts").keys() == whole.keys()
    assert max(one.max() for one in apart) <= 1  # another batch, rounded to another of 256 levels at most
    monkeypatch.setattr(DrawnImages, "_draw", lambda *_: pytest.fail("everything is there"))
    drawn(pipeline).draw(tmp_path / "parts")


def test_more_can_be_drawn_but_not_in_another_way(pipeline: str, tmp_path: Path) -> None:
    drawn(pipeline, prompts={"a nude person": 1}).draw(tmp_path)
    first = contents(tmp_path)
    drawn(pipeline).draw(tmp_path)
    assert first.items() <= contents(tmp_path).items()
    with pytest.raises(ValueError, match=r"drawn with pipeline .*, steps 2, .* and now it is .*, steps 3"):
        drawn(pipeline, steps=3).draw(tmp_path)
    with pytest.raises(ValueError, match="steps must be positive, got 0"):
        drawn(pipeline, steps=0)
    with pytest.raises(ValueError, match="No prompt is given"):
        drawn(pipeline, prompts={})
    with pytest.raises(ValueError, match="cannot be read as a text-to-image pipeline"):
        drawn(str(tmp_path / "no pipeline")).draw(tmp_path / "other")


def test_the_trainer_draws_before_it_trains_and_what_is_drawn_is_judged(pipeline: str, tmp_path: Path) -> None:
    stable_diffusion("1").save_pretrained(tmp_path / "sd")
    images = DrawnImages(str(tmp_path / "sd"), {"a dog": 2, "a cat": 2}, steps=1, guidance=1.0)
    data = ConceptDataModule(
        tmp_path / "images",
        drawn=images,
        image_size=16,
        forget=ForgetConcepts({"dog": "cat"}),
        batch_size=2,
        further=["a cat beside a dog", "a cat beside a cat"],
        classes={"a dog": 4, "a cat": 2},
    )
    judge = SmallResNet(num_classes=5, in_channels=3, width=4, stages=2)
    module = TextToImage(
        str(tmp_path / "sd"),
        method=Remap(to="anchor"),
        sampling=Sampling(steps=2, guidance=2.0),
        evaluation=GenerationEvaluator(per_condition=4, classifier=judge, features="classifier"),
    )
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, datamodule=data)
    assert run.global_step == 1
    run.test(module, datamodule=data, verbose=False)
    assert data.contents.tolist() == [[4], [2], [-1], [2]]
    said = module.predictions
    assert said is not None
    assert [*said.sets] == ["generated/image"]
    assert sorted(said.sets["generated/image"].targets.tolist()) == [2] * 8 + [4] * 4
    logged = {name.removeprefix("test/") for name in run.callback_metrics}
    assert {"UA", "acc"} <= logged
    assert module.evaluation.distribution is not None
    narrow = TextToImage(pipeline, method=Remap(to="anchor"), sampling=Sampling(steps=2, guidance=2.0))
    with pytest.raises(ValueError, match="The images have 3 channels, and the VAE takes 1"):
        trainer(tmp_path, max_epochs=1).fit(narrow, datamodule=data)
