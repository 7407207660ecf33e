"""The commands for diffusion models, as a user gives them. Every file of theirs in configs/ is run."""

from argparse import ArgumentError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image

from salun_lightning import ClassDiffusion, SaliencyMask
from salun_lightning.cli import main
from salun_lightning.lightning_cli import UnlearningCLI

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
QUICK = ["--trainer.max_steps=2", *QUIET]
OF_DIFFUSION = [
    path.relative_to(CONFIGS)
    for path in sorted(CONFIGS.rglob("*.yaml"))
    if {"diffusion", "stl10"} & set(path.relative_to(CONFIGS).parts) or path.stem.startswith("diffusion")
]
CONTENT = {path: yaml.safe_load((CONFIGS / path).read_text()) for path in OF_DIFFUSION}
FITS = [path for path, content in CONTENT.items() if {"model", "trainer"} <= content.keys()]
COMPARISONS = [path for path, content in CONTENT.items() if "rows" in content]
OVERLAYS = [path for path, content in CONTENT.items() if content.keys() == {"out", "seeds", "cases"}]
PARTS = [path for path in OF_DIFFUSION if path not in {*FITS, *COMPARISONS, *OVERLAYS}]


class Tiny:
    """Twenty colour images of ten classes, in the place of CIFAR-10 or STL-10."""

    size: int

    def __init__(self, root: str, train: bool = True, split: str = "train", download: bool = False) -> None:
        generator = torch.Generator().manual_seed(int(train and split == "train"))
        pixels = torch.randint(0, 256, (20, self.size, self.size, 3), generator=generator, dtype=torch.uint8)
        self.data: Any = pixels.numpy()
        self.targets = [i % 10 for i in range(20)]
        self.classes = ["airplane", *(f"class{i}" for i in range(1, 10))]


class TinyCIFAR(Tiny):
    size = 32


class TinySTL(Tiny):
    size = 96

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.data, self.labels = self.data.transpose(0, 3, 1, 2), np.array(self.targets)


