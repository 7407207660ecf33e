"""Where a run starts from: the original model, its file, and its split."""

import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import squeezenet1_1

from salun_lightning.data import DigitsDataModule, ForgetClasses, ForgetRandom
from salun_lightning.methods import FineTune, GradientAscent, RandomLabel
from salun_lightning.modules import ImageClassifier
from salun_lightning.networks import SmallResNet, TorchvisionClassifier
from salun_lightning.networks.loading import export_state_dict, load_weights, read_checkpoint
from salun_lightning.saliency import SaliencyMasking
from tests.modules.small_runs import classifier, digits, same, train_original, trainer, weights

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_original(tmp_path_factory.mktemp("original"), epochs=1)


def plain(original: Path) -> State:
    """The network's weights under its own names."""
    state = torch.load(original, weights_only=True)["state_dict"]
    return {name.removeprefix("network."): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("masked", [False, True])
def test_a_checkpoint_holds_plain_weights_and_can_be_read_without_executing_code(
    tmp_path: Path, original: Path, masked: bool
) -> None:
    module = classifier(original=original, method=RandomLabel())
    runner = trainer(tmp_path, max_epochs=1, callbacks=[SaliencyMasking(0.5)] if masked else [])
    runner.fit(module, datamodule=digits())
    runner.test(module, datamodule=digits(), verbose=False)
    runner.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    names = set(module.network.state_dict())
    assert set(checkpoint["state_dict"]) == {f"network.{name}" for name in names}
    assert checkpoint["DigitsDataModule"] == {**digits_split(), "order": "sequential"}


def digits_split() -> dict[str, str]:
    datamodule = digits()
    datamodule.setup()
    return datamodule.split


def test_training_starts_from_the_original(tmp_path: Path, original: Path) -> None:
    module = classifier(original=original, method=RandomLabel(), optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    trainer(tmp_path, max_epochs=1).fit(module, datamodule=digits())
    moving = {name for name, _ in module.network.named_buffers()}  # a learning rate of 0 holds the weights alone
    for name, expected in plain(original).items():
        assert torch.equal(module.network.state_dict()[name], expected) or name in moving


@pytest.mark.parametrize("stage", ["test", "validate", "predict"])
def test_without_training_the_original_is_evaluated(tmp_path: Path, original: Path, stage: str) -> None:
    module = classifier(original=original)
    getattr(trainer(tmp_path, limit_val_batches=1.0), stage)(module, datamodule=digits())
    assert same(weights(module.network), plain(original))


@pytest.mark.parametrize("stage", ["test", "validate", "predict"])
def test_evaluating_the_original_is_said(tmp_path: Path, original: Path, stage: str) -> None:
    module = classifier(original=original)
    runner = trainer(tmp_path, limit_val_batches=1.0)
    with pytest.warns(UserWarning, match=rf"the original model '{original}' is evaluated\. For another, give .* ckpt_path"):
        getattr(runner, stage)(module, datamodule=digits())
    with warnings.catch_warnings(record=True) as said:
        getattr(runner, stage)(classifier(original=original), datamodule=digits(), ckpt_path=original)
    assert not [warning for warning in said if "original model" in str(warning.message)]


def test_after_training_the_trained_model_is_tested(tmp_path: Path, original: Path) -> None:
    module = classifier(original=original, method=RandomLabel())
    runner = trainer(tmp_path, max_epochs=1)
    runner.fit(module, datamodule=digits())
    trained = weights(module)
    runner.test(module, datamodule=digits(), verbose=False)
    trainer(tmp_path).test(module, datamodule=digits(), verbose=False)
    assert same(weights(module), trained)
    assert not same(weights(module.network), plain(original))


def test_training_goes_on_from_the_trained_model(tmp_path: Path, original: Path) -> None:
    def fit(module: ImageClassifier) -> ImageClassifier:
        module.make_optimizer = lambda p: torch.optim.SGD(p, lr=0.0)
        trainer(tmp_path, max_epochs=1).fit(module, datamodule=digits())
        return module

    module = classifier(original=original)
    trainer(tmp_path, max_epochs=1).fit(module, datamodule=digits())
    trained = module.network.head.weight.clone()
    assert torch.equal(fit(module).network.head.weight, trained)


@pytest.mark.parametrize("stage", ["test", "validate", "predict"])
def test_a_checkpoint_is_evaluated_without_the_original(tmp_path: Path, original: Path, stage: str) -> None:
    module = classifier(original=tmp_path / "gone.ckpt")
    getattr(trainer(tmp_path, limit_val_batches=1.0), stage)(module, datamodule=digits(), ckpt_path=original)
    assert same(weights(module.network), plain(original))


def test_a_module_from_a_checkpoint_keeps_its_weights(tmp_path: Path, original: Path) -> None:
    module = ImageClassifier.load_from_checkpoint(
        original, network=SmallResNet(10, width=8, stages=2), original=tmp_path / "gone.ckpt", weights_only=True
    )
    trainer(tmp_path).test(module, datamodule=digits(), verbose=False)
    assert same(weights(module.network), plain(original))


WRAPPERS: dict[str, Callable[[str], str]] = {
    "plain": lambda name: name,
    "data parallel": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "our module": lambda name: f"network.{name}",
    "our module, compiled": lambda name: f"network._orig_mod.{name}",
    "data parallel, our module": lambda name: f"module.network.{name}",
    "another project": lambda name: f"model.{name}",
    "a shorter name": lambda name: f"net.{name}",
    "a part of a model": lambda name: f"module.backbone.{name}",
    "a part of a part": lambda name: f"learner.encoder_q.{name}",
}


@pytest.mark.parametrize("kind", ["state_dict", "checkpoint", "safetensors"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_and_files(tmp_path: Path, original: Path, wrapper: str, kind: str) -> None:
    state = {WRAPPERS[wrapper](name): tensor for name, tensor in plain(original).items()}
    path = tmp_path / ("original.safetensors" if kind == "safetensors" else "original.pt")
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if kind == "checkpoint" else state, path)
    network = SmallResNet(10, width=8, stages=2)
    load_weights(network, read_checkpoint(path))
    assert same(weights(network), plain(original))


WRAPPED = ("model", "net", "network", "model_state_dict", "state_dict_ema", "ema")


@pytest.mark.parametrize("key", WRAPPED)
def test_a_state_dict_under_another_key(tmp_path: Path, original: Path, key: str) -> None:
    noise = {name: torch.zeros(1) for name in ("a", "b")}
    torch.save({"epoch": 3, "optimizer": {"state": noise}, key: plain(original)}, tmp_path / "original.pt")
    network = SmallResNet(10, width=8, stages=2)
    load_weights(network, read_checkpoint(tmp_path / "original.pt"))
    assert same(weights(network), plain(original))


def test_the_trained_weights_go_before_their_average(original: Path) -> None:
    network = SmallResNet(10, width=8, stages=2)
    average = {name: torch.zeros_like(tensor) for name, tensor in plain(original).items()}
    load_weights(network, {"state_dict_ema": average, "state_dict": plain(original)})
    assert same(weights(network), plain(original))


def test_what_else_a_checkpoint_holds_is_listed(original: Path) -> None:
    network = SmallResNet(10, width=8, stages=2)
    encoder = {f"encoder.{name}": tensor for name, tensor in plain(original).items()}
    with pytest.warns(UserWarning, match=r"also holds head\.weight, queue, which the network does not have"):
        load_weights(network, {"model": {**encoder, "queue": torch.zeros(2), "head.weight": torch.zeros(2), "epoch": 3}})
    assert same(weights(network), plain(original))


def test_two_networks_in_one_checkpoint(original: Path) -> None:
    network = SmallResNet(10, width=8, stages=2)
    twins = {f"{side}.{name}": tensor for side in ("student", "teacher") for name, tensor in plain(original).items()}
    with pytest.raises(ValueError, match=r"has the network's weights more than once: under student\., teacher\..*Save one"):
        load_weights(network, twins)


def test_a_network_with_a_prefix_that_the_checkpoint_lacks(original: Path) -> None:
    network = nn.ModuleDict({"backbone": SmallResNet(10, width=8, stages=2)})
    load_weights(network, read_checkpoint(original))
    assert same(weights(network["backbone"]), plain(original))


def test_a_checkpoint_without_weights(original: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no weights; it has the keys epoch, weights\. Save the network's state_dict"):
        load_weights(SmallResNet(10), {"epoch": 3, "weights": plain(original)})


def test_weights_for_another_library(tmp_path: Path) -> None:
    """What was trained here is loaded strictly by torchvision."""
    module = ImageClassifier(TorchvisionClassifier("squeezenet1_1", 10))
    runner = trainer(tmp_path)
    runner.strategy.connect(module)
    runner.save_checkpoint(tmp_path / "last.ckpt")
    state = export_state_dict(tmp_path / "last.ckpt")
    theirs = squeezenet1_1(num_classes=10)
    theirs.load_state_dict(state)
    assert same(weights(theirs), weights(module.network.model))


def test_into_a_compiled_network(original: Path) -> None:
    network = torch.compile(SmallResNet(10, width=8, stages=2))
    load_weights(network, read_checkpoint(original))
    assert same(weights(network._orig_mod), plain(original))


def without(name: str) -> Callable[[State], State]:
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("head.bias"), "head.bias missing from the checkpoint, nothing unknown to the network"),
        (
            lambda s: {**without("head.bias")(s), "head.scale": s["head.bias"]},
            "head.bias missing from the checkpoint, head.scale unknown to the network",
        ),
        (lambda s: {n + "s": t for n, t in s.items()}, r"and \d+ more missing .* and \d+ more unknown"),
        (lambda s: {**s, "head.bias": torch.zeros(9)}, r"'head.bias' is \(9,\) in the checkpoint and \(10,\) in the network"),
        (lambda s: {**s, "module.head.bias": s["head.bias"]}, "two weights of one name"),
        (lambda s: {}, r"\d+ more missing from the checkpoint"),
    ],
    ids=["missing", "unknown", "other names", "shape", "twice", "empty"],
)
def test_another_network(original: Path, change: Callable[[State], State], message: str) -> None:
    network = SmallResNet(10, width=8, stages=2)
    before = weights(network)
    with pytest.raises(ValueError, match=message):
        load_weights(network, {"state_dict": change(plain(original))})
    assert same(weights(network), before)


class Stranger:
    """Something that only executing code could restore."""


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_damaged_file(tmp_path: Path, original: Path, damage: str, suffix: str) -> None:
    path = tmp_path / f"original{suffix}"
    content = original.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "text": b"weights: none\n", "empty": b""}[damage])
    with pytest.raises(
        ValueError, match=f"'.*original{suffix}' cannot be read as a checkpoint; it may be truncated(?!.*weights_only)"
    ):
        trainer(tmp_path, max_epochs=1).fit(classifier(original=path), datamodule=digits())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"state_dict": Stranger()},
            r"original.pt' cannot be read as a checkpoint without executing code .* torch.save\(model.state_dict\(\), path\)",
        ),
        (nn.Linear(2, 2), "cannot be read as a checkpoint without executing code"),
        ([torch.zeros(3)], "holds a list, which is neither a checkpoint nor a state_dict"),
        (torch.zeros(3), "holds a Tensor, which is neither a checkpoint nor a state_dict"),
    ],
)
def test_a_file_that_holds_something_else(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "original.pt")
    assert zipfile.is_zipfile(tmp_path / "original.pt")
    with pytest.raises(ValueError, match=message) as caught:
        read_checkpoint(tmp_path / "original.pt")
    assert "weights_only" not in str(caught.value)  # torch's advice is to execute the code


