"""What a checkpoint says of the run that made it."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule

from salun_lightning.cli import main
from salun_lightning.methods import ESD, FineTune, Method, MUNBa, NegGradPlus, RandomLabel
from salun_lightning.modules import ImageClassifier
from salun_lightning.modules.record import KEY, check_resumed, what_was_run
from salun_lightning.networks import SmallResNet
from tests.modules.small_runs import classifier, digits, same, trainer, weights


def finished(folder: Path, method: Method, **kwargs: Any) -> Path:
    runner = trainer(folder, max_epochs=1)
    runner.fit(classifier(method=method), datamodule=digits(batch_size=500, **kwargs))
    runner.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def resume(folder: Path, method: Method, checkpoint: Path, **kwargs: Any) -> int:
    runner = trainer(folder, max_epochs=2)
    runner.fit(classifier(method=method), datamodule=digits(batch_size=500, **kwargs), ckpt_path=checkpoint)
    return runner.current_epoch


def test_the_same_run_goes_on(tmp_path: Path) -> None:
    checkpoint = finished(tmp_path, NegGradPlus(alpha=0.5))
    content = torch.load(checkpoint, weights_only=True)
    assert content[KEY] == {"seed": 0, "method": {"class": "NegGradPlus", "alpha": 0.5}}
    assert resume(tmp_path, NegGradPlus(alpha=0.5), checkpoint) == 2
    del content[KEY]  # as of an earlier version
    torch.save(content, checkpoint)
    assert resume(tmp_path, NegGradPlus(alpha=0.7), checkpoint) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": FineTune()}, r"with the method NegGradPlus\(alpha=0.5\), but this one has FineTune\(.*\): .* as original"),
        ({"method": NegGradPlus(alpha=0.6)}, r"NegGradPlus\(alpha=0.5\), but this one has NegGradPlus\(alpha=0.6\)"),
        ({"seed": "7"}, "is of a run with seed 0, but this one has seed 7: .* Give seed_everything 0"),
        ({"order": "mixed"}, "with the order 'paired', but this one has 'mixed'"),
    ],
)
def test_another_run_does_not_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    checkpoint = finished(tmp_path, NegGradPlus(alpha=0.5))
    other = {"method": NegGradPlus(alpha=0.5), **change}
    monkeypatch.setenv("PL_GLOBAL_SEED", other.pop("seed", "0"))
    with pytest.raises(MisconfigurationException, match=message):
        resume(tmp_path, checkpoint=checkpoint, **other)


def test_a_run_of_other_inner_methods_does_not_go_on() -> None:
    module = classifier(method=MUNBa(NegGradPlus(alpha=0.5)))
    content: dict[str, Any] = {}
    module.on_save_checkpoint(content)
    inner = [{"class": "NegGradPlus", "alpha": 0.5}, {"class": "FineTune", "order": "retain"}]
    assert content[KEY]["method"] == {"class": "MUNBa", "inner": inner}
    check_resumed(content[KEY], MUNBa(NegGradPlus(alpha=0.5)))
    fewer = {"class": "MUNBa", "inner": [{"class": "NegGradPlus"}, {"class": "FineTune"}]}  # of a version that knew fewer
    check_resumed({"method": fewer}, MUNBa(NegGradPlus()))
    message = r"with the method MUNBa\(NegGradPlus\(alpha=0\.5\), .* one has MUNBa\(NegGradPlus\(alpha=0\.6\), FineTune"
    with pytest.raises(MisconfigurationException, match=message):
        check_resumed(content[KEY], MUNBa(NegGradPlus(alpha=0.6)))
    with pytest.raises(MisconfigurationException, match=r"has MUNBa\(RandomLabel\(.*\), FineTune\(order=retain\)\)"):
        check_resumed(content[KEY], MUNBa())


def test_lists_are_part_of_what_was_run() -> None:
    record = what_was_run(ESD(conditions=["a seven", 3]))
    assert record["method"]["conditions"] == ["a seven", 3]
    check_resumed(record, ESD(conditions=["a seven", 3]))
    with pytest.raises(
        MisconfigurationException, match=r"ESD\(.*conditions=\['a seven', 3\]\), but .*conditions=\['a two'\]\)"
    ):
        check_resumed(record, ESD(conditions=["a two"]))
    method = FineTune()
    method.losses = [1.0]  # type: ignore[attr-defined]  # of what a method notes while it trains, nothing is asked
    check_resumed(what_was_run(method), FineTune())
    assert "losses" not in what_was_run(method)["method"]


def test_any_method_is_tested(tmp_path: Path) -> None:
    """Testing needs the weights alone."""
    checkpoint = finished(tmp_path, NegGradPlus())
    module = classifier(method=RandomLabel())
    trainer(tmp_path).test(module, datamodule=digits(), ckpt_path=checkpoint, verbose=False)
    assert same(weights(module), torch.load(checkpoint, weights_only=True)["state_dict"])


@pytest.fixture(scope="module")
def configured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a run from the command line."""
    folder = tmp_path_factory.mktemp("configured")
    torch.save(SmallResNet(10, width=4, stages=1).state_dict(), folder / "original.pt")
    words = [
        "--model=ImageClassifier",
        f"--model.original={folder}/original.pt",
        "--model.network=SmallResNet",
        "--model.network.num_classes=10",
        "--model.network.width=4",
        "--model.network.stages=1",
        "--model.method=NegGradPlus",
        "--model.method.alpha=0.25",
        "--model.optimizer=torch.optim.AdamW",
        "--model.optimizer.lr=0.125",
        "--model.lr_scheduler=torch.optim.lr_scheduler.StepLR",
        "--model.lr_scheduler.step_size=3",
        "--data=DigitsDataModule",
        "--data.forget=ForgetRandom",
        "--data.forget.count=9",
        "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=1",
        "--trainer.limit_val_batches=0",
        "--trainer.enable_progress_bar=false",
        "--trainer.accelerator=cpu",
        f"--trainer.default_root_dir={folder}",
    ]
    main(["fit", *words])
    return folder / "checkpoints" / "last.ckpt"