@pytest.fixture
def tiny_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("salun_lightning.data.cifar.CIFAR10DataModule.dataset", TinyCIFAR)
    monkeypatch.setattr("salun_lightning.data.stl10.STL10", TinySTL)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An original model of the digits, hardly trained."""
    folder = tmp_path_factory.mktemp("original")
    main(["fit", f"--config={CONFIGS}/digits/diffusion/original.yaml", f"--trainer.default_root_dir={folder}", *QUICK])
    return folder


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judge")
    main(["fit", f"--config={CONFIGS}/digits/diffusion/judge.yaml", f"--trainer.default_root_dir={folder}", *QUICK])
    return folder / "checkpoints" / "last.ckpt"


def test_every_configuration_is_of_a_kind() -> None:
    parts = {"network", "noise", "data", "quality", "sampling", "judge_network"}
    assert {path.stem for path in PARTS} <= parts
    assert [path.name for path in OVERLAYS] == ["diffusion_quick.yaml"]
    named = "".join((CONFIGS / path).read_text() for path in (*FITS, *COMPARISONS))
    assert all(f"{path.stem}.yaml" in named or path.stem == "judge_network" for path in PARTS)


@pytest.mark.parametrize("config", [path for path in FITS if path.parts[0] == "digits"], ids=str)
def test_digits_configurations_fit(config: Path, original: Path, tmp_path: Path) -> None:
    text = (CONFIGS / config).read_text()
    options = [f"--trainer.default_root_dir={tmp_path}", *QUICK]
    if "original:" in text:
        options.append(f"--model.original={original}/checkpoints/last.ckpt")
    if "SelectiveAmnesia" in text:
        options += ["--model.method.images=2", "--model.method.timesteps=2", "--model.sampling.steps=2"]
    cli = main(["fit", f"--config={CONFIGS / config}", *options])
    assert cli.trainer.global_step == 2
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == {f"network.{name}" for name in cli.model.network.state_dict()}
    assert ("SaliencyMasking" in saved["callbacks"]) == ("saliency:" in text)
    assert (tmp_path / "pipeline" / "model_index.json").is_file() == (config.stem != "judge")


@pytest.mark.parametrize("config", [path for path in FITS if path.parts[0] != "digits"], ids=str)
def test_large_configurations_fit(config: Path, tiny_images: None, tmp_path: Path) -> None:
    options = ["--data.batch_size=4", "--trainer.precision=32-true", "--trainer.callbacks=null", *QUICK]
    if config.stem == "judge":
        options.append("--data.image_size=32")
        network: list[str] = []
    else:
        blocks = len(CONTENT[config.with_name("network.yaml")]["init_args"]["block_out_channels"])
        widths = ",".join(["32"] * blocks)
        network = [
            f"--model.network.init_args.block_out_channels=[{widths}]",
            "--model.network.init_args.attention_head_dim=32",
        ]
        options.append("--model.sampling.steps=2")
    if "original:" in (CONFIGS / config).read_text():
        first = ["fit", f"--config={CONFIGS / config.with_name('original.yaml')}", *options, *network]
        main([*first, f"--trainer.default_root_dir={tmp_path}/original"])
        options.append(f"--model.original={tmp_path}/original/pipeline")
    cli = main(["fit", f"--config={CONFIGS / config}", f"--trainer.default_root_dir={tmp_path}/run", *options, *network])
    assert cli.trainer.global_step == 2


@pytest.mark.parametrize("config", COMPARISONS, ids=str)
def test_comparisons_run(config: Path, tiny_images: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    small = ["--trainer.max_steps=1", "--data.batch_size=8"]
    content = CONTENT[config]
    for row in [*content["rows"].values(), *content["first"].values()]:
        row["config"] = str((CONFIGS / config).parent / row["config"])
        if "judge" not in row["config"] and not row["config"].endswith("cifar10/original.yaml"):
            row.setdefault("options", {}).update({"model.evaluation.per_condition": 4, "model.sampling.steps": 1})
            if config.parts[0] == "cifar10":
                row["options"].update(
                    {
                        "model.network.init_args.block_out_channels": [32, 32, 32, 32],
                        "model.network.init_args.attention_head_dim": 32,
                        "model.network.init_args.layers_per_block": 1,
                        "model.evaluation.features": "classifier",
                        "model.evaluation.classifier": str(CONFIGS / "cifar10" / "small_network.yaml"),
                        "trainer.precision": "32-true",
                    }
                )
        elif config.parts[0] == "cifar10":
            row["options"].update({"model.network": str(CONFIGS / "cifar10" / "small_network.yaml")})
            row["options"]["trainer.precision"] = "32-true"
    written = tmp_path / "comparison.yaml"
    written.write_text(yaml.safe_dump(content, sort_keys=False))
    overlay = [f"--config={CONFIGS / config.parent}/{config.stem}_quick.yaml"] if config.parts[0] == "digits" else []
    report = main(["compare", f"--config={written}", *overlay, f"--out={tmp_path}/out", "--seeds=1", "--", *small])
    cells = report["cells"]
    assert [cell["row"] for cell in cells] == list(content["rows"])
    assert {cell["case"] for cell in cells} == ({"3"} if overlay else {""})
    assert {"UA", "entropy", "FID", "acc"} <= cells[0]["metrics"].keys()
    assert [cell["mask"]["drift"] for cell in cells if cell["row"].startswith("SalUn")] == [0, 0]
    assert (tmp_path / "out" / ("samples-3.png" if overlay else "samples.png")).is_file()


def test_test_and_predict(original: Path, judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = f"--config={CONFIGS}/digits/diffusion/original.yaml"
    checkpoint = f"--ckpt_path={original}/checkpoints/last.ckpt"
    common = [config, checkpoint, f"--trainer.default_root_dir={tmp_path}", "--model.sampling.steps=1", *QUIET]
    capsys.readouterr()
    main(["test", *common, f"--model.evaluation.weights={judge}", "--model.evaluation.per_condition=5"])
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines() if len(line.split()) == 2)
    assert {"UA", "entropy", "acc", "acc/3", "FID", "KID", "precision", "recall", "test/forget/loss"} <= printed.keys()
    assert float(printed["num_generated"]) == 45  # without the forgotten class
    main(
        [
            "predict",
            *common,
            "--model.evaluation.per_condition=12",
            "--model.evaluation.conditions=[3, 7]",
            "--data.batch_size=5",
        ]
    )
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["3-3", "3-3.png", "7-7", "7-7.png"]
    assert len(list((tmp_path / "images" / "7-7").iterdir())) == 12
    with Image.open(tmp_path / "images" / "3-3.png") as grid:
        assert grid.size == (10 * 9 - 1, 2 * 9 - 1)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler", "DDPMScheduler"])
def test_schedulers_from_the_command_line(scheduler: str, original: Path, tmp_path: Path) -> None:
    config = f"--config={CONFIGS}/digits/diffusion/original.yaml"
    wanted = [
        "--model.evaluation.per_condition=1",
        "--model.sampling.steps=2",
        f"--model.sampling.scheduler=diffusers.{scheduler}",
    ]
    model = f"--ckpt_path={original}/checkpoints/last.ckpt"
    cli = main(["predict", config, model, f"--trainer.default_root_dir={tmp_path}", *wanted, *QUIET])
    assert type(cli.model.scheduler).__name__ == scheduler
    assert cli.model.scheduler.config.beta_schedule == "squaredcos_cap_v2"
    assert len(list((tmp_path / "images").glob("*/*.png"))) == 10


def test_a_pipeline_directory_is_written_and_started_from(original: Path, tmp_path: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(original / "pipeline")
    config = f"--config={CONFIGS}/digits/diffusion/finetune.yaml"
    cli = main(["fit", config, f"--model.original={original}/pipeline", f"--trainer.default_root_dir={tmp_path}", *QUICK])
    assert cli.trainer.global_step == 2
    saved = torch.load(original / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, weight in pipeline.unet.state_dict().items():
        assert torch.equal(weight, saved[f"network.{name}"])
    again = ClassDiffusion.load_from_checkpoint(original / "checkpoints" / "last.ckpt")
    assert again.evaluation.per_condition == 100  # made from what the checkpoint says


def test_random_mask_and_other_methods_are_a_line_each(original: Path, tmp_path: Path) -> None:
    common = [
        f"--config={CONFIGS}/digits/diffusion/salun.yaml",
        f"--model.original={original}/checkpoints/last.ckpt",
        "--saliency.score=random",
        "--model.method=NegGradPlus",
    ]
    cli = main(["fit", *common, f"--trainer.default_root_dir={tmp_path}", *QUICK])
    mask = SaliencyMask.load(tmp_path / "checkpoints" / "last.ckpt")
    assert mask.num_kept == mask.num_weights // 2
    assert mask.metadata["score"] == "random, seed 0"
    assert type(cli.model.method).__name__ == "NegGradPlus"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model.evaluation.conditions=[cat]"], "There is no class 'cat'. The classes are: 0, 1, 2"),
        (["--model.evaluation.per_condition=0"], "per_condition must be positive, got 0"),
        (["--data.forget.names=[cat]"], "There is no class 'cat'"),
        (["--model.null_class=null", "--model.network.num_class_embeds=10"], "Guidance and label dropout need a null class"),
        (["--model.null_class=3"], "null_class 3 is the number of a class of the data"),
        (["--model.network.num_class_embeds=10"], "The network embeds 10 classes, but 11 are needed"),
        (["--model.noise_scheduler=diffusers.FlowMatchEulerDiscreteScheduler"], "does not fit: it has no variance schedule"),
        (["--model.sampling.scheduler=diffusers.FlowMatchEulerDiscreteScheduler"], "does not fit"),
        (["--model.sampling.steps=0"], "steps must be positive"),
        (["--model.method=RandomLabel", "--model.network.block_out_channels=[8, 16]"], "is built in another way"),
    ],
)
def test_bad_input_gets_one_sentence(arguments: list[str], sentence: str, original: Path, tmp_path: Path, capsys: Any) -> None:
    config = [f"--config={CONFIGS}/digits/diffusion/salun.yaml", f"--trainer.default_root_dir={tmp_path}"]
    with pytest.raises((ValueError, ArgumentError)) as stop:
        main(["fit", *config, f"--model.original={original}/pipeline", *QUICK, *arguments])
    assert sentence in capsys.readouterr().err + str(stop.value)


def test_paper_network_and_recipe(tiny_images: None) -> None:
    cli = UnlearningCLI([f"--config={CONFIGS}/cifar10/diffusion/salun.yaml", "--trainer.precision=32-true"], run=False)
    assert list(cli.model.network.config.block_out_channels) == [128, 256, 256, 256]
    assert cli.trainer.max_steps == 1000
    assert cli.model.method.alpha == pytest.approx(1e-3 * 3 * 32 * 32)
    assert cli.model.process.config.num_train_timesteps == 1000
    assert cli.model.sampling.guidance - 1 == 2  # w
    assert cli.config_init["saliency"].ratio == 0.5
