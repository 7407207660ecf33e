"""NegMerge against candidates that torch's own SGD trains one by one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from salun_lightning.methods.neg_merge import NegMerge
from salun_lightning.modules import ImageClassifier
from salun_lightning.saliency import SaliencyMask, SaliencyMasking, saliency_scores
from tests.methods.test_one_shot import network, plain_step
from tests.modules.small_diffusion import diffusion, images
from tests.modules.small_runs import same, trainer, weights
from tests.small import small_datamodule


def edited(folder: Path, method: NegMerge, mask: SaliencyMask | None = None, **settings: Any) -> nn.Module:
    """The network after its step, with the forget set of 12 in one batch."""
    module = ImageClassifier(network(), method=method, optimizer=plain_step)
    callbacks = [] if mask is None else [SaliencyMasking(mask=mask)]
    runner = trainer(folder, max_steps=1, callbacks=callbacks, **settings)
    runner.fit(module, datamodule=small_datamodule(batch_size=12))
    return module.network


def flat(module: nn.Module) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in module.parameters()])


def candidate(lr: float, epochs: int) -> Tensor:
    """What training on the forget set adds to each weight; statistics of BatchNorm are those of the original."""
    trained, data = network().eval(), small_datamodule()
    train: Any = data.load().train
    inputs, targets = train[data.forget_indices]
    optimizer = torch.optim.SGD(trained.parameters(), lr=lr, momentum=0.9)
    for _ in range(epochs):
        optimizer.zero_grad()
        functional.cross_entropy(trained(inputs / 255), targets).backward()
        optimizer.step()
    return flat(trained) - flat(network())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("epochs", [[3, 9], [9, 3, 3]])
def test_the_edit_is_minus_what_all_candidates_agree_on(tmp_path: Path, epochs: list[int], masked: bool) -> None:
    candidates = torch.stack([candidate(lr, count) for lr in (0.1, 0.3) for count in (3, 9)])
    agree = (candidates > 0).all(0) | (candidates < 0).all(0)
    assert 5 < agree.sum() < len(agree) - 5
    expected = -2.0 * torch.where(agree, candidates.mean(0), 0)
    mask = SaliencyMask.from_scores(saliency_scores(network(), [], "random", seed=1), 0.5) if masked else None
    if mask is not None:
        expected = expected * torch.cat([mask[name].flatten() for name, _ in network().named_parameters()])
    after = edited(tmp_path, NegMerge(2.0, [0.1, 0.3], epochs), mask)
    torch.testing.assert_close(flat(after) - flat(network()), expected, rtol=1e-3, atol=1e-5)
    buffers = dict(network().named_buffers())
    assert same({name: buffer.clone() for name, buffer in after.named_buffers()}, buffers)


def test_one_candidate_is_negated_whole_and_the_forget_loss_rises(tmp_path: Path) -> None:
    after, data = edited(tmp_path, NegMerge(1.0, [0.1], [5])), small_datamodule()
    torch.testing.assert_close(flat(after) - flat(network()), -candidate(0.1, 5), rtol=1e-3, atol=1e-5)
    train: Any = data.load().train
    inputs, targets = train[data.forget_indices]
    now, before = (functional.cross_entropy(net.eval()(inputs / 255), targets).item() for net in (after, network()))
    assert now > before


def test_candidates_of_bf16_weights_are_trained_in_single_precision(tmp_path: Path) -> None:
    """Steps that bf16 would round away add up."""
    after = flat(edited(tmp_path, NegMerge(1.0, [1e-3], [20]), precision="bf16-true"))
    expected = -candidate(1e-3, 20)
    moved = after.float() - flat(network().bfloat16()).float()
    large = expected.abs() > 0.02 * flat(network()).abs()
    assert large.sum() > 3
    torch.testing.assert_close(moved[large], expected[large], rtol=0.3, atol=1e-4)


@pytest.mark.parametrize("batch_size", [4, 5])
def test_on_a_diffusion_model_it_repeats(tmp_path: Path, batch_size: int) -> None:
    def run() -> dict[str, Tensor]:
        module = diffusion(method=NegMerge(1.0, [0.1], [2]), optimizer=plain_step)
        before = weights(module.network)
        trainer(tmp_path, max_steps=1).fit(module, datamodule=images(count=9, batch_size=batch_size))
        assert not same(weights(module.network), before)
        return weights(module.network)

    first = run()
    torch.rand(3)
    assert same(run(), first)


def test_a_candidate_that_diverges_is_named_and_the_weights_stay(tmp_path: Path) -> None:
    module = ImageClassifier(network(), method=NegMerge(1.0, [0.1, 1e30], [2]), optimizer=plain_step)
    with pytest.raises(ValueError, match=r"^The candidate that is trained with lr 1e\+30 diverged\. Give smaller lrs"):
        trainer(tmp_path, max_steps=1).fit(module, datamodule=small_datamodule())
    assert same(weights(module.network), weights(network()))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"strength": -1.0}, "strength"),
        ({"strength": float("nan")}, "strength"),
        ({"lrs": []}, "lrs"),
        ({"lrs": [0.1, 0.0]}, "lrs"),
        ({"lrs": [float("nan")]}, "lrs"),
        ({"epochs": []}, "epochs"),
        ({"epochs": [5, 0]}, "epochs"),
    ],
)
def test_numbers_out_of_range(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=rf"^{named} must be .*\. Give some|^{named} must be .*\. Give one"):
        NegMerge(**settings)
