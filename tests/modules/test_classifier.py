"""ImageClassifier: training, and what test reports."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import ReduceLROnPlateau
from sklearn.svm import SVC
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.utils.data import DataLoader

from salun_lightning.data import ForgetClasses, ForgetRandom, ForgetRequest, ForgetRetainDataModule, Samples
from salun_lightning.methods import FineTune, GradientAscent, NegGradPlus, RandomLabel
from salun_lightning.modules import ImageClassifier
from salun_lightning.modules.classifier import logits_of
from salun_lightning.networks import SmallResNet
from tests.modules.small_runs import classifier, digits, same, train_original, trainer, weights
from tests.small import Pairs


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_original(tmp_path_factory.mktemp("original"))


def measure(module: ImageClassifier, folder: Path, datamodule: Any = None, **kwargs: Any) -> dict[str, float]:
    results = trainer(folder).test(module, datamodule=datamodule or digits(), verbose=False, **kwargs)
    return {name: value for result in results for name, value in result.items()}


@pytest.mark.parametrize("request_", [ForgetRandom(fraction=0.1), ForgetClasses(["3"])])
def test_metrics_are_those_of_an_independent_computation(tmp_path: Path, original: Path, request_: ForgetRequest) -> None:
    module, datamodule = classifier(original=original), digits(forget=request_)
    metrics = measure(module, tmp_path, datamodule)
    train, test, _ = datamodule.load()
    kept = ~torch.isin(test.targets, torch.tensor(request_.classes([str(i) for i in range(10)]), dtype=torch.int64))
    sets = {
        "forget": (train.images[datamodule.forget_indices], train.targets[datamodule.forget_indices]),
        "retain": (train.images[datamodule.retain_indices], train.targets[datamodule.retain_indices]),
        "test": (test.images[kept], test.targets[kept]),
    }
    module.network.eval()
    accuracy, confidence = {}, {}
    for name, (images, targets) in sets.items():
        with torch.no_grad():
            probabilities = module.network(images.float() / 255).softmax(1)
        accuracy[name] = 100 * (probabilities.argmax(1) == targets).double().mean().item()
        confidence[name] = probabilities[torch.arange(len(targets)), targets].double().numpy()
    members = confidence["retain"][np.linspace(0, len(confidence["retain"]) - 1, kept.sum()).round().astype(int)]
    known = np.concatenate([members, confidence["test"]])[:, None]
    attacker = SVC(C=3, gamma=1.0).fit(known, [1] * len(members) + [0] * len(members))
    taken_for_unseen = 100 * (attacker.predict(confidence["forget"][:, None]) == 0).mean()
    assert 50 < accuracy["retain"] < 100  # the comparison below says something
    assert metrics["UA"] == pytest.approx(100 - accuracy["forget"], abs=1e-3)
    assert metrics["RA"] == pytest.approx(accuracy["retain"], abs=1e-3)
    assert metrics["TA"] == pytest.approx(accuracy["test"], abs=1e-3)
    # one image may lie so close to the border that the rounding of another batch size takes it across
    assert metrics["MIA"] == pytest.approx(taken_for_unseen, abs=100.1 / len(datamodule.forget_indices))
    assert metrics["test/forget/acc"] == pytest.approx(accuracy["forget"] / 100, abs=1e-5)
    assert {name for name in metrics if "/" in name} == {f"test/{name}/acc" for name in datamodule.test_dataloader()}


class Black(nn.Module):
    """An augmentation that nothing survives."""

    def forward(self, images: Tensor) -> Tensor:
        return images * 0


def test_evaluation_is_not_augmented(tmp_path: Path, original: Path) -> None:
    plain = measure(classifier(original=original), tmp_path)
    assert measure(classifier(original=original), tmp_path, digits(train_transform=Black())) == plain


def test_evaluation_leaves_the_model_as_it_is(tmp_path: Path, original: Path) -> None:
    module = classifier(original=original)
    first = measure(module, tmp_path)
    before = weights(module)
    assert measure(module, tmp_path) == first  # also: nothing of the first test is counted in the second
    assert same(weights(module), before)


@pytest.mark.parametrize("batch_size", [50, 2000])
def test_batch_size_does_not_change_the_result(tmp_path: Path, original: Path, batch_size: int) -> None:
    expected = measure(classifier(original=original), tmp_path)
    metrics = measure(classifier(original=original), tmp_path, digits(batch_size=batch_size))
    assert metrics == pytest.approx(expected, abs=100.1 / 129)  # of MIA, see above


@pytest.mark.parametrize(
    ("method", "names"),
    [
        (FineTune(), {"retain"}),
        (FineTune(order="all"), {"retain"}),
        (GradientAscent(), {"forget"}),
        (NegGradPlus(), {"forget", "retain"}),
        (RandomLabel(), {"forget", "retain"}),
    ],
)
def test_every_method_trains(tmp_path: Path, method: Any, names: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()

    def loss(module: Any, batch: dict[str, Samples]) -> Tensor:
        seen.update(batch)
        return type(method).loss(method, module, batch)

    monkeypatch.setattr(method, "loss", loss)
    module = classifier(method=method)
    before = weights(module)
    runner = trainer(tmp_path, max_epochs=1)
    runner.fit(module, datamodule=digits())
    assert seen == names
    assert torch.isfinite(runner.callback_metrics["train/loss"])
    assert not same(weights(module), before)
    expected = {"sequential": 10 + 2, "retain": 10, "all": 11, "forget": 2, "paired": 10}[method.order]
    assert runner.global_step == expected


def test_training_fits_the_digits(tmp_path: Path, original: Path) -> None:
    """Chance is 10 %; this seed reaches 94 %."""
    assert measure(classifier(original=original), tmp_path)["TA"] > 80


def test_validation_reports_the_forget_and_the_validation_set(tmp_path: Path, original: Path) -> None:
    runner = trainer(tmp_path, limit_val_batches=1.0)
    results = runner.validate(classifier(original=original), datamodule=digits(), verbose=False)
    metrics = {name: value for result in results for name, value in result.items()}
    expected = measure(classifier(original=original), tmp_path)
    assert metrics == {f"val/{name}/acc": pytest.approx(expected[f"test/{name}/acc"]) for name in ("forget", "val")}


@pytest.mark.parametrize(("interval", "factor"), [("epoch", 0.1), ("step", 0.01)])
def test_scheduler_steps_each_epoch_or_each_step(tmp_path: Path, interval: Any, factor: float) -> None:
    module = classifier(
        method=GradientAscent(),  # two steps an epoch
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        lr_scheduler=lambda optimizer: StepLR(optimizer, 1, gamma=0.1),
        lr_interval=interval,
    )
    seen = []
    module.on_train_epoch_end = lambda: seen.append(module.optimizers().param_groups[0]["lr"])  # type: ignore[method-assign]
    runner = trainer(tmp_path, max_epochs=2)
    runner.fit(module, datamodule=digits())
    assert seen == pytest.approx([factor, factor**2])
    assert runner.global_step == 4


@pytest.mark.parametrize(("steps", "interval", "warned"), [(2, "epoch", False), (9, "epoch", True), (9, "step", False)])
def test_a_cycle_has_as_many_steps_as_it_is_stepped(tmp_path: Path, steps: int, interval: Any, warned: bool) -> None:
    module = classifier(
        method=GradientAscent(),
        lr_scheduler=lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=steps),
        lr_interval=interval,
    )
    expected = pytest.warns(UserWarning, match="OneCycleLR has 9 steps and steps each epoch, of which the run has 2")
    with expected if warned else nullcontext():
        trainer(tmp_path, max_epochs=2).fit(module, datamodule=digits())


def test_scheduler_that_watches_a_metric(tmp_path: Path) -> None:
    module = classifier(
        method=GradientAscent(), lr_scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, monitor="train/loss", patience=0)
    )
    runner = trainer(tmp_path, max_epochs=1)
    runner.fit(module, datamodule=digits())
    assert runner.lr_scheduler_configs[0].monitor == "train/loss"


def test_frozen_weights_are_not_given_to_the_optimizer(tmp_path: Path) -> None:
    module = classifier()
    module.network.stem.requires_grad_(False)
    before = weights(module.network.stem[0])
    trainer(tmp_path, max_epochs=1).fit(module, datamodule=digits())
    assert same(weights(module.network.stem[0]), before)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_channels_last_stays_and_trains(tmp_path: Path, original: Path, precision: Any) -> None:
    module = classifier(original=original, channels_last=True, method=RandomLabel())
    trainer(tmp_path, max_epochs=1, precision=precision).fit(module, datamodule=digits())
    convolution = module.network.blocks[1].conv1.weight
    assert convolution.is_contiguous(memory_format=torch.channels_last)
    assert not convolution.is_contiguous()
    assert all(tensor.isfinite().all() for tensor in weights(module).values())


def test_the_largest_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", str(2**32 - 1))
    runner = trainer(tmp_path, max_epochs=1)
    runner.fit(classifier(method=RandomLabel()), datamodule=digits())
    assert runner.global_step == 12


def test_loaders_without_names_are_refused(tmp_path: Path) -> None:
    loader: DataLoader[Any] = DataLoader([0, 1])
    with pytest.raises(MisconfigurationException, match="give a dictionary of loaders called forget, retain, val, test"):
        trainer(tmp_path).test(classifier(), dataloaders=loader, verbose=False)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_random_labels_need_the_number_of_classes(tmp_path: Path) -> None:
    datamodule = digits(batch_size=2000)
    datamodule.setup()
    module = classifier(method=RandomLabel())
    with pytest.raises(MisconfigurationException, match="give the datamodule an attribute num_classes"):
        trainer(tmp_path, max_epochs=1).fit(module, datamodule.train_dataloader())


def test_a_method_that_does_not_get_its_part(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="GradientAscent needs the part 'forget' in each batch"):
        trainer(tmp_path, max_epochs=1).fit(classifier(method=GradientAscent()), datamodule=digits(order="retain"))


def plain_data(train: Any = None, **kwargs: Any) -> ForgetRetainDataModule:
    """Twelve random images of two classes, as a user hands them over."""
    images = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    data = Pairs(list(images), [0, 1] * 6) if train is None else train
    return ForgetRetainDataModule(**{"forget": ForgetRandom(count=4), "train": data, "batch_size": 4, **kwargs})


def test_without_test_data_what_can_be_is_measured(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module, datamodule = classifier(method=RandomLabel()), plain_data()
    runner = trainer(tmp_path, max_epochs=1)
    runner.fit(module, datamodule=datamodule)
    with caplog.at_level("INFO"):
        metrics = measure(module, tmp_path, datamodule)
    assert metrics.keys() == {"UA", "RA", "test/forget/acc", "test/retain/acc"}
    assert [message for message in caplog.messages if "no test set" in message] == [
        "There is no test set, so TA and MIA are left out."
    ]


class Noisy(nn.Module):
    """Everything that a forward pass can change: statistics, random numbers, a counter; and it tells when it was asked."""

    def __init__(self, outputs: int = 2) -> None:
        super().__init__()
        self.norm, self.head, self.asked = nn.BatchNorm2d(1), nn.Linear(64, outputs), 0
        self.norm.momentum = 0.5

    def forward(self, images: Tensor) -> Tensor:
        self.asked += 1
        torch.rand(3)
        logits: Tensor = self.head(self.norm(images).flatten(1))
        return logits


@pytest.mark.parametrize("stage", ["fit", "test", "predict", "validate"])
@pytest.mark.parametrize(
    ("network", "message"),
    [
        (SmallResNet(1, width=4, stages=1), "The network has 1 outputs, but the data has 2 classes"),
        (
            SmallResNet(2, in_channels=3, width=4, stages=1),
            r"cannot take the images .* shape \(1, 8, 8\): .*3 channels.*\. Make the network for",
        ),
        (nn.Sequential(nn.Flatten(), nn.Linear(49, 2)), r"cannot take the images .* shape \(1, 8, 8\): mat1 and mat2"),
        (nn.Conv2d(1, 2, 1), r"must give a row of logits for each image; for 2 images it gave \(2, 2, 8, 8\)"),
        (nn.Sequential(nn.Flatten(0), nn.Linear(128, 2)), r"must give a row of logits for each image; .* it gave \(2,\)"),
    ],
    ids=["outputs", "channels", "size", "a picture", "a row"],
)
def test_a_network_that_does_not_fit_is_refused_before_a_step(
    tmp_path: Path, network: nn.Module, message: str, stage: str
) -> None:
    module = ImageClassifier(network)
    module.on_train_batch_start = lambda *_: pytest.fail("a step was taken")  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=message):
        getattr(trainer(tmp_path, max_epochs=1, limit_val_batches=1.0), stage)(module, datamodule=plain_data())


def test_more_outputs_than_classes_are_no_harm(tmp_path: Path) -> None:
    assert "UA" in measure(ImageClassifier(SmallResNet(5, width=4, stages=1)), tmp_path, plain_data())


def test_trying_the_network_leaves_no_trace(tmp_path: Path) -> None:
    module, datamodule, runner = ImageClassifier(Noisy()), plain_data(), trainer(tmp_path, max_epochs=1)
    runner.fit(module, datamodule=datamodule)
    module.train()
    module.network.norm.eval()  # as somebody has set it
    before, modes, asked = weights(module), [part.training for part in module.modules()], module.network.asked
    drawn = torch.get_rng_state()
    module.check_network()
    assert module.network.asked == asked + 1
    assert same(weights(module), before)
    assert [part.training for part in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), drawn)


class Auxiliary(SmallResNet):
    """Returns its logits as others do."""

    def __init__(self, kind: str) -> None:
        super().__init__(2, width=4, stages=1)
        self.kind = kind

    def forward(self, images: Tensor) -> Any:
        logits = super().forward(images)
        if self.kind == "attribute":
            return SimpleNamespace(logits=logits, aux_logits=-logits)
        return {"tuple": (logits, -logits), "list": [logits], "mapping": {"logits": logits, "loss": None}}[self.kind]


@pytest.mark.parametrize("kind", ["attribute", "tuple", "list", "mapping"])
def test_logits_among_other_outputs(tmp_path: Path, kind: str) -> None:
    def run(network: nn.Module) -> dict[str, float]:
        torch.manual_seed(0)
        network.load_state_dict(state)
        module, datamodule = ImageClassifier(network, method=RandomLabel()), plain_data()
        trainer(tmp_path, max_epochs=1).fit(module, datamodule=datamodule)
        return measure(module, tmp_path, datamodule)

    state = SmallResNet(2, width=4, stages=1).state_dict()
    assert run(Auxiliary(kind)) == run(SmallResNet(2, width=4, stages=1))


@pytest.mark.parametrize("output", [None, "logits", {}, (), {"out": torch.zeros(2, 2)}])
def test_no_logits_among_the_outputs(output: Any) -> None:
    with pytest.raises(ValueError, match=f"returned a {type(output).__name__} without logits. Return them"):
        logits_of(output)


def test_a_single_sample_for_batch_norm(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 2))
    with pytest.raises(
        MisconfigurationException, match=r"a single sample, and a batch has \{'retain': 1\}. Choose a batch_size"
    ):
        trainer(tmp_path, max_epochs=1).fit(ImageClassifier(network), datamodule=plain_data(batch_size=7))


class Noting(FineTune):
    """Notes the mean loss and the number of samples of each step."""

    def loss(self, module: Any, batch: Any) -> Tensor:
        loss = super().loss(module, batch)
        self.steps = [*getattr(self, "steps", []), (loss.item(), sum(len(part.targets) for part in batch.values()))]
        return loss


def test_the_loss_of_an_epoch_is_a_mean_over_its_samples(tmp_path: Path) -> None:
    method, runner = Noting(), trainer(tmp_path, max_epochs=1)
    runner.fit(classifier(method=method), datamodule=digits())
    losses, sizes = zip(*method.steps, strict=True)
    assert len(set(sizes)) > 1  # the last batch is smaller
    assert runner.callback_metrics["train/loss"].item() == pytest.approx(np.average(losses, weights=sizes))


class Diverging(FineTune):
    """From its second epoch on, the loss is what a diverged model's is."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def loss(self, module: Any, batch: Any) -> Tensor:
        loss = super().loss(module, batch)
        return loss * self.value if module.current_epoch == 1 else loss


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_run_that_diverges_says_so_once(tmp_path: Path, value: float) -> None:
    with pytest.warns(UserWarning, match="NaN or infinite") as caught:
        trainer(tmp_path, max_epochs=4).fit(classifier(method=Diverging(value)), datamodule=plain_data())
    said = [str(warning.message) for warning in caught if "NaN or infinite" in str(warning.message)]
    assert said == [
        "The loss was NaN or infinite in epoch 1: the training has diverged. Lower the optimizer's learning rate, or set the"
        " trainer's gradient_clip_val."
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_wrong(tmp_path: Path, value: float) -> None:
    """Those of a model that diverged: argmax calls NaN class 0."""
    images = torch.rand(12, 1, 8, 8)
    module, datamodule = classifier(), plain_data(Pairs(list(images), [0] * 12), test=Pairs(list(images), [0] * 12))
    with torch.no_grad():
        module.network.head.bias[0] = value
    metrics = measure(module, tmp_path, datamodule)
    (validated,) = trainer(tmp_path, limit_val_batches=1.0).validate(module, datamodule=datamodule, verbose=False)
    assert (metrics["UA"], metrics["RA"], metrics["TA"]) == (100, 0, 0)
    assert np.isnan(metrics["MIA"])
    assert validated == {"val/forget/acc": 0}
