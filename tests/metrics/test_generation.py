"""What is measured of generated images, against independent computations."""

import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from scipy.linalg import sqrtm
from torch import Tensor, nn
from torch.nn import functional

from salun_lightning.metrics import GenerationQuality
from tests.metrics.test_manifold import brute_force
from tests.small import free_port

NAMES = ["cat", "dog", "owl"]
COMPARED = {"num_real", "num_generated", "FID", "KID", "precision", "recall"}


class Answers(nn.Module):
    """A classifier that answers an image whose pixels are i / 255 with row i of a table of logits."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.register_buffer("logits", torch.tensor(logits))

    def forward(self, images: Tensor) -> Tensor:
        answers: Tensor = self.logits[(255 * images[:, 0, 0, 0]).round().long()]
        return answers


class Judge(nn.Module):
    """A classifier with two linear layers, and with dropout that would show if it were left on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.dropout, self.last = nn.Linear(16, 5), nn.Dropout(0.5), nn.Linear(5, 3)

    def hidden(self, images: Tensor) -> Tensor:
        return self.dropout(self.first(images.flatten(1)).tanh())

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.last(self.hidden(images))
        return logits


@pytest.fixture
def judge() -> Judge:
    torch.manual_seed(3)
    return Judge()


def images(count: int, seed: int, shift: float = 0.0) -> Tensor:
    return (torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) + shift).clamp(0, 1)


def numbered(count: int) -> Tensor:
    return (torch.arange(count) / 255).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)


def measured(quality: GenerationQuality) -> dict[str, float]:
    return {name: value.item() for name, value in quality.compute().items()}


def compare(real: Tensor, generated: Tensor, quality: GenerationQuality | None = None) -> dict[str, float]:
    """What is measured of images that are all of the retained class 0."""
    quality = quality or GenerationQuality(features=nn.Flatten())
    quality.start(NAMES)
    for batch, is_real in ((real, True), (generated, False)):
        for part in batch.split(17):
            quality.update(part, torch.zeros(len(part), dtype=torch.int64), torch.ones(len(part), dtype=torch.bool), is_real)
    return measured(quality)


def test_accuracies_and_entropy_worked_out_by_hand() -> None:
    sure, even = [0.0, 50.0, 0.0], [0.0, 0.0, 0.0]
    # asked for: dog (forgotten) four times, cat twice, owl once
    answers = [sure, even, [1.0, 0.0, 0.0], [0.0, -1e4, -1e4], [9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 9.0]]
    targets = torch.tensor([1, 1, 1, 1, 0, 0, 2])
    quality = GenerationQuality(Answers(answers), features=nn.Flatten())
    quality.start(NAMES)
    for part in torch.arange(7).split(3):
        quality.update(numbered(7)[part], targets[part], targets[part] != 1, real=False)
    p = np.exp(1) / (np.exp(1) + 2)
    entropies = [0.0, np.log(3), -p * np.log(p) - (1 - p) * np.log((1 - p) / 2), 0.0]
    assert measured(quality) == pytest.approx(
        {
            "UA": 75,  # of four dogs one is recognised
            "entropy": np.mean(entropies),
            "acc": 100 * 2 / 3,
            "acc/cat": 50,
            "acc/dog": 25,
            "acc/owl": 100,
        },
        abs=1e-4,
    )


def test_nothing_is_forgotten_whole() -> None:
    quality = GenerationQuality(Answers([[1.0, 0.0, 0.0]]), features=nn.Flatten())
    quality.start(NAMES)
    quality.update(numbered(1), torch.tensor([0]), torch.tensor([True]), real=False)
    assert measured(quality) == {"acc": 100, "acc/cat": 100}


def test_all_that_is_asked_for_is_forgotten() -> None:
    quality = GenerationQuality(Answers([[1.0, 0.0, 0.0]] * 5), features=nn.Flatten())
    quality.start(NAMES)
    quality.update(numbered(5), torch.zeros(5, dtype=torch.int64), torch.ones(5, dtype=torch.bool), real=True)
    quality.update(numbered(1), torch.tensor([1]), torch.tensor([False]), real=False)
    results = measured(quality)
    assert results["UA"] == 100
    assert results["num_generated"] == 0
    assert "acc" not in results
    assert "FID" not in results


