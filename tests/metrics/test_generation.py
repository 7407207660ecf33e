"""What is measured of generated images, against independent computations."""

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
from scipy.linalg import sqrtm
from torch import Tensor, nn
from torchmetrics import Metric

from salun_lightning.evidence.measures import recognition
from salun_lightning.evidence.predictions import PredictedSet, Recorder
from salun_lightning.metrics import Distribution
from tests.metrics.test_manifold import brute_force
from tests.small import free_port

NAMES = ["cat", "dog", "owl"]
COMPARED = {"num_real", "num_generated", "FID", "KID", "precision", "recall"}


def images(count: int, seed: int, shift: float = 0.0) -> Tensor:
    return (torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) + shift).clamp(0, 1)


def numbers(metric: Metric) -> dict[str, float]:
    return {name: value.item() for name, value in metric.compute().items()}


def compare(real: Tensor, generated: Tensor, metric: Distribution | None = None) -> dict[str, float]:
    """What is measured of images of one condition, with their pixels as features."""
    metric = metric or Distribution()
    metric.reset()
    for batch, kind in ((real, "real"), (generated, "generated")):
        for part in batch.flatten(1).split(17):
            metric.update(part, torch.zeros(len(part), dtype=torch.int64), kind)
    return numbers(metric)


def recognise(logits: Tensor, targets: list[int], forgotten: int = 1, names: list[str] = NAMES) -> dict[str, float]:
    return recognition(PredictedSet(logits, torch.tensor(targets), torch.arange(len(targets))), [forgotten], names)


def test_accuracies_and_entropy_worked_out_by_hand() -> None:
    sure, even = [0.0, 50.0, 0.0], [0.0, 0.0, 0.0]
    # asked for: dog (forgotten) four times, cat twice, owl once
    answers = [sure, even, [1.0, 0.0, 0.0], [0.0, -1e4, -1e4], [9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 9.0]]
    p = np.exp(1) / (np.exp(1) + 2)
    entropies = [0.0, np.log(3), -p * np.log(p) - (1 - p) * np.log((1 - p) / 2), 0.0]
    assert recognise(torch.tensor(answers), [1, 1, 1, 1, 0, 0, 2]) == pytest.approx(
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
    assert recognise(torch.tensor([[1.0, 0.0, 0.0]]), [0]) == {"acc": 100, "acc/cat": 100}


def test_all_that_is_asked_for_is_forgotten() -> None:
    results = recognise(torch.tensor([[1.0, 0.0, 0.0]]), [1])
    assert results.keys() == {"UA", "entropy", "acc/dog"}
    assert results["UA"] == 100
    metric = Distribution()
    metric.update(torch.rand(5, 2), torch.zeros(5, dtype=torch.int64), "real")
    metric.update(torch.rand(0, 2), torch.zeros(0, dtype=torch.int64), "generated")
    assert numbers(metric) == {"num_real": 0, "num_generated": 0}


def test_real_images_alone_are_compared_with_nothing() -> None:
    metric = Distribution()
    metric.update(torch.rand(5, 2), torch.zeros(5, dtype=torch.int64), "real")
    assert metric.compute() == {}


def test_entropy_of_impossible_answers_is_finite() -> None:
    """The logarithm of a probability of 0 is infinite; 0 log 0 is 0."""
    inf = float("inf")
    answers = torch.tensor([[0.0, -inf, -inf], [0.0, 0.0, -inf], [0.0, -1e4, -1e4]])
    assert recognise(answers, [1, 1, 1])["entropy"] == pytest.approx(np.log(2) / 3, abs=1e-6)


def test_answers_that_are_no_numbers_have_no_entropy() -> None:
    answers = torch.zeros(4, 3)
    answers[0] = float("nan")
    results = recognise(answers, [1, 1, 1, 1])
    assert np.isnan(results["entropy"])
    assert results["UA"] == 100


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
    classes = torch.arange(40) % 2  # none of class 1 is asked for
    metric = Distribution()
    alone = compare(real, generated, metric)
    assert not {"FID_real", "num_test"} & alone.keys()
    for part in torch.arange(40).split(9):
        metric.update(test[part].flatten(1), classes[part], "held_out")
    results = numbers(metric)
    cats = test[classes == 0]
    assert results["FID_real"] == pytest.approx(frechet(real, cats), rel=1e-3)
    assert results["num_test"] == len(cats) == 20
    assert {name: results[name] for name in alone} == alone


def test_real_images_of_what_is_not_asked_for_are_compared_with_nothing() -> None:
    metric = Distribution()
    expected = compare(images(40, 0), images(40, 1, 0.2), metric)
    metric.update(torch.ones(30, 16), torch.full((30,), 2), "real")
    assert numbers(metric) == expected


def test_a_single_real_test_image_has_no_distance() -> None:
    metric = Distribution()
    compare(images(9, 0), images(9, 1), metric)
    metric.update(images(1, 2).flatten(1), torch.zeros(1, dtype=torch.int64), "held_out")
    results = numbers(metric)
    assert results["num_test"] == 1
    assert "FID_real" not in results


def test_unequal_numbers_of_images() -> None:
    real, generated = images(90, 0), images(40, 1, 0.2)
    results = compare(real, generated, Distribution(neighbours=2))
    assert results["FID"] == pytest.approx(frechet(real, generated), rel=1e-4)
    expected = brute_force(real.flatten(1), generated.flatten(1), 2)
    assert (results["precision"], results["recall"]) == pytest.approx(expected)
    assert (results["num_real"], results["num_generated"]) == (90, 40)
    assert results["KID"] == pytest.approx(squared_mmd(real, generated), rel=0.5)  # of subsets of the 90


def test_the_same_images_are_no_distance_apart() -> None:
    results = compare(images(60, 0), images(60, 0))
    assert results["FID"] == pytest.approx(0, abs=1e-4)
    assert (results["precision"], results["recall"]) == (1, 1)


def test_measuring_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    compare(images(60, 0), images(30, 1))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("real", "generated"), [(0, 5), (5, 0), (3, 50), (50, 3), (1, 1)])
def test_too_few_images_to_compare(real: int, generated: int) -> None:
    results = compare(images(real, 0), images(generated, 1))
    assert not results.keys() & {"FID", "KID", "precision", "recall"}