@pytest.mark.filterwarnings("ignore:.*looks like a TorchScript archive")
@pytest.mark.parametrize("kind", ["pickle", "script"])
def test_files_that_torch_advises_to_execute(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "original.pt"
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"head.bias": np.zeros(3)}))
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    with pytest.raises(ValueError, match="without executing code") as caught:
        read_checkpoint(path)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_missing_file(tmp_path: Path, stage: str) -> None:
    module = classifier(original=tmp_path / "gone.ckpt")
    with pytest.raises(FileNotFoundError, match=r"There is no model at '.*gone.ckpt'. Train it first"):
        getattr(trainer(tmp_path, max_epochs=1), stage)(module, datamodule=digits())


class MyDigits(DigitsDataModule):
    """The data of a user, in a class of another name."""


@pytest.mark.parametrize("change", [{"val_fraction": 0.2}, {"split_seed": 1}])
@pytest.mark.parametrize("kind", [DigitsDataModule, MyDigits])
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_an_original_of_another_training_set_is_refused(
    tmp_path: Path, original: Path, stage: str, kind: type[DigitsDataModule], change: dict[str, Any]
) -> None:
    datamodule = kind(**{"forget": ForgetRandom(fraction=0.1), "val_fraction": 0.1, **change})
    with pytest.raises(MisconfigurationException, match="part of what is to be forgotten may never have been trained on"):
        getattr(trainer(tmp_path, max_epochs=1), stage)(classifier(original=original), datamodule=datamodule)