def test_entropy_of_impossible_answers_is_finite() -> None:
    """The logarithm of a probability of 0 is infinite; 0 log 0 is 0."""
    inf = float("inf")
    quality = GenerationQuality(Answers([[0.0, -inf, -inf], [0.0, 0.0, -inf], [0.0, -1e4, -1e4]]), features=nn.Flatten())
    quality.start(NAMES)
    quality.update(numbered(3), torch.ones(3, dtype=torch.int64), torch.zeros(3, dtype=torch.bool), real=False)
    assert measured(quality)["entropy"] == pytest.approx(np.log(2) / 3, abs=1e-6)


def frechet(real: Tensor, generated: Tensor) -> float:
    """Heusel et al., equation 6."""
    x, y = (features.flatten(1).double().numpy() for features in (real, generated))
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    distance: float = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)
    return distance


def squared_mmd(real: Tensor, generated: Tensor) -> float:
    """Binkowski et al., equation 4, with the kernel (x y / d + 1)^3, one pair at a time."""
    x, y = (features.flatten(1).double().tolist() for features in (real, generated))

    def kernel(one: list[float], other: list[float]) -> float:
        return (sum(a * b for a, b in zip(one, other, strict=True)) / len(one) + 1) ** 3

    def within(points: list[list[float]]) -> float:
        pairs = [kernel(a, b) for i, a in enumerate(points) for j, b in enumerate(points) if i != j]
        return sum(pairs) / len(pairs)

    across = [kernel(a, b) for a in x for b in y]
    return within(x) + within(y) - 2 * sum(across) / len(across)


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_distances_are_those_of_the_papers(shift: float) -> None:
    real, generated = images(60, 0), images(60, 1, shift)
    results = compare(real, generated)
    assert results.keys() == COMPARED
    assert results["FID"] == pytest.approx(frechet(real, generated), rel=1e-4)
    assert results["KID"] == pytest.approx(squared_mmd(real, generated), rel=1e-3, abs=1e-6)
    expected = brute_force(real.flatten(1), generated.flatten(1), 3)
    assert (results["precision"], results["recall"]) == pytest.approx(expected)
    assert (results["num_real"], results["num_generated"]) == (60, 60)


def test_real_test_images_are_measured_beside_the_generated_ones() -> None:
    real, test, generated = images(60, 0), images(40, 1, 0.1), images(50, 2, 0.3)
    classes = torch.arange(40) % 3  # dogs are forgotten; no owl is asked for
    quality = GenerationQuality(features=nn.Flatten())
    alone = compare(real, generated, quality)
    assert not {"FID_real", "num_test"} & alone.keys()
    for part in torch.arange(40).split(9):
        quality.update(test[part], classes[part], classes[part] != 1, real=True, held_out=True)
    results = measured(quality)
    cats = test[classes == 0]
    assert results["FID_real"] == pytest.approx(frechet(real, cats), rel=1e-3)
    assert results["num_test"] == len(cats) == 14
    assert {name: results[name] for name in alone} == alone


def test_a_single_real_test_image_has_no_distance() -> None:
    quality = GenerationQuality(features=nn.Flatten())
    compare(images(9, 0), images(9, 1), quality)
    quality.update(images(1, 2), torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.bool), real=True, held_out=True)
    results = measured(quality)
    assert results["num_test"] == 1
    assert "FID_real" not in results


def test_unequal_numbers_of_images() -> None:
    real, generated = images(90, 0), images(40, 1, 0.2)
    results = compare(real, generated, GenerationQuality(features=nn.Flatten(), neighbours=2))
    assert results["FID"] == pytest.approx(frechet(real, generated), rel=1e-4)
    expected = brute_force(real.flatten(1), generated.flatten(1), 2)
    assert (results["precision"], results["recall"]) == pytest.approx(expected)
    assert (results["num_real"], results["num_generated"]) == (90, 40)
    assert results["KID"] == pytest.approx(squared_mmd(real, generated), rel=0.5)  # of subsets of the 90


def test_the_same_images_are_no_distance_apart() -> None:
    results = compare(images(60, 0), images(60, 0))
    assert results["FID"] == pytest.approx(0, abs=1e-4)
    assert (results["precision"], results["recall"]) == (1, 1)


def test_features_of_the_classifier_are_what_its_last_linear_layer_sees(judge: Judge) -> None:
    real, generated = images(40, 0), images(40, 1, 0.2)
    results = compare(real, generated, GenerationQuality(judge, features="classifier"))
    judge.eval()
    with torch.no_grad():
        seen = [judge.hidden(batch) for batch in (real, generated)]
        recognised = (judge(generated).argmax(1) == 0).float().mean().item()
    assert results["FID"] == pytest.approx(frechet(*seen), rel=1e-3)
    assert results["KID"] == pytest.approx(squared_mmd(*seen), rel=1e-3, abs=1e-6)
    assert results["acc"] == pytest.approx(100 * recognised)


