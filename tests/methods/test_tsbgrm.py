"""The two stages of TS-BGRM against plain torch, and what it leaves alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from salun_lightning.methods import TSBGRM
from salun_lightning.saliency import SaliencyMask, saliency_scores
from tests.methods.whole_class import CLASSES, FORGOTTEN, NOT_WHOLE, data, images, network, trained
from tests.modules.small_runs import same, weights

RUN: dict[str, Any] = {"max_steps": -1, "optimizer": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1)}


def reference(scale: float, forget_epochs: int, repair_epochs: int, keep: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Full-batch training of the head on fixed features, by hand."""
    original = network().eval()
    head, (pixels, targets) = original[6], (images().images.float() / 255, images().targets)
    with torch.no_grad():
        features = original[:6](pixels)
    start = {"6.weight": head.weight.detach().clone(), "6.bias": head.bias.detach().clone()}
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.05, weight_decay=0.1)
    forgotten = targets == FORGOTTEN
    for epoch in range(forget_epochs + repair_epochs):
        optimizer.zero_grad()
        forgets = epoch < forget_epochs
        rows = forgotten if forgets else ~forgotten
        loss = functional.cross_entropy(head(features[rows]), targets[rows])
        (-loss if forgets else loss).backward()
        if forgets:
            head.bias.grad[[c for c in range(CLASSES) if c != FORGOTTEN]] *= scale
        for name, weight in (("6.weight", head.weight), ("6.bias", head.bias)):
            if keep is not None:
                weight.grad *= keep[name]
        optimizer.step()
        for name, weight in (("6.weight", head.weight), ("6.bias", head.bias)):
            if keep is not None:
                weight.data = torch.where(keep[name], weight.data, start[name])
    return {"6.weight": head.weight.detach(), "6.bias": head.bias.detach()}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("scale", "repair"), [(-1.0, 1), (0.5, 2), (1.0, 0)])
def test_both_stages_are_those_of_the_reference(scale: float, repair: int, masked: bool, tmp_path: Path) -> None:
    before = weights(network())
    mask = SaliencyMask.from_scores(saliency_scores(network(), [], "random", seed=1), 0.5) if masked else None
    module = trained(tmp_path, TSBGRM(scale, repair), mask, max_epochs=4, data=data(batch_size=100), **RUN)
    after = weights(module.network)
    keep = None if mask is None else {name: mask[name] for name in ("6.weight", "6.bias")}
    for name, expected in reference(scale, 4 - repair, repair, keep).items():
        torch.testing.assert_close(after.pop(name), expected)
        assert not torch.equal(expected, before.pop(name))
    assert same(before, after)  # BatchNorm's statistics, too
    assert all(child.training for child in module.network.modules())


@pytest.mark.parametrize(
    ("run", "stages"),
    [
        ({"max_epochs": 3}, [0, 0, 1]),
        ({"max_epochs": -1, "max_steps": 9}, [0, 0, 1]),  # of four batches
        ({"max_epochs": 1}, [0]),
    ],
)
def test_which_epochs_repair(run: dict[str, int], stages: list[int], tmp_path: Path) -> None:
    found: dict[int, set[bool]] = {}

    class Watched(TSBGRM):
        def loss(self, module: Any, batch: Any) -> Tensor | None:
            found.setdefault(module.current_epoch, set()).add(self.repairs(module))
            return super().loss(module, batch)

    trained(tmp_path, Watched(), **{**RUN, **run})
    assert [found[epoch] for epoch in range(len(stages))] == [{bool(stage)} for stage in stages]
    assert len(found) == len(stages)


def test_accumulated_gradients_are_scaled_once(tmp_path: Path) -> None:
    """Twelve images to forget in three batches of four, which make one step, are one batch of twelve."""
    runs = [
        trained(tmp_path, TSBGRM(-0.5, 0), max_epochs=1, limit_train_batches=count, data=data(batch_size=size), **more, **RUN)
        for count, size, more in ((3, 4, {"accumulate_grad_batches": 3}), (1, 12, {}))
    ]
    torch.testing.assert_close(*(weights(run.network) for run in runs))


def test_a_mask_of_ratio_0_keeps_all_bits(tmp_path: Path) -> None:
    assert same(weights(network()), weights(trained(tmp_path, TSBGRM(), 0.0, max_epochs=2, **RUN).network))


def test_a_request_of_single_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^TSBGRM makes a model forget whole classes, but this request leaves .* Ask for"):
        trained(tmp_path, TSBGRM(), data=data(NOT_WHOLE), max_epochs=2, **RUN)


@pytest.mark.parametrize("wrong", [{"bias_scale": float("nan")}, {"repair_epochs": -1}])
def test_numbers_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^bias_scale must be finite and repair_epochs not negative, got .* Give numbers"):
        TSBGRM(**wrong)
