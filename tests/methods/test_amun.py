"""AMUN: its adversarial images, and its training against a few lines of torch."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from salun_lightning.data import Samples
from salun_lightning.methods.amun import AMUN
from salun_lightning.saliency import SaliencyMask
from tests.methods.whole_batches import assert_same_weights, data, descended, entropy, fitted, half, network, part_of, resumed
from tests.modules.small_runs import same, weights


class Watched(AMUN):
    """Keeps what was found."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self.kept = self._found


# of two classes: an image of mean m lies 4 |m - 0.5| from the border, as it has 16 pixels
def brightness(images: Tensor) -> Tensor:
    mean = images.flatten(1).mean(1)
    return torch.stack([0.5 - mean, mean - 0.5], dim=1) * 50


def test_an_image_is_found_in_the_first_ball_that_reaches_across_the_border() -> None:
    means = torch.tensor([0.45, 0.3, 0.6, 0.05, 0.45])  # 0.2, 0.8, 0.4, 1.8 from the border; the last is wrong already
    images, targets = means.view(5, 1, 1, 1).expand(5, 1, 4, 4).contiguous(), torch.tensor([0, 0, 1, 0, 1])
    moved, classes = AMUN(radius=0.25, doublings=2).adversarial(brightness, images, targets)
    assert classes.tolist() == [1, 1, 0, 0, 0]  # the fourth would need a radius of 2
    distances = (moved - images).flatten(1).norm(dim=1)
    torch.testing.assert_close(distances, torch.tensor([0.25, 1.0, 0.5, 0.0, 0.25]))
    assert torch.equal(moved[3], images[3])
    moved, classes = AMUN(radius=0.25, doublings=3).adversarial(brightness, images, targets)
    assert classes.tolist() == [1, 1, 0, 1, 0]


@pytest.mark.parametrize("mask", [None, half()], ids=["whole", "masked"])
def test_it_trains_on_both_sets_and_the_adversarial_images(tmp_path: Path, mask: SaliencyMask | None) -> None:
    method = Watched(radius=0.1, doublings=1)
    module = fitted(tmp_path, method, mask)
    images, targets, indices = method.kept
    (forget, true), (retain, retained) = part_of("forget"), part_of("retain")
    assert indices.tolist() == data().forget_indices.tolist()
    answers = network()(images).argmax(1)
    assert torch.equal(answers, targets)  # also where none was found, if the answer was right
    found = targets != true
    assert 0 < found.sum() < 12, "some are found and some are not"
    assert torch.equal(images[~found], forget[~found])
    everything = torch.cat([forget, retain, images[found]]), torch.cat([true, retained, targets[found]])
    expected = descended(lambda net, _: entropy(net, everything), mask)
    assert_same_weights(module.network, expected, moved=80)


def test_the_loss_is_the_mean_over_the_samples_of_all_processes() -> None:
    class Strategy:
        def reduce(self, count: Tensor, reduce_op: str) -> Tensor:
            assert reduce_op == "mean"
            return (count + 4) / 2  # the other process has four samples

    module: Any = SimpleNamespace(trainer=SimpleNamespace(strategy=Strategy()), losses=lambda samples: samples.inputs)
    method = AMUN()
    method._found = Samples(torch.tensor([10.0, 20.0, 30.0]), torch.tensor([1, 2, 0]), torch.tensor([3, 5, 8]))
    forget = Samples(torch.tensor([1.0, 2.0]), torch.tensor([0, 2]), torch.tensor([8, 3]))  # the first has none
    retain = Samples(torch.tensor([5.0]), torch.tensor([1]), torch.tensor([1]))
    loss = method.loss(module, {"forget": forget, "retain": retain})
    assert loss == torch.tensor(1.0 + 2.0 + 5.0 + 10.0) / 4
    assert method.loss(module, {"retain": retain}) == 5 / 2.5


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole, again = resumed(tmp_path, AMUN(doublings=3))
    assert same(whole, again)


def test_nothing_moves_outside_a_mask_of_nothing(tmp_path: Path) -> None:
    nothing = SaliencyMask({name: torch.zeros_like(weight).bool() for name, weight in network().named_parameters()})
    assert same(weights(fitted(tmp_path, AMUN(doublings=1), nothing).network), weights(network()))


@pytest.mark.parametrize(
    "settings",
    [{"radius": 0.0}, {"radius": float("nan")}, {"radius": float("inf")}, {"doublings": -1}, {"steps": 0}],
)
def test_numbers_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^radius and steps must be positive and finite, .*\. Give such as"):
        AMUN(**settings)


def test_a_network_that_never_changes_its_answer_has_no_adversarial_images() -> None:
    constant = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).requires_grad_(False)
    constant[1].weight.zero_()
    images, targets = torch.rand(3, 1, 4, 4), constant(torch.zeros(3, 1, 4, 4)).argmax(1)
    moved, classes = AMUN(doublings=1).adversarial(constant, images, targets)
    assert torch.equal(moved, images)
    assert torch.equal(classes, targets)