def test_nothing_hangs_on_the_classifier_afterwards(judge: Judge) -> None:
    compare(images(10, 0), images(10, 1), GenerationQuality(judge, features="classifier"))
    assert not judge.last._forward_pre_hooks


def test_a_classifier_that_fails_is_left_without_hooks(judge: Judge) -> None:
    quality = GenerationQuality(judge, features="classifier")
    quality.start(NAMES)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        quality.update(torch.rand(2, 1, 5, 5), torch.tensor([0, 1]), torch.tensor([True, True]), real=False)
    assert not judge.last._forward_pre_hooks


def test_images_of_forgotten_classes_are_compared_with_nothing() -> None:
    real, generated = images(40, 0), images(40, 1, 0.2)
    quality = GenerationQuality(features=nn.Flatten())
    quality.start(NAMES)
    for batch, is_real in ((real, True), (generated, False)):
        mixed = torch.cat([torch.ones(30, 1, 4, 4), batch])
        targets = torch.tensor([1] * 30 + [0] * 40)
        order = torch.randperm(70, generator=torch.Generator().manual_seed(0))
        for part in order.split(9):
            quality.update(mixed[part], targets[part], targets[part] != 1, is_real)
    assert measured(quality) == pytest.approx(compare(real, generated), rel=1e-4)


def test_a_batch_of_forgotten_real_images_alone(judge: Judge) -> None:
    quality = GenerationQuality(judge, features="classifier")
    quality.start(NAMES)
    quality.update(images(5, 0), torch.ones(5, dtype=torch.int64), torch.zeros(5, dtype=torch.bool), real=True)
    assert sum(len(part) for part in quality.real) == 0


def test_started_again_it_measures_the_same(judge: Judge) -> None:
    quality = GenerationQuality(judge, features="classifier")
    first = compare(images(60, 0), images(30, 1), quality)
    other = compare(images(60, 2), images(30, 3), quality)
    assert compare(images(60, 0), images(30, 1), quality) == first != other


def test_a_test_that_was_broken_off_leaves_nothing(judge: Judge) -> None:
    quality = GenerationQuality(judge, features="classifier")
    quality.start(NAMES)
    quality.update(images(7, 8), torch.zeros(7, dtype=torch.int64), torch.ones(7, dtype=torch.bool), real=False)
    fresh = GenerationQuality(judge, features="classifier")
    assert compare(images(60, 0), images(30, 1), quality) == compare(images(60, 0), images(30, 1), fresh)


def test_measuring_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    compare(images(60, 0), images(30, 1))
    assert torch.equal(torch.rand(3), expected)


class Module(LightningModule):
    """A module that measures with it."""

    def __init__(self, quality: GenerationQuality) -> None:
        super().__init__()
        self.network = nn.Linear(1, 1)
        self.quality = quality


@pytest.mark.parametrize("features", ["classifier", nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4))])
def test_nothing_of_it_is_trained_or_saved(features: Any, judge: Judge) -> None:
    module = Module(GenerationQuality(judge, features=features))
    compare(images(10, 0), images(10, 1), module.quality)
    assert [name for name, _ in module.named_parameters()] == ["network.weight", "network.bias"]
    assert list(module.state_dict()) == ["network.weight", "network.bias"]
    assert [name for name, _ in module.named_buffers()] == []


def test_what_measures_is_frozen_and_in_eval_mode(judge: Judge) -> None:
    extractor = nn.Sequential(nn.Flatten(), nn.Dropout(0.9))
    compare(images(10, 0), images(10, 1), GenerationQuality(judge, features=extractor))
    assert not judge.training
    assert not extractor.training
    assert not any(parameter.requires_grad for parameter in judge.parameters())


def test_weights_are_loaded_once(tmp_path: Path, judge: Judge) -> None:
    trained = Judge()
    torch.save({"state_dict": {f"network.{name}": value for name, value in trained.state_dict().items()}}, tmp_path / "j.ckpt")
    expected = compare(images(20, 0), images(20, 1), GenerationQuality(trained, features="classifier"))
    quality = GenerationQuality(judge, tmp_path / "j.ckpt", features="classifier")
    assert compare(images(20, 0), images(20, 1), quality) == expected
    (tmp_path / "j.ckpt").unlink()
    assert compare(images(20, 0), images(20, 1), quality) == expected


