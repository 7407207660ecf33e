"""LoTUS against a plain loop, its temperature and its end."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from scipy.stats import kstest
from torch import Tensor, nn

from salun_lightning.data import ForgetClasses, Samples
from salun_lightning.methods import LoTUS
from salun_lightning.modules import ImageClassifier
from tests.methods.plain_runs import check_same, frozen_run_moves_nothing, half_a_mask, network, run, run_by_hand, settings
from tests.modules.small_runs import same, trainer, weights
from tests.small import small_datamodule


def images(positions: Tensor) -> Tensor:
    return positions.float()[:, None, None, None].expand(-1, 1, 4, 4) / 255


def accuracy(asked: nn.Module, positions: Tensor) -> float:
    state, training = weights(asked), asked.training
    answers = asked.eval()(images(positions)).argmax(1)
    asked.train(training)
    assert same(weights(asked), state)
    return float((answers == positions % 3).double().mean())


@pytest.mark.parametrize("masked", [False, True])
def test_lotus_is_that_of_the_plain_loop(tmp_path: Path, masked: bool) -> None:
    method, data = LoTUS(alpha=3.0, seed=5), small_datamodule(val_fraction=0.2)
    temperatures: dict[int, float] = {}

    def by_hand(student: nn.Module, original: nn.Module, batch: Mapping[str, Samples], epoch: int) -> Tensor:
        if epoch not in temperatures:
            unseen = accuracy(original, data._sets["val"][2])
            temperatures[epoch] = math.exp(3.0 * (accuracy(student, data.forget_indices) - unseen))
        answers = student(torch.cat([samples.inputs for samples in batch.values()])).log_softmax(1)
        total, count = torch.zeros(()), 0
        for name, samples in batch.items():
            noise = method.noise(samples.indices, 3, epoch)
            for image, gumbel in zip(samples.inputs, noise, strict=True):
                with torch.no_grad():
                    noisy = original(image[None])[0] + gumbel
                wanted = (noisy / (temperatures[epoch] if name == "forget" else 1e-6)).softmax(0)
                total, count = total - wanted @ answers[count], count + 1
        return total / count

    mask = half_a_mask() if masked else None
    module, batches = run(tmp_path, method, mask, max_epochs=3)
    check_same(module, run_by_hand(by_hand, batches, mask), mask)
    assert len({epoch for _, epoch in batches.seen}) == len(temperatures)
    assert any(temperature != 1 for temperature in temperatures.values())


def test_noise_is_that_of_gumbel_and_belongs_to_the_sample() -> None:
    method, numbers = LoTUS(seed=3), torch.arange(5_000)
    noise = method.noise(numbers, 10, 0)
    assert noise.dtype == torch.float32
    assert torch.isfinite(method.noise(torch.arange(100_000), 10, 1)).all()
    assert kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 1e-6
    shares = (noise + torch.tensor([0.5, 0.3, 0.2] + [0.0] * 7).log()).argmax(1).bincount(minlength=10) / len(numbers)
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2] + [0.0] * 7), rtol=0, atol=0.03)
    assert torch.equal(method.noise(numbers[[7, 3]], 10, 0), noise[[7, 3]])
    for other in (method.noise(numbers, 10, 1), LoTUS(seed=4).noise(numbers, 10, 0)):
        assert abs(float(torch.corrcoef(torch.stack([other.flatten(), noise.flatten()]))[0, 1])) < 0.03


def fitted(
    folder: Path, method: LoTUS, epochs: int = 5, ckpt_path: Path | None = None, **data: Any
) -> tuple[Any, ImageClassifier]:
    module = ImageClassifier(network(), method=method, optimizer=settings)
    runner = trainer(folder, max_epochs=epochs)
    runner.fit(module, datamodule=small_datamodule(**data), ckpt_path=ckpt_path)
    return runner, module


@pytest.mark.parametrize(("unseen", "epochs"), [(0.0, 3), (1.0, 1)])
def test_it_ends_when_enough_is_forgotten(tmp_path: Path, unseen: float, epochs: int) -> None:
    """An accuracy of 0 cannot be fallen short of; below 1 any is, after one epoch."""
    runner, module = fitted(tmp_path, LoTUS(unseen_accuracy=unseen), epochs=3)
    assert runner.current_epoch == epochs
    runner.save_checkpoint(tmp_path / "over.ckpt")
    if epochs == 1:  # to resume it trains no more
        _, resumed = fitted(tmp_path, LoTUS(unseen_accuracy=unseen), epochs=3, ckpt_path=tmp_path / "over.ckpt")
        assert same(weights(resumed.network), weights(module.network))


def test_a_whole_class_is_forgotten_down_to_zero(tmp_path: Path) -> None:
    asked: list[float] = []

    class Watched(LoTUS):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            asked.append(self._target)

    fitted(tmp_path, Watched(), forget=ForgetClasses([1]), epochs=1)
    fitted(tmp_path, Watched(unseen_accuracy=0.25), forget=ForgetClasses([1]), epochs=1)
    assert asked == [0.0, 0.25]


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    """The temperature follows from the weights, so it is not saved."""
    options = {"unseen_accuracy": 0.0}
    runner, _ = fitted(tmp_path, LoTUS(**options), epochs=2)
    runner.save_checkpoint(tmp_path / "half.ckpt")
    _, whole = fitted(tmp_path, LoTUS(**options), epochs=4)
    _, resumed = fitted(tmp_path, LoTUS(**options), epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert same(weights(resumed.network), weights(whole.network))


def test_no_validation_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"there is no validation set\. Give the datamodule a val_fraction, or"):
        fitted(tmp_path, LoTUS())


def test_a_mask_of_nothing(tmp_path: Path) -> None:
    frozen_run_moves_nothing(tmp_path, LoTUS())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alpha", -1.0),
        ("alpha", float("nan")),
        ("alpha", float("inf")),
        ("unseen_accuracy", 1.5),
        ("unseen_accuracy", float("nan")),
    ],
)
def test_numbers_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must .*, got .*\. (Give one such as 2|Leave it out to measure it)\."):
        LoTUS(**{name: value})