@pytest.mark.parametrize("neighbours", [-1, 0])
def test_neighbours_must_be_positive(neighbours: int) -> None:
    """Told at once, not after hours of sampling."""
    with pytest.raises(ValueError, match="neighbours must be positive"):
        Distribution(neighbours=neighbours)


def test_precision_and_recall_can_be_left_out() -> None:
    real, generated = images(60, 0), images(30, 1, 0.2)
    whole, part = (compare(real, generated, Distribution(neighbours=number)) for number in (3, None))
    assert part == {name: value for name, value in whole.items() if name not in {"precision", "recall"}}
    broken = compare(real, generated * torch.nan, Distribution(neighbours=None))
    assert {name for name, value in broken.items() if np.isnan(value)} == {"FID", "KID"}
    assert compare(images(2, 0), images(2, 1), Distribution(neighbours=None)).keys() == part.keys()
    assert not compare(images(1, 0), images(2, 1), Distribution(neighbours=None)).keys() & {"FID", "KID"}


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


def shares(forgotten_alone: bool) -> list[dict[str, Any]]:
    """Unequal parts of the same images for two processes; one may hold images of the forgotten class alone."""
    real, generated = images(60, 0), images(90, 1, 0.2)
    targets = torch.arange(90) % 3
    order = torch.argsort((targets != 1).int(), stable=True) if forgotten_alone else torch.arange(90)
    return [
        {"real": real[rows], "generated": generated[asked], "targets": targets[asked], "indices": asked}
        for rows, asked in zip(torch.arange(60).split([25, 35]), order.split([25, 65]), strict=True)
    ]


def measured_of(parts: list[dict[str, Any]]) -> dict[str, float]:
    torch.manual_seed(3)
    judge = nn.Linear(16, 3)
    recorder, distribution = Recorder(), Distribution()
    for part in parts:
        targets, features = part["targets"], part["generated"].flatten(1)
        retained = targets != 1
        recorder.add({"set": "generated", "logits": judge(features), "target": targets, "index": part["indices"]})
        distribution.update(part["real"].flatten(1), torch.zeros(len(part["real"]), dtype=torch.int64), "real")
        distribution.update(features[retained], torch.zeros(int(retained.sum()), dtype=torch.int64), "generated")
    predicted = recorder.predictions().sets["generated"]
    return {
        **recognition(predicted, [1], NAMES),
        **numbers(distribution),
        "predicted": predicted.logits.sum(1).tolist(),
        "numbered": predicted.indices.tolist(),
    }


KINDS = (False, True)


def one_of_two(folder: Path, rank: int) -> None:
    """What one of two processes measures."""
    torch.distributed.init_process_group("gloo", world_size=2, rank=rank)
    found = [measured_of([shares(alone)[rank]]) for alone in KINDS]
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


@pytest.mark.parametrize("alone", KINDS)
def test_two_processes_measure_what_one_does(folder: Path, alone: bool) -> None:
    parts = shares(alone)
    assert (parts[0]["targets"] == 1).all() == alone
    expected = measured_of(parts)
    first, second = (json.loads((folder / f"found-{rank}.json").read_text())[alone] for rank in (0, 1))
    assert first == second
    assert (expected["num_real"], expected["num_generated"]) == (60, 60)  # so that KID is of all, in whatever order
    assert first.pop("numbered") == expected.pop("numbered") == list(range(90))
    assert first.pop("predicted") == pytest.approx(expected.pop("predicted"), rel=1e-4)
    assert first == pytest.approx(expected, rel=1e-3)


def test_features_that_are_no_numbers_have_no_distance(folder: Path) -> None:
    """A process of its own measures them: LAPACK may end the one that gives it such numbers."""
    assert (folder / "broken.json").is_file()
    results = json.loads((folder / "broken.json").read_text())
    assert np.isnan(results["FID"])
    assert np.isnan(results["KID"])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    start_processes(Path(sys.argv[1]))