def test_weights_that_are_not_there(tmp_path: Path, judge: Judge) -> None:
    quality = GenerationQuality(judge, tmp_path / "none.ckpt", features="classifier")  # they may be trained before the test
    with pytest.raises(FileNotFoundError, match=r"There is no .* at '.*none\.ckpt'"):
        quality.start(NAMES)


def test_weights_of_another_network(tmp_path: Path, judge: Judge) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.ckpt")
    quality = GenerationQuality(judge, tmp_path / "other.ckpt", features="classifier")
    with pytest.raises(ValueError, match="does not fit the network"):
        quality.start(NAMES)


@pytest.mark.parametrize("classifier", [None, nn.Flatten()])
def test_features_of_no_classifier(classifier: nn.Module | None) -> None:
    with pytest.raises(ValueError, match="features: classifier needs a classifier with a linear layer"):
        GenerationQuality(classifier, features="classifier")


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is not None, reason="torch-fidelity is installed")
def test_inception_without_torch_fidelity_is_explained() -> None:
    with pytest.raises(ModuleNotFoundError, match="pip install torch-fidelity"):
        GenerationQuality().start(NAMES)


def test_inception_takes_bytes_with_three_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Tensor] = []

    class Inception(nn.Module):
        def forward(self, batch: Tensor) -> Tensor:
            given.append(batch)
            return batch.flatten(1).float()

    class Distance:
        def __init__(self, feature: int) -> None:
            assert feature == 2048
            self.inception = Inception()

    whole = images(20, 0)
    quality = GenerationQuality()
    with monkeypatch.context() as patch:
        patch.setattr("salun_lightning.metrics.generation.FrechetInceptionDistance", Distance)
        quality.start(NAMES)
    results = compare(whole, whole, quality)
    assert all(batch.dtype == torch.uint8 and batch.shape[1:] == (3, 4, 4) for batch in given)
    assert torch.equal(torch.cat(given)[:20, 2:], (255 * whole).round().to(torch.uint8))
    assert results["FID"] == pytest.approx(0, abs=0.1)
    assert quality.description == "Inception (2,048 features)"


def test_what_the_features_are_called(judge: Judge) -> None:
    assert GenerationQuality(judge, features="classifier").description == "Judge before its last layer"
    assert GenerationQuality(judge, features=nn.Flatten()).description == "Flatten"


@pytest.mark.parametrize(("real", "generated"), [(0, 5), (5, 0), (3, 50), (50, 3), (1, 1)])
def test_too_few_images_to_compare(real: int, generated: int) -> None:
    results = compare(images(real, 0), images(generated, 1))
    assert not results.keys() & {"FID", "KID", "precision", "recall"}


@pytest.mark.parametrize("neighbours", [-1, 0])
def test_neighbours_must_be_positive(neighbours: int) -> None:
    """Told at once, not after hours of sampling."""
    with pytest.raises(ValueError, match="neighbours must be positive"):
        GenerationQuality(features=nn.Flatten(), neighbours=neighbours)


def test_just_enough_images_to_compare() -> None:
    assert compare(images(4, 0), images(4, 1)).keys() == COMPARED


def test_a_class_whose_images_have_no_variance_is_compared_all_the_same() -> None:
    """A model that draws one image over and over."""
    real = images(60, 0)
    results = compare(real, real[:1].repeat(60, 1, 1, 1))
    mean, covariance = real.flatten(1).double().mean(0), real.flatten(1).double().T.cov()
    expected = ((mean - real[0].flatten().double()) ** 2).sum() + covariance.trace()
    assert results["FID"] == pytest.approx(expected.item(), rel=1e-4)
    assert results["precision"] == 1
    assert results["recall"] == pytest.approx(1 / 60)


def test_fewer_images_than_features() -> None:
    real, generated = images(9, 0), images(8, 1, 0.3)
    results = compare(real, generated)
    x, y = (batch.flatten(1).double() for batch in (real, generated))
    # the trace of the root of the product of the covariances is the sum of the singular values of the centred products
    products = (x - x.mean(0)) @ (y - y.mean(0)).T / np.sqrt((len(x) - 1) * (len(y) - 1))
    trace = x.T.cov().trace() + y.T.cov().trace() - 2 * torch.linalg.svdvals(products).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + trace
    assert results["FID"] == pytest.approx(expected.item(), rel=1e-4)


