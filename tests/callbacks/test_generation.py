"""Which images are asked for, and what becomes of them in a test."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from salun_lightning.callbacks import GenerationEvaluator
from salun_lightning.callbacks.requests import ImageRequests, Requested
from salun_lightning.data import DigitsDataModule, ForgetClasses
from salun_lightning.networks import SmallResNet
from tests.modules.small_diffusion import CLASSES, diffusion, images
from tests.modules.small_runs import trainer

NAMES = ["cat", "dog", "owl"]


def place(batch_size: int = 8, processes: int = 1, rank: int = 0) -> Any:
    """A trainer, as far as requests depend on it."""
    data = SimpleNamespace(class_names=NAMES, batch_size=batch_size)
    return SimpleNamespace(datamodule=data, world_size=processes, global_rank=rank)


def asked(loader: Any) -> list[tuple[int, int]]:
    """The requests of a loader: condition, and number within the condition."""
    batches = list(loader)
    for batch in batches:
        assert isinstance(batch, Requested)
        assert batch.targets.dtype == batch.indices.dtype == torch.int64
        assert batch.targets.shape == batch.indices.shape == (len(batch.targets),)
    return [pair for batch in batches for pair in zip(batch.targets.tolist(), batch.indices.tolist(), strict=True)]


def requests(conditions: list[int], per_condition: int) -> list[tuple[int, int]]:
    return [(number, index) for number in conditions for index in range(per_condition)]


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
@pytest.mark.parametrize("number", [1, 5])
def test_every_condition_is_asked_for_equally_often(number: int, batch_size: int) -> None:
    loader = GenerationEvaluator(number).loader(place(batch_size))
    assert asked(loader) == requests([0, 1, 2], number)
    assert max(len(batch.targets) for batch in loader) <= batch_size


def test_as_many_as_a_condition_asks_for_things() -> None:
    data = place()
    data.datamodule.contents = torch.tensor([[3, -1], [1, 2], [-1, 5]])
    assert asked(GenerationEvaluator([2, 1]).loader(data)) == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]
    assert asked(GenerationEvaluator([2, 1], "cat").loader(data)) == [(0, 0), (0, 1)]
    assert asked(GenerationEvaluator([1]).loader(data)) == requests([0, 1, 2], 1)
    with pytest.raises(ValueError, match="per_condition is a list, and the datamodule has no contents"):
        GenerationEvaluator([2, 1]).loader(place())
    with pytest.raises(ValueError, match=r"per_condition must be positive, got \[2, 0\]"):
        GenerationEvaluator([2, 0])


@pytest.mark.parametrize(
    ("conditions", "numbers"),
    [
        (None, [0, 1, 2]),
        (["owl"], [2]),
        ("owl", [2]),
        (1, [1]),
        ([2, "cat"], [0, 2]),
        (["cat", 0, "cat"], [0]),
    ],
)
def test_conditions_by_name_or_number(conditions: Any, numbers: list[int]) -> None:
    assert asked(GenerationEvaluator(2, conditions).loader(place())) == requests(numbers, 2)


@pytest.mark.parametrize(
    ("conditions", "name"), [(["fox"], "fox"), ("fox", "fox"), (["owl", "fox"], "fox"), ([-1], -1), (3, 3)]
)
def test_a_condition_that_is_not_there(conditions: Any, name: Any) -> None:
    with pytest.raises(ValueError, match=rf"There is no class '{name}'\. The classes are: cat, dog, owl\."):
        GenerationEvaluator(2, conditions).requests(NAMES)


def test_a_condition_that_is_not_there_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no class 'fox'"):
        trainer(tmp_path, max_epochs=1).fit(diffusion(evaluation=GenerationEvaluator(1, "fox")), datamodule=images())


@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.parametrize(("number", "batch_size"), [(5, 4), (7, 2), (2, 64)])
def test_processes_share_the_requests(processes: int, number: int, batch_size: int) -> None:
    parts = []
    for rank in range(processes):
        loader = GenerationEvaluator(number).loader(place(batch_size, processes, rank))
        assert max(len(batch.targets) for batch in loader) <= batch_size
        parts.append((len(loader), asked(loader)))
    assert len({steps for steps, _ in parts}) == 1  # or the processes would wait for each other
    assert sorted(pair for _, share in parts for pair in share) == requests([0, 1, 2], number)
    assert max(len(share) for _, share in parts) - min(len(share) for _, share in parts) <= parts[0][0]


def test_more_processes_than_images() -> None:
    with pytest.raises(ValueError, match="use at most 3 processes"):
        GenerationEvaluator(1).loader(place(processes=4))


def test_requests_by_themselves() -> None:
    requested = ImageRequests([4, 1], 3)
    assert len(requested) == 6
    batch = requested[[5, 0, 2]]
    assert (batch.targets.tolist(), batch.indices.tolist()) == ([1, 4, 4], [2, 0, 2])


def test_lightning_hands_the_requests_over() -> None:
    class Echo(LightningModule):
        evaluation = GenerationEvaluator(3, ["3", 7])

        def predict_dataloader(self) -> Any:
            return self.evaluation.loader(self.trainer)

        def predict_step(self, batch: Requested, batch_idx: int) -> Requested:
            return batch

    data = DigitsDataModule(forget=ForgetClasses(["3"]), batch_size=4)
    runner = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    assert asked(runner.predict(Echo(), datamodule=data)) == requests([3, 7], 3)


@pytest.mark.parametrize("number", [0, -1])
def test_a_number_of_images_that_is_not_positive(number: int) -> None:
    with pytest.raises(ValueError, match=f"per_condition must be positive, got {number}"):
        GenerationEvaluator(number)


@pytest.mark.parametrize("neighbours", [-1, 0])
def test_neighbours_must_be_positive(neighbours: int) -> None:
    """Told at once, not after hours of sampling."""
    with pytest.raises(ValueError, match="neighbours must be positive"):
        GenerationEvaluator(neighbours=neighbours)


@pytest.mark.parametrize("classifier", [None, nn.Flatten()])
def test_features_of_no_classifier(classifier: nn.Module | None) -> None:
    with pytest.raises(ValueError, match="features: classifier needs a classifier with a linear layer"):
        GenerationEvaluator(classifier=classifier, features="classifier")


def network(seed: int = 0) -> SmallResNet:
    torch.manual_seed(seed)
    return SmallResNet(CLASSES, width=4, stages=1, in_channels=1)


def judge(per_condition: int = 10, **kwargs: Any) -> GenerationEvaluator:
    return GenerationEvaluator(per_condition, **{"classifier": network(), "features": "classifier", **kwargs})


def measured(evaluation: GenerationEvaluator, folder: Path, **kwargs: Any) -> dict[str, float]:
    results = trainer(folder, **kwargs).test(diffusion(evaluation=evaluation), datamodule=images(), verbose=False)
    return {name: value for result in results for name, value in result.items()}


def test_what_the_features_are_called() -> None:
    assert GenerationEvaluator().description == "Inception (2,048 features)"
    assert judge().description == "SmallResNet before its last layer"
    assert judge(features=nn.Flatten()).description == "Flatten"


def test_what_judges_is_kept_as_predictions(tmp_path: Path) -> None:
    evaluation = judge(conditions=[0, 2])
    measured(evaluation, tmp_path)
    assert evaluation.predictions is not None
    predicted = evaluation.predictions.sets["generated"]
    assert predicted.targets.tolist() == [0, 2] * 10
    assert predicted.indices.tolist() == [number * CLASSES + condition for number in range(10) for condition in (0, 2)]
    drawn = diffusion().sample(predicted.targets, predicted.indices // CLASSES)
    pixels = (255 * drawn).round()
    with torch.no_grad():
        torch.testing.assert_close(predicted.logits, network().eval()(pixels / 255))
    assert predicted.logits.dtype == torch.float32
    assert {number: sorted(shown) for number, shown in evaluation.examples.items()} == {0: [*range(8)], 2: [*range(8)]}
    assert torch.equal(evaluation.examples[2][7], pixels[15].to(torch.uint8))


def test_without_a_classifier_only_distances_are_measured(tmp_path: Path) -> None:
    evaluation = GenerationEvaluator(4, features=nn.Flatten())
    results = measured(evaluation, tmp_path)
    assert evaluation.predictions is None
    assert {"FID", "KID", "num_generated"} <= results.keys()
    assert not {"UA", "acc", "entropy"} & results.keys()


def test_weights_are_loaded_once(tmp_path: Path) -> None:
    torch.save(
        {"state_dict": {f"network.{name}": value for name, value in network(5).state_dict().items()}}, tmp_path / "j.ckpt"
    )
    expected = measured(judge(classifier=network(5)), tmp_path)
    evaluation = judge(weights=tmp_path / "j.ckpt")
    assert measured(evaluation, tmp_path) == expected
    (tmp_path / "j.ckpt").unlink()
    assert measured(evaluation, tmp_path) == expected != measured(judge(), tmp_path)


def broken(save: Callable[[Path], Any]) -> Callable[[Path], Path]:
    def made(folder: Path) -> Path:
        save(folder / "other.ckpt")
        return folder / "other.ckpt"

    return made


@pytest.mark.parametrize(
    ("weights", "error", "sentence"),
    [
        (lambda folder: folder / "none.ckpt", FileNotFoundError, r"There is no .* at '.*none\.ckpt'"),
        (broken(lambda path: torch.save(nn.Linear(2, 2).state_dict(), path)), ValueError, "does not fit the network"),
    ],
)
def test_weights_that_cannot_be_loaded(tmp_path: Path, weights: Any, error: type[Exception], sentence: str) -> None:
    evaluation = judge(weights=weights(tmp_path))  # they may be trained before the test
    with pytest.raises(error, match=sentence):
        measured(evaluation, tmp_path)


def test_a_test_that_was_broken_off_leaves_nothing(tmp_path: Path) -> None:
    evaluation = judge()
    module = diffusion(evaluation=evaluation)
    sample, calls = module.sample, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == 3:
            raise RuntimeError("the power failed")
        return sample(*args, **kwargs)

    module.sample = failing  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="the power failed"):
        trainer(tmp_path).test(module, datamodule=images(), verbose=False)
    assert len(calls) == 3
    assert measured(evaluation, tmp_path) == measured(judge(), tmp_path)


def test_what_measures_is_in_float32_and_frozen(tmp_path: Path) -> None:
    evaluation = judge(features=nn.Sequential(nn.Flatten(), nn.Dropout(0.9)))
    module = diffusion(evaluation=evaluation).bfloat16()
    (results, *_) = trainer(tmp_path, precision="bf16-true").test(module, datamodule=images(), verbose=False)
    assert results["FID"] >= 0
    for holder in (evaluation.classifier, evaluation.features):
        assert holder is not None
        assert not any(part.training for part in holder.network.modules())
        assert not any(weight.requires_grad for weight in holder.network.parameters())
        assert {weight.dtype for weight in holder.network.parameters()} <= {torch.float32}


@pytest.mark.parametrize(("limit", "number"), [(2, 6), (0.5, 6), (1.0, 20)])
def test_a_limit_of_batches_holds_for_what_is_sampled(tmp_path: Path, limit: Any, number: int) -> None:
    """Of batches of 8; class 0 is forgotten, and the first 10 images are of it."""
    runner, module = trainer(tmp_path, limit_test_batches=limit), diffusion(evaluation=judge())
    runner.test(module, datamodule=images(count=60, test=48), verbose=False)
    assert runner.callback_metrics["num_generated"] == number
