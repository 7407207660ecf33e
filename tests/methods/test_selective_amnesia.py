"""Selective Amnesia: its Fisher information, its replay and its loss against a few lines of torch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from salun_lightning.data import ForgetClasses, Samples
from salun_lightning.methods import SelectiveAmnesia
from salun_lightning.modules.sampling import Sampling
from tests.modules.small_diffusion import CLASSES, STEPS, diffusion, images, saved, unet
from tests.modules.small_runs import same, trainer, weights

IMAGES, TIMESTEPS = 3, 2


class Watched(SelectiveAmnesia):
    """Keeps what it knew at the start of training, and the weights there."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        super().on_train_start(trainer, module)
        self.at_start = weights(module.network)
        self.original = weights(module.reference)
        self.fisher = {
            name: tied[2].clone() for (name, _), tied in zip(module.network.named_parameters(), self._tied, strict=True)
        }
        self.tied_to = {
            name: tied[1].clone() for (name, _), tied in zip(module.network.named_parameters(), self._tied, strict=True)
        }
        self.replay = Samples(*(field.clone() for field in self._replay))
        self.mode = module.network.training


def watched(**kwargs: Any) -> Watched:
    return Watched(**{"images": IMAGES, "timesteps": TIMESTEPS, **kwargs})


def started(folder: Path, method: Watched, network: Any = None, **kwargs: Any) -> Watched:
    """After training that does nothing but start."""
    module = diffusion(network, method=method, **kwargs)
    trainer(folder, max_epochs=1, limit_train_batches=1).fit(module, datamodule=images())
    return method