class Broken(nn.Module):
    """A classifier that answers the first image with no number at all."""

    def forward(self, batch: Tensor) -> Tensor:
        logits = torch.zeros(len(batch), 3)
        logits[0] = float("nan")
        return logits


def test_answers_that_are_no_numbers_have_no_entropy() -> None:
    quality = GenerationQuality(Broken(), features=nn.Flatten())
    quality.start(NAMES)
    quality.update(images(4, 0), torch.ones(4, dtype=torch.int64), torch.zeros(4, dtype=torch.bool), real=False)
    results = measured(quality)
    assert np.isnan(results["entropy"])
    assert results["UA"] == 100


def shares(forgotten_alone: bool) -> list[dict[str, Any]]:
    """Unequal parts of the same images for two processes; one may hold images of the forgotten class alone."""
    real, generated = images(60, 0), images(90, 1, 0.2)
    targets = torch.arange(90) % 3
    order = torch.argsort((targets != 1).int(), stable=True) if forgotten_alone else torch.arange(90)
    return [
        {"real": real[rows], "generated": generated[asked], "targets": targets[asked]}
        for rows, asked in zip(torch.arange(60).split([25, 35]), order.split([25, 65]), strict=True)
    ]


def measured_of(parts: list[dict[str, Any]], classified: bool) -> dict[str, float]:
    torch.manual_seed(3)
    quality = GenerationQuality(Judge() if classified else None, features="classifier" if classified else nn.Flatten())
    quality.start(NAMES)
    for part in parts:
        number = len(part["real"])
        quality.update(part["real"], torch.zeros(number, dtype=torch.int64), torch.ones(number, dtype=torch.bool), real=True)
        quality.update(part["generated"], part["targets"], part["targets"] != 1, real=False)
    return measured(quality)


KINDS = [(forgotten_alone, classified) for forgotten_alone in (False, True) for classified in (False, True)]


def one_of_two(folder: Path, rank: int) -> None:
    """What one of two processes measures."""
    torch.distributed.init_process_group("gloo", world_size=2, rank=rank)
    found = [measured_of([shares(alone)[rank]], classified) for alone, classified in KINDS]
    torch.distributed.destroy_process_group()
    (folder / f"found-{rank}.json").write_text(json.dumps(found))


def broken_features(folder: Path) -> None:
    """What is measured where one image has features that are no numbers."""
    broken = images(20, 1)
    broken[3] = float("nan")
    (folder / "broken.json").write_text(json.dumps(compare(images(20, 0), broken)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What processes found that this one started: each of them a fork, so that the imports are paid for once."""
    folder = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.metrics.test_generation", str(folder)]
    subprocess.run(command, env=environment, timeout=120, check=True)
    return folder


def start_processes(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=one_of_two, args=(folder, rank)) for rank in (0, 1)]
    processes.append(context.Process(target=broken_features, args=(folder,)))
    for process in processes:
        process.start()
    for process in processes:
        process.join()


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=[f"alone={alone}-classified={c}" for alone, c in KINDS])
def test_two_processes_measure_what_one_does(folder: Path, kind: int) -> None:
    alone, classified = KINDS[kind]
    parts = shares(alone)
    assert (parts[0]["targets"] == 1).all() == alone
    expected = measured_of(parts, classified)
    first, second = (json.loads((folder / f"found-{rank}.json").read_text())[kind] for rank in (0, 1))
    assert first == second
    assert ("UA" in expected) == classified
    assert (expected["num_real"], expected["num_generated"]) == (60, 60)  # so that KID is of all, in whatever order
    assert first == pytest.approx(expected, rel=1e-3)


def test_features_that_are_no_numbers_have_no_distance(folder: Path) -> None:
    """A process of its own measures them: LAPACK may end the one that gives it such numbers."""
    assert (folder / "broken.json").is_file()
    results = json.loads((folder / "broken.json").read_text())
    assert np.isnan(results["FID"])
    assert np.isnan(results["KID"])


def test_half_precision_is_taken(judge: Judge) -> None:
    whole, half = images(20, 0), images(20, 0).bfloat16()
    assert compare(half, half).keys() == COMPARED
    assert compare(half, half)["FID"] == pytest.approx(0, abs=1e-3)
    assert functional.mse_loss(whole, half.float()) < 1e-4


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    start_processes(Path(sys.argv[1]))