@pytest.mark.parametrize("request_", [ForgetRandom(fraction=0.2, seed=9), ForgetClasses([3])])
def test_an_original_serves_every_request(tmp_path: Path, original: Path, request_: Any) -> None:
    runner = trainer(tmp_path, max_epochs=1)
    runner.fit(classifier(original=original, method=GradientAscent()), datamodule=digits(forget=request_))
    assert runner.global_step > 0
    module = classifier()
    trainer(tmp_path).test(module, datamodule=digits(forget=request_), ckpt_path=original, verbose=False)
    assert same(weights(module.network), plain(original))


@pytest.mark.parametrize("stage", ["fit", "test"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forget": ForgetRandom(fraction=0.1, seed=1)}, "another forget set than this datamodule's. Give the forget request"),
        ({"split_seed": 1}, "The checkpoint was made with another split"),
    ],
)
def test_a_checkpoint_of_another_split_is_refused(tmp_path: Path, stage: str, change: dict[str, Any], message: str) -> None:
    runner = trainer(tmp_path, max_epochs=1)
    runner.fit(classifier(method=FineTune()), datamodule=digits())
    runner.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(MisconfigurationException, match=message):
        getattr(trainer(tmp_path, max_epochs=2), stage)(
            classifier(), datamodule=digits(**change), ckpt_path=tmp_path / "last.ckpt"
        )