def test_a_checkpoint_knows_its_module(configured: Path) -> None:
    module = ImageClassifier.load_from_checkpoint(configured)
    assert isinstance(module.network, SmallResNet)
    assert (type(module.method), module.method.alpha) == (NegGradPlus, 0.25)
    optimizer = module.configure_optimizers()["optimizer"]
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["lr"] == 0.125
    assert same(weights(module), torch.load(configured, weights_only=True)["state_dict"])
    assert ImageClassifier.load_from_checkpoint(configured, method=RandomLabel()).method.order == "sequential"
    given = ImageClassifier.load_from_checkpoint(configured, network=SmallResNet(10, width=4, stages=1))
    assert same(weights(given), weights(module))


def test_a_checkpoint_of_a_module_made_in_python(tmp_path: Path) -> None:
    checkpoint = finished(tmp_path, FineTune())
    with pytest.raises(ValueError, match=r"not trained from a configuration. Give it: ImageClassifier.* network=\.\.\."):
        ImageClassifier.load_from_checkpoint(checkpoint)


class Renamed(ImageClassifier):
    """Another module."""


def test_a_checkpoint_of_another_class(configured: Path) -> None:
    with pytest.raises(ValueError, match=r"is of a ImageClassifier: call ImageClassifier\.load_from"):
        Renamed.load_from_checkpoint(configured)


def test_a_checkpoint_of_a_diffusion_model(tmp_path: Path) -> None:
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=0"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
    configurations = ["--config=digits_diffusion", "--config=digits_diffusion/retrain"]
    cli = main(["fit", *configurations, *short, *quiet, f"--trainer.default_root_dir={tmp_path}"])
    module = type(cli.model).load_from_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert module.sampling == cli.model.sampling
    assert same(weights(module.network), weights(cli.model.network))


SPY = "spy_module.Network"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": {"class_path": SPY}}, f"names '{SPY}', which is not imported, .* or give network"),
        ({"network": {"class_path": "torch.nn.Sequential", "init_args": {"0": [SPY]}}}, f"names '{SPY}'"),
        ({"lr_scheduler": SPY}, f"names '{SPY}'"),
        ({"optimizer": {"class_path": "os.system", "init_args": {"command": "true"}}}, "'os.system', which is no network"),
        ({"optimizer": "torch.hub.load"}, "'torch.hub.load', which is no network, method, optimizer or scheduler"),
        ({"method": {"class_path": "torch.nn.Nothing"}}, "'torch.nn.Nothing', which is not there"),
        ({"method": {"class_path": "torch.nothing.Nothing"}}, "'torch.nothing.Nothing', which is not there"),
        ({"speed": 3}, "does not fit its class; give network.*speed"),
    ],
)
def test_nothing_is_executed_for_a_checkpoint(
    tmp_path: Path, configured: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    (tmp_path / "spy_module.py").write_text("raise SystemExit('this was executed')")
    monkeypatch.syspath_prepend(str(tmp_path))
    content = torch.load(configured, weights_only=True)
    content[KEY]["model"]["init_args"] |= change
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=message):
        ImageClassifier.load_from_checkpoint(tmp_path / "last.ckpt")
    assert "spy_module" not in sys.modules


def test_no_pickle_is_executed(tmp_path: Path, configured: Path) -> None:
    content = torch.load(configured, weights_only=True)
    torch.save({**content, "more": Renamed}, tmp_path / "last.ckpt")
    for arguments in ({}, {"network": SmallResNet(10, width=4, stages=1), "weights_only": False}):
        with pytest.raises(ValueError, match="without executing code"):
            ImageClassifier.load_from_checkpoint(tmp_path / "last.ckpt", **arguments)
    assert issubclass(Renamed, LightningModule)
