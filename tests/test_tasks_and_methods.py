"""Methods that ship are run on tasks, each on some of them, and all other configurations. A new file needs no new test."""

import json
import re
from argparse import ArgumentError
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from salun_lightning import SaliencyMask
from salun_lightning.cli import main
from salun_lightning.comparison import settings
from salun_lightning.comparison.plan import Plan
from salun_lightning.comparison.rows import Row
from salun_lightning.configurations import SHIPPED
from salun_lightning.data import DigitsDataModule, ImageTensors, Sources
from salun_lightning.lightning_cli import UnlearningCLI
from salun_lightning.sentences import sentence
from tests.modules.test_text_to_image import stable_diffusion

NAMES = sorted(str(path.relative_to(SHIPPED).with_suffix("")) for path in SHIPPED.rglob("*.yaml"))
TEXTS = {name: (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8") for name in NAMES}
TASKS = [name for name in NAMES if "/" not in name]
METHODS = [name for name in NAMES if name.startswith("method/")]
TUNED = [name for name in NAMES if "/tuned/" in name]
COMPARISONS = [name for name in NAMES if name.startswith("compare/") or name.endswith("/compare")]
BESIDE = [name for name in NAMES if name.partition("/")[0] in TASKS and name not in {*TASKS, *TUNED, *COMPARISONS}]
FIRST = {name: text.splitlines()[0].lower() for name, text in TEXTS.items()}  # a comment, which says what a method is for
FOR_DIFFUSION = {name for name in METHODS if "diffusion" in FIRST[name]}
FOR_PROMPTS = {name for name in METHODS if "for a concept" in FIRST[name]}
FOR_CLASSIFIERS = {name for name in METHODS if "classifiers" in FIRST[name]}
OF_WHOLE_CLASSES = {name for name in METHODS if "whole classes" in FIRST[name]}
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
NETWORK = {"class_path": "SmallResNet", "init_args": {"num_classes": 10, "in_channels": 3, "width": 16, "stages": 1}}
SHOWN = {  # prompts of tasks whose pipelines and images would have to be downloaded
    "imagenette": ["an image of a church", "an image of a French horn"],
    "nudity": ["a photo of a nude person", "a photo of a person wearing clothes"],
}
SMALLER = {  # of methods that are slow by themselves
    "ConceptAblation": ["--model.method.images=1"],
    "ESD": ["--model.method.steps=2"],
    "SelectiveAmnesia": ["--model.method.images=1", "--model.method.timesteps=2"],
}


class Tiny:
    """Forty colour images of ten classes, in the place of CIFAR-10 or STL-10."""

    size = 8

    def __init__(self, root: str, train: bool = True, split: str = "train", download: bool = False) -> None:
        generator = torch.Generator().manual_seed(int(train and split == "train"))
        pixels = torch.randint(0, 256, (40, self.size, self.size, 3), generator=generator, dtype=torch.uint8)
        self.data: Any = pixels.numpy()
        self.targets = [i % 10 for i in range(40)]
        self.classes = ["airplane", *(f"class{i}" for i in range(1, 10))]


class TinySTL(Tiny):
    size = 16

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.data, self.labels = self.data.transpose(0, 3, 1, 2), np.array(self.targets)


class TinyDigits(DigitsDataModule):
    def load(self) -> Sources:
        train, test, names = super().load()
        return Sources(*(ImageTensors(part.images[:60], part.targets[:60]) for part in (train, test)), names)


def draws(task: str) -> bool:
    return "ClassDiffusion" in TEXTS[task] or has_prompts(task)


def has_prompts(task: str) -> bool:
    return "TextToImage" in TEXTS[task]


def small(task: str, folder: Path) -> list[str]:
    """Options that make a run of the task short."""
    options = [*QUIET, "--trainer.precision=32-true", "--trainer.callbacks=null", "--data.batch_size=8"]
    content = yaml.safe_load(TEXTS[task])
    if content["data"]["class_path"] == "ImageFolderDataModule":
        options.append(f"--data.root={folder}/images")
    if "image_size" in content["data"]["init_args"]:
        options.append("--data.image_size=16")
    if draws(task):
        options.append("--model.sampling.steps=2")
    elif task != "digits":
        options.append(f"--model.network={json.dumps(NETWORK)}")
    network = content["model"]["init_args"].get("network", {}).get("init_args", {})
    if "DigitPromptsDataModule" in TEXTS[task]:
        options.append("--data.pairs=20")
    if task in SHOWN:
        options += [f"--data.root={folder}/shown/{task}", f"--model.pipeline={folder}/pipeline", "--model.evaluation=null"]
        options += ["--data.drawn=null", "--data.image_size=16"]
    if "attention_head_dim" in network:
        widths = [8] * len(network["block_out_channels"])
        unet = {"block_out_channels": widths, "attention_head_dim": 8, "norm_num_groups": 4, "layers_per_block": 1}
        options += [f"--model.network.init_args.{name}={value}" for name, value in unet.items()]
    return options


def few(task: str, request: dict[str, Any] | None = None) -> list[str]:
    """Options for few images, of which some of each class are set aside for validation, which some methods ask for."""
    digits = "DigitsDataModule" in TEXTS[task]
    options = [*(["--data=TinyDigits"] if digits else []), "--data.val_fraction=0.25"]
    if request is None and digits and "ForgetIndices" in TEXTS[task]:  # by numbers that there are not
        request = {"class_path": "ForgetRandom", "init_args": {"fraction": 0.2}}
    return options if request is None else [*options, f"--data.forget={json.dumps(request)}"]


def configured(*names: str) -> list[str]:
    return [f"--config={name}" for name in names]


def at_once(options: list[str], path: Path) -> list[str]:
    """The same options as a configuration: the parser takes each option of a command by itself, which is slow."""
    content = {name.removeprefix("--"): yaml.safe_load(value) for name, _, value in (word.partition("=") for word in options)}
    another = content.pop("data", None)  # class: beside dotted keys, a file cannot say it
    path.write_text(yaml.safe_dump(content))
    return [f"--config={path}", *([] if another is None else [f"--data={another}"])]


def fits(method: str, task: str) -> bool:
    others = set() if has_prompts(task) else FOR_PROMPTS
    return method not in (FOR_CLASSIFIERS if draws(task) else FOR_DIFFUSION) | others


def pairs() -> Iterator[tuple[str, str]]:
    """Each method with two tasks of its kind and one of the other kind, in turn: there are too many to run all pairs."""
    for number, method in enumerate(METHODS):
        drawing = method in FOR_DIFFUSION | FOR_PROMPTS
        own = [task for task in TASKS if draws(task) == drawing and (has_prompts(task) or method not in FOR_PROMPTS)]
        others = [task for task in TASKS if task not in own]
        chosen = [own[number % len(own)], own[(number + 1) % len(own)], others[number % len(others)]]
        yield from ((task, method) for task in dict.fromkeys(chosen))


def one_parser() -> Callable[..., None]:
    """A parser for all commands of these tests, because to make it takes longer than to use it."""
    kept: dict[str, Any] = {}
    set_up = UnlearningCLI.setup_parser

    def setup_parser(cli: UnlearningCLI, add_subcommands: bool, *arguments: Any) -> None:
        if not add_subcommands:
            set_up(cli, add_subcommands, *arguments)
        elif kept:
            vars(cli).update(kept)
        else:
            before = {*vars(cli)}
            set_up(cli, add_subcommands, *arguments)
            kept.update({name: value for name, value in vars(cli).items() if name not in before})

    return setup_parser


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where images lie, with small data sets in the place of large ones."""
    folder = tmp_path_factory.mktemp("place")
    data = Tiny("")
    for split in ("train", "test"):
        for number, (pixels, target) in enumerate(zip(data.data, data.targets, strict=True)):
            path = folder / "images" / split / data.classes[target] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    words = " ".join(word for prompts in SHOWN.values() for prompt in prompts for word in prompt.split())
    stable_diffusion("1", words=words, length=8).save_pretrained(folder / "pipeline")
    for task, prompts in SHOWN.items():
        (folder / "shown" / task).mkdir(parents=True)
        rows = [f"{number}.png,{prompts[number % 2]}\n" for number in range(16)]
        (folder / "shown" / task / "metadata.csv").write_text("".join(["file_name,text\n", *rows]))
        for number, pixels in enumerate(data.data[:16]):
            Image.fromarray(pixels).save(folder / "shown" / task / f"{number}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("salun_lightning.data.cifar.CIFAR10DataModule.dataset", Tiny)
        patch.setattr("salun_lightning.data.stl10.STL10", TinySTL)
        patch.setattr(UnlearningCLI, "setup_parser", one_parser())
        yield folder


@pytest.fixture(scope="module")
def originals(place: Path) -> dict[str, Path]:
    """An original model of each task, hardly trained."""
    folders = {task: place / task for task in TASKS}
    for task, folder in folders.items():
        folder.mkdir()
        quick = [*small(task, place), *few(task), "--trainer.max_steps=1", "--trainer.limit_val_batches=0"]
        quick += ["--model.original=null", f"--trainer.default_root_dir={folder}"]
        beside = configured(task, *[name for name in BESIDE if name == f"{task}/original"])
        main(["fit", *beside, *at_once(quick, folder / "small.yaml")])
    return {task: folder / "checkpoints" / "last.ckpt" for task, folder in folders.items()}


def test_every_file_is_of_a_kind() -> None:
    assert sorted([*TASKS, *METHODS, *TUNED, *COMPARISONS, *BESIDE]) == NAMES
    assert {f"method/{name.rpartition('/')[2]}" for name in TUNED} <= set(METHODS)
    assert 0 < len(FOR_DIFFUSION) < len(METHODS)
    assert not FOR_DIFFUSION & FOR_CLASSIFIERS
    assert OF_WHOLE_CLASSES <= FOR_CLASSIFIERS
    assert {draws(task) for task in TASKS} == {True, False}


@pytest.mark.parametrize(("task", "method"), [*pairs()])
def test_methods_run_on_tasks_that_they_fit(
    task: str, method: str, originals: dict[str, Path], place: Path, tmp_path: Path
) -> None:
    """What a method's file calls a method for diffusion, or for classifiers, is refused in one sentence by the other kind."""
    whole = {"class_path": "ForgetClasses", "init_args": {"names": [0]}} if method in OF_WHOLE_CLASSES else None
    options = [*small(task, place), *few(task, whole), f"--model.original={originals[task]}"]
    options += [f"--trainer.default_root_dir={tmp_path}", "--trainer.fast_dev_run=1"]
    command = ["fit", *configured(task, method), *at_once(options, tmp_path / "small.yaml")]
    command += [word for name, words in SMALLER.items() if name in TEXTS[method] for word in words]
    if not fits(method, task):
        with pytest.raises((ValueError, ArgumentError)) as refused:
            main(command)
        told = sentence(refused.value, command)
        of_task = "TextToImage" if has_prompts(task) else "ClassDiffusion" if draws(task) else "ImageClassifier"
        of_method = "classifier" if method in FOR_CLASSIFIERS else "diffusion|text-to-image"
        no_anchor = "The forget request names no anchor.*" if method in FOR_PROMPTS and draws(task) else "never"
        assert re.fullmatch(rf"\w+ is a method for ({of_method}) models; {of_task} is none\.|{no_anchor}", told), told
        return
    cli = main(command)
    assert cli.trainer.global_step == 1
    assert type(cli.model.method).__name__ in TEXTS[method]
    assert ("saliency" in TEXTS[method]) == (cli.config_init["fit"]["saliency"] is not None)


@pytest.mark.parametrize("name", [name for name in BESIDE if not name.endswith("/original")])
def test_what_lies_beside_a_task_runs(name: str, place: Path, tmp_path: Path) -> None:
    task = name.partition("/")[0]
    options = [*small(task, place), f"--trainer.default_root_dir={tmp_path}", "--trainer.fast_dev_run=1"]
    options.append("--model.original=null")  # some replace the data that it was trained on
    if "ForgetIndices" in TEXTS[name]:  # of images that there are not
        options.append('--data.forget={"class_path": "ForgetRandom", "init_args": {"fraction": 0.2}}')
    assert main(["fit", *configured(task, name), *options]).trainer.global_step == 1


@pytest.mark.parametrize("name", TUNED)
def test_what_was_tuned_fits_its_method(name: str, place: Path) -> None:
    request, _, method = name.partition("/tuned/")
    task = request.partition("/")[0]
    cli = UnlearningCLI([*configured(task, request, f"method/{method}", name), *small(task, place)], run=False)
    assert type(cli.model.method).__name__ in TEXTS[f"method/{method}"]
    rate = yaml.safe_load(TEXTS[name]).get("model.optimizer.lr")
    made = cli.model.configure_optimizers()
    (group,) = (made["optimizer"] if isinstance(made, dict) else made).param_groups
    assert rate in (None, group.get("initial_lr", group["lr"]))  # the first by a schedule


@pytest.mark.parametrize("name", [name for name in COMPARISONS if "rows:" in TEXTS[name]])
def test_every_row_of_a_comparison_is_accepted(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows that differ in values alone, one."""
    planned: list[tuple[Plan, dict[str, Row], Any]] = []

    def noted(plan: Plan, rows: dict[str, Row], seeds: Any, cases: Any) -> None:
        planned.append((plan, rows, cases))
        raise KeyboardInterrupt

    add = Plan.add
    monkeypatch.setattr(Plan, "add", noted)
    with pytest.raises(KeyboardInterrupt):
        main(["compare", "-c", name.removeprefix("compare/"), f"--out={tmp_path}"])
    ((plan, rows, cases),) = planned
    last = dict(list(cases.items())[-1:])
    rows = {name: row for name, row in rows.items() if not row.only or {*row.only} & {*last}}
    kinds = {(*row.files, *row.options): name for name, row in rows.items()}
    chosen = {name: rows[name] for name in {"original", *kinds.values()}}
    of_last = {name: {case: row.cases[case] for case in last if case in row.cases} for name, row in chosen.items()}
    add(plan, {name: replace(row, cases=of_last[name]) for name, row in chosen.items()}, [1], last)
    assert {cell.row for cell in plan.cells} == {"original", *kinds.values()}
    assert all((cell.original is None) == ("etrain" in cell.row or cell.row == "original") for cell in plan.cells)


def test_the_main_job_runs_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(settings, "_read", {})
    quick = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.accelerator=cpu"]
    report = main(["compare", "-c", "digits", "--seeds=1", "--only=[Retrain, SalUn]", "--", *quick])
    assert [cell["row"] for cell in report["cells"]] == ["original", "Retrain", "SalUn"]
    assert [cell["mask"]["drift"] for cell in report["cells"] if cell["row"] == "SalUn"] == [0]
    out = tmp_path / "runs" / "compare" / "digits"
    assert report["cells"][2]["command"].startswith("python train.py fit ")
    assert "--config digits --config method/salun --config digits/tuned/salun" in report["cells"][2]["command"]
    mask = SaliencyMask.load(out / "salun" / "seed-1" / "checkpoints" / "last.ckpt")
    assert mask.num_kept == mask.num_weights // 2


def test_networks_and_recipes_of_the_paper(place: Path) -> None:
    words = configured("cifar10", "method/salun", "cifar10/tuned/salun")
    cli = UnlearningCLI([*words, *QUIET, "--trainer.precision=32-true"], run=False)
    assert sum(weight.numel() for weight in cli.model.parameters()) == 11_173_962
    assert cli.trainer.max_epochs == 10
    optimizer = cli.model.make_optimizer(cli.model.parameters())
    assert (optimizer.defaults["lr"], optimizer.defaults["momentum"], optimizer.defaults["weight_decay"]) == (0.013, 0.9, 5e-4)
    assert cli.config_init["saliency"].source.ratio == 0.5
    words = configured("cifar10_diffusion", "method/salun_diffusion", "cifar10_diffusion/tuned/salun_diffusion")
    cli = UnlearningCLI([*words, *QUIET, "--trainer.precision=32-true"], run=False)
    assert list(cli.model.network.config.block_out_channels) == [128, 256, 256, 256]
    assert cli.trainer.max_steps == 1000
    assert cli.model.method.alpha == pytest.approx(1e-3 * 3 * 32 * 32)
    assert cli.model.process.config.num_train_timesteps == 1000
    assert cli.model.sampling.guidance - 1 == 2  # w
    assert cli.config_init["saliency"].source.ratio == 0.5
