"""The commands, as a user gives them. Every file in configs/ is run."""

import json
import subprocess
import sys
from argparse import ArgumentError
from pathlib import Path

import pytest
import torch
import yaml
from torchvision.datasets import CIFAR10

from salun_lightning import SaliencyMask
from salun_lightning.cli import main
from salun_lightning.lightning_cli import UnlearningCLI

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
QUICK = ["--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
CONTENT = {
    path.relative_to(CONFIGS): yaml.safe_load(path.read_text())
    for path in sorted(CONFIGS.rglob("*.yaml"))
    if not {"diffusion", "stl10"} & set(path.relative_to(CONFIGS).parts) and not path.stem.startswith(("diffusion", "pilot"))
}  # the others are in test_cli_diffusion.py and test_forgets.py
FIT_CONFIGS = [path for path, content in CONTENT.items() if {"model", "trainer"} <= content.keys()]
COMPARE_CONFIGS = [path for path, content in CONTENT.items() if "rows" in content]
PARTS = [path for path, content in CONTENT.items() if content.keys() == {"class_path", "init_args"}]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An original model of the digits, trained for one epoch."""
    folder = tmp_path_factory.mktemp("original")
    main(["fit", f"--config={CONFIGS}/digits/original.yaml", f"--trainer.default_root_dir={folder}", *QUICK])
    return folder / "checkpoints" / "last.ckpt"


@pytest.fixture
def tiny_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forty training and twenty test images in place of CIFAR-10, in memory and in folders."""

    class Tiny(CIFAR10):
        def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
            generator = torch.Generator().manual_seed(int(train))
            count = 40 if train else 20
            self.data = torch.randint(0, 256, (count, 32, 32, 3), generator=generator, dtype=torch.uint8).numpy()
            self.targets = [i % 10 for i in range(count)]
            self.classes = [f"class{i}" for i in range(10)]

    monkeypatch.setattr("salun_lightning.data.cifar.CIFAR10DataModule.dataset", Tiny)
    from PIL import Image

    for split in ("train", "test"):
        data = Tiny("", train=split == "train")
        for i, (pixels, target) in enumerate(zip(data.data, data.targets, strict=True)):
            path = tmp_path / "data" / "cifar10" / split / f"class{target}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def options_for(config: Path, original: Path) -> list[str]:
    """What makes the run of a configuration small."""
    options = [*QUICK]
    if "original:" in (CONFIGS / config).read_text():
        options.append(f"--model.original={original}")
    return options


def test_every_configuration_belongs_to_a_kind() -> None:
    assert CONTENT.keys() == {*FIT_CONFIGS, *COMPARE_CONFIGS, *PARTS}


@pytest.mark.parametrize("config", [c for c in FIT_CONFIGS if c.parts[0] == "digits"], ids=str)
def test_digits_configurations_fit(config: Path, original: Path, tmp_path: Path) -> None:
    cli = main(
        ["fit", f"--config={CONFIGS / config}", f"--trainer.default_root_dir={tmp_path}", *options_for(config, original)]
    )
    assert cli.trainer.current_epoch == 1
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(name.startswith("network.") for name in saved["state_dict"])
    assert ("SaliencyMasking" in saved["callbacks"]) == ("saliency:" in (CONFIGS / config).read_text())


@pytest.mark.parametrize("config", [c for c in FIT_CONFIGS if c.parts[0] == "cifar10"], ids=str)
def test_cifar_configurations_fit(config: Path, tiny_cifar: Path) -> None:
    network = f"--model.network={CONFIGS}/cifar10/small_network.yaml"
    size = ["--data.batch_size=8", network, f"--trainer.default_root_dir={tiny_cifar}/run"]
    if "original:" in (CONFIGS / config).read_text():
        folder = f"--trainer.default_root_dir={tiny_cifar}/original"
        main(["fit", f"--config={CONFIGS}/cifar10/original.yaml", *QUICK, *size, folder])
    cli = main(
        ["fit", f"--config={CONFIGS / config}", *options_for(config, tiny_cifar / "original/checkpoints/last.ckpt"), *size]
    )
    assert cli.trainer.current_epoch == 1


@pytest.mark.parametrize("config", COMPARE_CONFIGS, ids=str)
def test_comparisons_run(config: Path, tiny_cifar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ["--trainer.max_epochs=1"]
    if config.parts[0] == "cifar10":
        small += ["--data.batch_size=8", f"--model.network={CONFIGS}/cifar10/small_network.yaml"]
    # the configuration names other files from the root of the repository, as its users are there
    monkeypatch.chdir(ROOT)
    if "folder.yaml" in (CONFIGS / config).read_text():
        small.append(f"--data.root={tiny_cifar}/data/cifar10")
    content = CONTENT[config]
    last = dict(list(content.get("cases", {}).items())[-1:])
    folder = [f"--cases={json.dumps(last)}"] if last else []
    folder += [f"--out={tiny_cifar}/out", "--seeds=1"]
    report = main(["compare", f"--config={CONFIGS / config}", *folder, "--", *small])
    assert [cell["row"] for cell in report["cells"]] == list(content["rows"])
    masked = [cell for cell in report["cells"] if cell["row"] == "SalUn"]
    assert [cell["mask"]["drift"] for cell in masked] == [0]


def test_paper_network_and_recipe(tiny_cifar: Path) -> None:
    cli = UnlearningCLI([f"--config={CONFIGS}/cifar10/salun.yaml", "--trainer.precision=32-true"], run=False)
    assert sum(weight.numel() for weight in cli.model.parameters()) == 11_173_962
    assert cli.trainer.max_epochs == 10
    optimizer = cli.model.make_optimizer(cli.model.parameters())
    assert (optimizer.defaults["lr"], optimizer.defaults["momentum"], optimizer.defaults["weight_decay"]) == (0.013, 0.9, 5e-4)
    assert cli.config_init["saliency"].ratio == 0.5


@pytest.mark.parametrize("data", ["data.yaml", "one_class.yaml"])
def test_test_and_predict(data: str, original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = [
        f"--config={CONFIGS}/digits/original.yaml",
        f"--data={CONFIGS}/digits/{data}",
        f"--ckpt_path={original}",
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.enable_progress_bar=false",
    ]
    cli = main(["test", *common])
    printed = capsys.readouterr().out
    for name in ("UA", "RA", "TA", "MIA"):
        assert f"{name:<24} {float(cli.trainer.callback_metrics[name]):9.4f}" in printed
    main(["predict", *common])
    lines = (tmp_path / "predictions.csv").read_text().splitlines()
    assert lines[0] == "set,index,target," + ",".join(f"p{i}" for i in range(10))
    assert len(lines) == 1 + 1797
    assert abs(sum(map(float, lines[1].split(",")[3:])) - 1) < 1e-5  # ten rounded float32 numbers
    assert {path.name for path in tmp_path.glob("config*")} == {"config_test.yaml", "config_predict.yaml"}


def test_test_does_not_touch_what_fit_wrote(original: Path) -> None:
    folder = original.parents[1]
    before = {name: (folder / name).read_text() for name in ("metrics.csv", "config.yaml")}
    main(
        [
            "test",
            f"--config={folder}/config.yaml",
            f"--ckpt_path={original}",
            f"--trainer.default_root_dir={folder}",
            "--trainer.enable_progress_bar=false",
        ]
    )
    assert before == {name: (folder / name).read_text() for name in before}


def test_overrides_and_several_configurations(original: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.yaml"
    second.write_text("trainer: {max_epochs: 2}\nmodel: {init_args: {optimizer: {init_args: {lr: 0.5}}}}\n")
    cli = main(
        [
            "fit",
            f"--config={CONFIGS}/digits/random_label.yaml",
            f"--config={second}",
            "--saliency.ratio=0.3",
            "--model.method=GradientAscent",
            f"--model.original={original}",
            "--data.forget.fraction=0.2",
            "--trainer.precision=bf16-mixed",
            f"--trainer.default_root_dir={tmp_path}",
            "--trainer.callbacks+=LearningRateMonitor",
            *QUICK[1:],
        ]
    )
    assert cli.trainer.current_epoch == 2
    assert type(cli.model.method).__name__ == "GradientAscent"
    assert cli.trainer.optimizers[0].defaults["lr"] == 0.5
    mask = SaliencyMask.load(tmp_path / "checkpoints" / "last.ckpt")
    assert mask.num_kept == int(0.3 * mask.num_weights)
    assert len(cli.datamodule.forget_indices) == round(0.2 * len(cli.datamodule.retain_indices) / 0.8)


def test_print_config_round_trip(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["fit", f"--config={CONFIGS}/digits/salun.yaml", f"--model.original={original}", "--saliency.ratio=0.25"]
    with pytest.raises(SystemExit):
        main([*arguments, "--print_config"])
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    cli = main(["fit", f"--config={printed}", f"--trainer.default_root_dir={tmp_path}", *QUICK])
    assert cli.config_init["fit"]["saliency"].ratio == 0.25


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--saliency.ratio=1.2"], "ratio must lie between 0 (nothing may move) and 1 (everything may move), got 1.2"),
        (["--data.forget.fraction=7"], "must lie between 0 and 1, got 7"),
        (["--model.methud=RandomLabel"], "methud"),
    ],
)
def test_bad_options_are_named(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((ArgumentError, ValueError)) as stop:
        main(["fit", f"--config={CONFIGS}/digits/salun.yaml", *arguments])
    assert sentence in capsys.readouterr().err + str(stop.value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data.forget=ForgetClasses", "--data.forget.names=[cat]"], "There is no class 'cat'. The classes are: 0, 1, 2"),
        (["--data.forget=ForgetIndices", "--data.forget.positions=[99999]"], "Index 99999 is out of range"),
        (["--model.original=nowhere.ckpt"], "There is no model at 'nowhere.ckpt'"),
        (
            ["--saliency.ratio=null", "--saliency.mask=nowhere.safetensors"],
            "There is no saliency mask at 'nowhere.safetensors'",
        ),
    ],
)
def test_bad_input_gets_one_sentence(arguments: list[str], sentence: str, original: Path, tmp_path: Path) -> None:
    command = ["fit", f"--config={CONFIGS}/digits/salun.yaml", f"--model.original={original}", *QUICK]
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        main([*command, f"--trainer.default_root_dir={tmp_path}", *arguments])
    assert sentence in str(error.value)


def test_two_processes_from_the_command_line(original: Path, tmp_path: Path) -> None:
    """The README's multi-process line, and the same mask as one process computes."""
    common = [f"--config={CONFIGS}/digits/salun.yaml", f"--model.original={original}", *QUICK]
    main(["fit", *common, f"--trainer.default_root_dir={tmp_path}/one"])
    devices = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]
    command = [sys.executable, "train.py", "fit", *common, *devices, f"--trainer.default_root_dir={tmp_path}/two"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (SaliencyMask.load(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("one", "two"))
    differing = one.num_weights - (one & two).num_kept - (~one & ~two).num_kept
    assert differing <= 4  # only ties up to the rounding of a sum over two ranks, at the threshold
    assert "largest change outside the mask: 0" in done.stderr + done.stdout


def test_help_is_quick_and_complete() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "train.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for command in ("fit", "validate", "test", "predict", "compare"):
        assert f"  {command} " in done.stdout
    assert "torch" not in done.stderr
    assert "lightning.pytorch" not in done.stderr
