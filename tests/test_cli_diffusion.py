"""The commands for diffusion models, as a user gives them."""

from argparse import ArgumentError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from salun_lightning import ClassDiffusion, SaliencyMask
from salun_lightning.cli import main

ORIGINAL, FINETUNE, SALUN = (
    ["--config=digits_diffusion", f"--config={name}"]
    for name in ("digits_diffusion/original", "method/finetune", "method/salun_diffusion")
)
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
QUICK = ["--trainer.max_steps=2", *QUIET]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An original model of the digits, hardly trained."""
    folder = tmp_path_factory.mktemp("original")
    main(["fit", *ORIGINAL, f"--trainer.default_root_dir={folder}", *QUICK])
    return folder


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judge")
    main(["fit", "--config=digits", "--config=digits/judge", f"--trainer.default_root_dir={folder}", *QUICK])
    return folder / "checkpoints" / "last.ckpt"


def test_test_and_predict(original: Path, judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = f"--ckpt_path={original}/checkpoints/last.ckpt"
    common = [*ORIGINAL, checkpoint, f"--trainer.default_root_dir={tmp_path}", "--model.sampling.steps=1", *QUIET]
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
    again = [f"--trainer.default_root_dir={tmp_path / 'after'}", "--trainer.callbacks+=ImageWriter"]
    asked = ["--model.evaluation.per_condition=12", "--model.evaluation.conditions=3"]
    main(["predict", *common, *asked, *again, f"--trainer.callbacks.before={tmp_path / 'images'}"])
    with Image.open(tmp_path / "after" / "images" / "3-3.png") as grid:
        assert grid.size == (10 * 9 - 1, 4 * 9 - 1)  # once, by the one that was given
        assert np.array_equal(np.asarray(grid)[:8], np.asarray(grid)[9:17])  # the same model


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler", "DDPMScheduler"])
def test_schedulers_from_the_command_line(scheduler: str, original: Path, tmp_path: Path) -> None:
    wanted = [
        "--model.evaluation.per_condition=1",
        "--model.sampling.steps=2",
        f"--model.sampling.scheduler=diffusers.{scheduler}",
    ]
    model = f"--ckpt_path={original}/checkpoints/last.ckpt"
    cli = main(["predict", *ORIGINAL, model, f"--trainer.default_root_dir={tmp_path}", *wanted, *QUIET])
    assert type(cli.model.scheduler).__name__ == scheduler
    assert cli.model.scheduler.config.beta_schedule == "squaredcos_cap_v2"
    assert len(list((tmp_path / "images").glob("*/*.png"))) == 10


def test_a_pipeline_directory_is_written_and_started_from(original: Path, tmp_path: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(original / "pipeline")
    cli = main(["fit", *FINETUNE, f"--model.original={original}/pipeline", f"--trainer.default_root_dir={tmp_path}", *QUICK])
    assert cli.trainer.global_step == 2
    saved = torch.load(original / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, weight in pipeline.unet.state_dict().items():
        assert torch.equal(weight, saved[f"network.{name}"])
    again = ClassDiffusion.load_from_checkpoint(original / "checkpoints" / "last.ckpt")
    assert again.evaluation.per_condition == 100  # made from what the checkpoint says


def test_random_mask_and_other_methods_are_a_line_each(original: Path, tmp_path: Path) -> None:
    common = [
        *SALUN,
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
        (["--model.null_class=10", "--model.network.num_class_embeds=10"], "The network embeds 10 classes, but 11 are needed"),
        (["--model.noise_scheduler=diffusers.FlowMatchEulerDiscreteScheduler"], "does not fit: it has no variance schedule"),
        (["--model.sampling.scheduler=diffusers.FlowMatchEulerDiscreteScheduler"], "does not fit"),
        (["--model.sampling.steps=0"], "steps must be positive"),
        (["--model.method=RandomLabel", "--model.network.block_out_channels=[8, 16]"], "is built in another way"),
    ],
)
def test_bad_input_gets_one_sentence(arguments: list[str], sentence: str, original: Path, tmp_path: Path, capsys: Any) -> None:
    config = [*SALUN, f"--trainer.default_root_dir={tmp_path}"]
    with pytest.raises((ValueError, ArgumentError)) as stop:
        main(["fit", *config, f"--model.original={original}/pipeline", *QUICK, *arguments])
    assert sentence in capsys.readouterr().err + str(stop.value)