def drawn(network: Any = None, guidance: float = 1.0) -> Tensor:
    """Images of all classes, by the original model."""
    numbers = torch.arange(CLASSES * IMAGES)
    module = diffusion(network, sampling=Sampling(steps=5, guidance=guidance)).eval()
    return module.sample(numbers // IMAGES, numbers)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_fisher_information_is_that_of_the_reference(tmp_path: Path, guidance: float) -> None:
    """The square of the gradient of one image's loss over its noise levels, averaged over images of all classes."""
    method = started(tmp_path, watched(), sampling=Sampling(steps=5, guidance=guidance), label_dropout=0.5)
    network, alphas = unet().eval(), (1 - torch.linspace(1e-4, 0.02, STEPS)).cumprod(0)
    expected = {name: torch.zeros_like(weight) for name, weight in network.named_parameters()}
    for number, image in enumerate(drawn(guidance=guidance)):
        network.zero_grad()
        for repeat in range(TIMESTEPS):
            generator = torch.Generator().manual_seed(number * TIMESTEPS + repeat)
            timestep = torch.randint(STEPS, (1,), generator=generator)
            noise = torch.randn(1, 4, 4, generator=generator)
            noisy = alphas[timestep].sqrt() * (2 * image - 1) + (1 - alphas[timestep]).sqrt() * noise
            prediction = network(noisy.unsqueeze(0), timestep, class_labels=torch.tensor([number // IMAGES])).sample
            ((prediction - noise).square().mean() / TIMESTEPS).backward()
        for name, weight in network.named_parameters():
            expected[name] += weight.grad.square() / (CLASSES * IMAGES)
    assert method.fisher.keys() == expected.keys()
    torch.testing.assert_close(method.fisher, expected, rtol=1e-3, atol=1e-7)
    assert any(value.any() for value in expected.values())


def test_replay_is_what_the_original_draws_of_the_retained_classes(tmp_path: Path) -> None:
    original = unet(seed=9)
    path = saved(diffusion(original), tmp_path)
    method = started(tmp_path, watched(), original=path)
    assert method.replay.targets.tolist() == [1] * IMAGES + [2] * IMAGES
    torch.testing.assert_close(method.replay.inputs, drawn(original)[IMAGES:])
    assert method.mode  # measuring leaves the network in training


def loss_by_hand(method: Watched, module: Any, batch: Samples, fisher_weight: float, replay_weight: float) -> Tensor:
    loss = module.unlearned_loss(Samples(torch.rand_like(batch.inputs), batch.targets, batch.indices))
    if replay_weight:
        rows = torch.randint(len(method.replay.targets), (len(batch.targets),))
        loss = loss + replay_weight * module.task_loss(Samples(*(field[rows] for field in method.replay)))
    for name, weight in module.network.named_parameters():
        loss = loss + fisher_weight * (method.fisher[name] * (weight - method.tied_to[name]) ** 2).sum()
    return loss


@pytest.mark.parametrize(("fisher_weight", "replay_weight"), [(1e4, 1.0), (50.0, 0.0), (0.0, 0.5)])
def test_loss_and_gradient_are_those_of_the_reference(tmp_path: Path, fisher_weight: float, replay_weight: float) -> None:
    method, compared = watched(fisher_weight=fisher_weight, replay_weight=replay_weight), []
    module = diffusion(method=method, label_dropout=0.1)
    keep = method.loss

    def loss(trained: Any, batch: dict[str, Samples]) -> Tensor:
        state = torch.get_rng_state()
        expected = loss_by_hand(method, trained, batch["forget"], fisher_weight, replay_weight)
        torch.set_rng_state(state)
        found = keep(trained, batch)
        parameters = list(trained.network.parameters())
        gradients = [torch.autograd.grad(value, parameters, retain_graph=True) for value in (found, expected)]
        compared.append((found.detach(), expected.detach(), *gradients))
        return found

    method.loss = loss  # type: ignore[method-assign]
    trainer(tmp_path, max_epochs=2).fit(module, datamodule=images())
    assert len(compared) == 4
    for found, expected, gradient, expected_gradient in compared:
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


def penalty(method: SelectiveAmnesia) -> float:
    return sum(float((importance * (weight.detach() - original) ** 2).sum()) for weight, original, importance in method._tied)


def test_the_penalty_is_zero_at_the_start_and_grows(tmp_path: Path) -> None:
    method, seen = watched(fisher_weight=0.0), []
    module = diffusion(method=method)
    module.on_train_batch_start = lambda *_: seen.append(penalty(method))  # type: ignore[method-assign]
    trainer(tmp_path, max_epochs=2).fit(module, datamodule=images())
    assert seen[0] == 0
    assert 0 < seen[1] < seen[3]


def test_what_is_tied_is_all_that_is_trained(tmp_path: Path) -> None:
    network = unet()
    network.conv_in.requires_grad_(False)
    module = diffusion(network, method=SelectiveAmnesia(images=1, timesteps=1))
    before = weights(network.conv_in)
    trainer(tmp_path, max_epochs=1).fit(module, datamodule=images())
    tied = {id(weight) for weight, *_ in module.method._tied}
    assert tied == {id(weight) for weight in network.parameters() if weight.requires_grad}
    assert same(weights(network.conv_in), before)


def test_a_resumed_run_starts_from_the_same_and_ends_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "4")
    path = saved(diffusion(unet(seed=9)), tmp_path)

    def run(epochs: int, resume: Path | None = None) -> tuple[Watched, dict[str, Tensor]]:
        method = watched(fisher_weight=100.0)
        module = diffusion(unet(seed=1), method=method, original=path, label_dropout=0.2)
        torch.rand(3 if resume else 0)
        runner = trainer(tmp_path, max_epochs=epochs)
        runner.fit(module, datamodule=images(), ckpt_path=resume, weights_only=True if resume else None)
        runner.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return method, weights(module)

    run(1)
    whole, final = run(3)
    resumed, resumed_final = run(3, resume=tmp_path / "1.ckpt")
    assert not same(resumed.at_start, resumed.original)  # it was resumed
    assert same(resumed.original, whole.original)
    assert same(resumed.tied_to, whole.tied_to)
    assert all(torch.equal(*fields) for fields in zip(resumed.replay, whole.replay, strict=True))
    assert same(resumed.fisher, whole.fisher), "the Fisher information is not that of the original model"
    assert same(resumed_final, final)


@pytest.mark.parametrize("settings", [{"fisher_weight": -1.0}, {"replay_weight": -0.5}])
def test_weights_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^The weights must not be negative"):
        SelectiveAmnesia(**settings)


@pytest.mark.parametrize("settings", [{"images": 0}, {"timesteps": 0}])
def test_numbers_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^images and timesteps must be positive"):
        SelectiveAmnesia(**settings)


def test_no_class_is_retained(tmp_path: Path) -> None:
    """Then there is nothing to replay, which is all the same without replay."""
    request = ForgetClasses([0, 1])
    module = diffusion(method=SelectiveAmnesia(images=1, timesteps=1))
    trainer(tmp_path, max_epochs=1).fit(module, datamodule=images(forget=request))
    assert module.method._replay.targets.tolist() == [2]


def test_the_images_of_the_forget_set_are_not_looked_at(tmp_path: Path) -> None:
    final = []
    for level in (0, 255):
        data = images()
        data.given.train.images[:] = level
        module = diffusion(method=SelectiveAmnesia(images=1, timesteps=1))
        trainer(tmp_path, max_epochs=1).fit(module, datamodule=data)
        final.append(weights(module))
    assert same(*final)


def test_a_part_that_the_order_does_not_bring(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"SelectiveAmnesia needs the part 'forget' in each batch.*order 'forget'"):
        trainer(tmp_path, max_epochs=1).fit(
            diffusion(method=SelectiveAmnesia(images=1, timesteps=1)), datamodule=images(order="retain")
        )
