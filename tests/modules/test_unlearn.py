"""A module of another project forgets by our methods, and is otherwise what it was."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from salun_lightning import (
    DAMP,
    DELETE,
    SCRUB,
    SSD,
    TSBGRM,
    BadTeacher,
    FineTune,
    FisherForgetting,
    GradientAscent,
    NegGradPlus,
    RandomLabel,
    Remap,
)
from salun_lightning.data import ForgetRandom, ForgetRetainDataModule
from salun_lightning.methods import Method, part
from salun_lightning.modules import ImageClassifier, Unlearn
from salun_lightning.saliency import SaliencyMasking
from tests.methods.whole_class import CLASSES, data, images, network
from tests.modules.small_runs import same, trainer, weights

ONE_STEP = {"max_steps": 1}


def plain(weights: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(weights, lr=0.05, momentum=0.9, weight_decay=0.01)


class Theirs(LightningModule):
    """As another project may have it: some of its names mean something else here."""

    reference, method, datamodule = "Smith et al.", "theirs", None

    def __init__(self) -> None:
        super().__init__()
        self.network = network()
        self.losses: list[float] = []
        self.seen: list[Any] = []

    def forward(self, images: Tensor) -> Any:
        return {"logits": self.network(images)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise AssertionError("their loss was asked for")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch)
        images, targets = batch.values() if isinstance(batch, dict) else batch
        self.log("val_loss", functional.cross_entropy(self(images)["logits"], targets))

    def configure_optimizers(self) -> Any:
        optimizer = plain(self.parameters())
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


def fit(folder: Path, method: Method, *callbacks: Any, module: LightningModule | None = None, **settings: Any) -> Any:
    theirs = Theirs() if module is None else module
    datamodule = settings.pop("data", None) or data(val_fraction=0.25)
    ckpt_path = settings.pop("ckpt_path", None)
    run = {"max_epochs": 2, "limit_val_batches": None, **settings}
    trainer(folder, callbacks=[Unlearn(method), *callbacks], **run).fit(theirs, datamodule=datamodule, ckpt_path=ckpt_path)
    return theirs


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("method", "run"),
    [
        *(
            (method, {})
            for method in (
                FineTune(),
                RandomLabel(),
                RandomLabel(order="mixed"),
                GradientAscent(),
                NegGradPlus(0.9),
                SCRUB(),
                BadTeacher(),
                DELETE(),
            )
        ),
        *((method, ONE_STEP) for method in (SSD(), DAMP(strength=0.5), FisherForgetting())),
    ],
    ids=lambda value: f"{type(value).__name__} {value.order}" if isinstance(value, Method) else "",
)
def test_it_ends_with_the_bits_of_our_own_module(method: Method, run: dict[str, int], masked: bool, tmp_path: Path) -> None:
    """The same network, method and optimizer, with a mask and without one, wherever the mask stands among the callbacks."""
    masks = [SaliencyMasking(0.5) if masked else SaliencyMasking(1.0) for _ in range(2)]
    theirs = fit(tmp_path, method, masks[0], **run)
    optimizer = (lambda p: torch.optim.SGD(p, lr=1.0)) if run else plain
    ours = ImageClassifier(network(), method=method, optimizer=optimizer)
    settings = {"max_epochs": 2, **run}
    trainer(tmp_path, callbacks=[masks[1]], **settings).fit(ours, datamodule=data(val_fraction=0.25))
    assert masks[0].mask == masks[1].mask
    assert same(weights(theirs.network), weights(ours.network))
    assert not same(weights(theirs.network), weights(network()))


def public(holder: Any) -> set[str]:
    """The names of what it holds itself, in front of its class."""
    return {name for name in vars(holder) if not name.startswith("_")}


@pytest.mark.parametrize("failing", [False, True])
def test_afterwards_the_module_is_as_it_was_but_for_its_weights(failing: bool, tmp_path: Path) -> None:
    class Failing(FineTune):
        def on_train_end(self, *_: Any) -> None:
            if failing:
                raise RuntimeError("broken off")

    theirs, datamodule = Theirs(), data(val_fraction=0.25)
    theirs.forget_loss = theirs.forward
    before = {holder: public(holder) for holder in (theirs, datamodule)}
    layout = [weight.stride() for weight in theirs.parameters()]
    if failing:
        with pytest.raises(RuntimeError, match="broken off"):
            fit(tmp_path, Failing(), module=theirs, data=datamodule)
    else:
        fit(tmp_path, Failing(), module=theirs, data=datamodule)
    for holder, names in before.items():
        assert public(holder) == names
    assert theirs.forget_loss == theirs.forward
    assert theirs.losses == []
    assert [weight.stride() for weight in theirs.parameters()] == layout
    assert list(datamodule.val_dataloader()) == ["forget", "val"]
    assert all(weight.requires_grad for weight in theirs.parameters())


class Dictionaries(Dataset[dict[str, Tensor]]):
    targets = images().targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": images().images[index] / 255, "label": self.targets[index]}


def test_validation_batches_have_the_form_of_the_data_and_are_of_the_validation_set(tmp_path: Path) -> None:
    module = fit(tmp_path, FineTune(), max_epochs=1, num_sanity_val_steps=0)
    ((inputs, targets),) = module.seen
    assert inputs.shape == (12, 1, 6, 6)
    assert targets.bincount().tolist() == [3] * CLASSES
    keys = {"input_key": "image", "target_key": "label"}
    dictionaries = ForgetRetainDataModule(ForgetRandom(count=8), Dictionaries(), val_fraction=0.25, batch_size=16, **keys)
    module = fit(tmp_path, FineTune(), max_epochs=1, num_sanity_val_steps=0, data=dictionaries)
    (batch,) = module.seen
    torch.testing.assert_close(batch, {"image": inputs, "label": targets})
    assert {"train/loss", "val_loss"} <= {*module.trainer.callback_metrics}


class Looks(Method):
    """Asks for everything that a module offers, and counts its steps."""

    order = "paired"
    needs_original = True
    kind = "classifier"
    steps = 0

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = state_dict["steps"]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.started = (pl_module.trainer, pl_module.datamodule, pl_module.num_classes, pl_module.network)
        self.original = weights(pl_module.reference)
        if trainer.global_step == 0:
            with torch.no_grad():
                pl_module.network.network[6].bias.fill_(5.0)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.steps += 1

    def loss(self, module: Any, batch: Any) -> Tensor:
        samples = part(batch, "forget", self)
        module.log("looked", 1.0)
        targets = module.logits(samples.inputs, original=True).softmax(1)
        noise = torch.rand(CLASSES)  # of a random state that a resumed run must find again
        return functional.cross_entropy(module.logits(samples.inputs) + noise, targets) + module.task_loss(batch["retain"])


@pytest.mark.filterwarnings("ignore:Something other than an optimizer wrote")
def test_hooks_and_loss_see_what_they_need(tmp_path: Path) -> None:
    method, masking = Looks(), SaliencyMasking(0.0)
    theirs = fit(tmp_path, method, masking)
    original = weights(theirs)
    assert method.started[1:] == (theirs.trainer.datamodule, CLASSES, theirs)
    assert same({name.removeprefix("network."): tensor for name, tensor in method.original.items()}, weights(network()))
    assert method.steps == theirs.trainer.global_step > 2
    assert theirs.trainer.callback_metrics["looked"] == 1
    for name, parameter in network().named_parameters():  # the hook came behind the mask, which put back what it wrote
        assert torch.equal(original[f"network.{name}"], parameter), name


@pytest.mark.filterwarnings("ignore:Something other than an optimizer wrote")
def test_a_run_that_was_killed_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    whole, resumed = Looks(), Looks()
    expected = fit(tmp_path, whole, SaliencyMasking(0.5), max_epochs=4)
    fit(tmp_path, Looks(), SaliencyMasking(0.5), max_epochs=2).trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = fit(tmp_path, resumed, SaliencyMasking(0.5), max_epochs=4, ckpt_path=tmp_path / "last.ckpt")
    assert resumed.steps == whole.steps
    assert same(weights(again), weights(expected))


def test_a_run_is_only_resumed_with_its_original_and_its_method(tmp_path: Path) -> None:
    fit(tmp_path, BadTeacher(), max_epochs=1).trainer.save_checkpoint(tmp_path / "last.ckpt")
    elsewhere = Theirs()
    with torch.no_grad():
        next(elsewhere.parameters()).add_(1.0)  # a new process, in which nobody has loaded the original model
    with pytest.raises(MisconfigurationException, match="does not hold the original model that the resumed run started from"):
        fit(tmp_path, BadTeacher(), module=elsewhere, ckpt_path=tmp_path / "last.ckpt")
    with pytest.raises(MisconfigurationException, match=r"with the method BadTeacher\(.*but this one has RandomLabel\("):
        fit(tmp_path, RandomLabel(order="mixed"), ckpt_path=tmp_path / "last.ckpt")
    with torch.no_grad():
        next(elsewhere.parameters()).sub_(1.0)
        next(buffer for buffer in elsewhere.buffers() if buffer.is_floating_point()).add_(1.0)
    with pytest.raises(MisconfigurationException, match="does not hold the original model"):  # with other running statistics
        fit(tmp_path, BadTeacher(), module=elsewhere, ckpt_path=tmp_path / "last.ckpt")
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    next(state for key, state in kept["callbacks"].items() if key.startswith("Unlearn")).pop("made_by")
    torch.save(kept, tmp_path / "old.ckpt")
    with pytest.raises(MisconfigurationException, match="does not say which model its run started from"):
        fit(tmp_path, BadTeacher(), ckpt_path=tmp_path / "old.ckpt")
    fit(tmp_path, FineTune(), max_epochs=1).trainer.save_checkpoint(tmp_path / "plain.ckpt")
    resumed = fit(tmp_path, FineTune(), module=elsewhere, ckpt_path=tmp_path / "plain.ckpt")  # does not refer to an original
    assert resumed.trainer.current_epoch == 2


def test_a_method_for_whole_classes_finds_the_head(tmp_path: Path) -> None:
    theirs = fit(tmp_path, TSBGRM())
    moved = [name for name, tensor in weights(network()).items() if not torch.equal(weights(theirs.network)[name], tensor)]
    assert moved == ["6.weight", "6.bias"]


def test_what_was_forgotten_is_measured_by_our_module(tmp_path: Path) -> None:
    theirs = fit(tmp_path, GradientAscent())
    tester = trainer(tmp_path)
    tester.test(ImageClassifier(theirs), datamodule=data(val_fraction=0.25), verbose=False)
    assert {"UA", "RA", "TA", "MIA"} <= tester.callback_metrics.keys()


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
@pytest.mark.parametrize(("method", "run"), [(Looks(), {"max_epochs": 1}), (DAMP(), ONE_STEP)], ids=["trained", "edited"])
@pytest.mark.filterwarnings("ignore:Something other than an optimizer wrote")
def test_the_original_follows_the_precision(precision: str, method: Method, run: Any, tmp_path: Path) -> None:
    theirs = fit(tmp_path, method, SaliencyMasking(0.5), precision=precision, **run)
    kinds = {weight.dtype for weight in theirs.parameters()}
    assert kinds == {{"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)}
    assert not same(weights(theirs.float()), weights(Theirs()))


class Manual(Theirs):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def test_what_no_method_can_be_put_into_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"^ImageClassifier has a method of its own\. Give it the method"):
        fit(tmp_path, FineTune(), module=ImageClassifier(network()))
    with pytest.raises(
        MisconfigurationException, match=r"^Manual optimizes manually, .* Train its network in an ImageClassifier"
    ):
        fit(tmp_path, FineTune(), module=Manual())
    with pytest.raises(MisconfigurationException, match=r"^Unlearn needs to know what is to be forgotten\. Fit with"):
        trainer(tmp_path, callbacks=[Unlearn(FineTune())], max_epochs=1).fit(Theirs(), [images()[:4]], [images()[:4]])
    with pytest.raises(ValueError, match=r"^Remap is a method for diffusion models; ForeignClassifier is none\.$"):
        fit(tmp_path, Remap())
    few = Theirs()
    few.network[6] = nn.Linear(54, 2)
    with pytest.raises(ValueError, match=r"^The network has 2 outputs, but the data has 4 classes\."):
        fit(tmp_path, FineTune(), module=few)
    assert "training_step" not in vars(few)