no_validation = pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`")


class Other(LightningModule):
    """A module of another project, whose checkpoint becomes the original."""

    def __init__(self) -> None:
        super().__init__()
        self.model = SmallResNet(10, width=8, stages=2)

    def training_step(self, batch: dict[str, Any]) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch["retain"].inputs), batch["retain"].targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@no_validation
def test_an_original_from_another_project(tmp_path: Path) -> None:
    other, runner = Other(), trainer(tmp_path, max_epochs=1)
    runner.fit(other, datamodule=digits(order="all"))
    runner.save_checkpoint(tmp_path / "other.ckpt")
    module = classifier(original=tmp_path / "other.ckpt")
    trainer(tmp_path).test(module, datamodule=digits(), verbose=False)
    assert same(weights(module.network), weights(other.model))


@no_validation
def test_any_module_trains_on_the_loaders(tmp_path: Path) -> None:
    """Which knows of the batches only that they have parts with inputs and targets."""
    other, seen = Other(), []
    step = other.training_step
    other.training_step = lambda batch: seen.append(batch.keys()) or step(batch)  # type: ignore[method-assign]
    before = weights(other)
    trainer(tmp_path, max_epochs=2).fit(other, datamodule=digits())
    assert len(seen) == 2 * 10
    assert all(keys == {"forget", "retain"} for keys in seen)
    assert not same(weights(other), before)
