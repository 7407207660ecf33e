"""Training steps of other projects write to weights and buffers: the saliency pass leaves no trace of it."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn import functional

from salun_lightning.saliency import SaliencyMask, SaliencyMasking, saliency_scores
from tests.saliency.helpers import Plain, copied, fit, half_mask, loader, quiet_trainer, same_bits, small_network


class MomentumTeacher(Plain):
    """Its teacher follows the network at the start of each step, as in BYOL, MoCo, DINO and mean teachers; a queue rolls."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = deepcopy(self.net)
        with torch.no_grad():
            for weight in self.teacher.parameters():
                weight.add_(0.1)
        self.register_buffer("queue", torch.randn(8, 3, generator=torch.Generator().manual_seed(1)))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))

    def follow(self) -> None:
        with torch.no_grad():
            for ours, theirs in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                ours.lerp_(theirs, 0.1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.follow()
        with torch.no_grad():
            wanted = self.teacher(batch[0])
        self.queue = torch.cat([self.queue[1:], wanted[:1]])
        self.pointer += 1
        return super().training_step(batch, batch_idx) + functional.mse_loss(self.net(batch[0]), wanted)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.net.parameters())


class TargetOfAnotherName(MomentumTeacher):
    """A target network that is copied every third step, with ``.data`` and without gradients, as in DQN."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher.requires_grad_(False)
        self.steps = 0

    def follow(self) -> None:
        self.steps += 1
        if self.steps % 3 == 0:
            for ours, theirs in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                ours.data = theirs.data.clone()


class Normalizes(Plain):
    """Writes to the weights it trains, as prototypes are normalised."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        head = self.net[7].weight
        head.data.copy_(functional.normalize(head.data, dim=1))
        return super().training_step(batch, batch_idx)


class Swaps(Plain):
    """Has another parameter and another layer in their places after the first step, and takes notes."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not hasattr(self, "notes"):
            self.notes = ["begun"]
        loss = super().training_step(batch, batch_idx)
        if self.trainer.state.fn is None:
            self.net[5].bias = nn.Parameter(self.net[5].bias.detach() + 1)
            self.net[6] = nn.Identity()
        return loss


class OfTheOptimizer(Plain):
    """Calls a method that its optimizer has beside ``step``."""

    class Shrinking(torch.optim.SGD):
        @torch.no_grad()
        def shrink(self) -> None:
            for group in self.param_groups:
                for weight in group["params"]:
                    weight.mul_(0.99)

    def __init__(self) -> None:
        super().__init__(lambda parameters: self.Shrinking(parameters, lr=0.05))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.optimizers(use_pl_optimizer=False).shrink()
        return super().training_step(batch, batch_idx)


class Random(Plain):
    """Draws, drops out, and keeps what it saw in lists."""

    def __init__(self) -> None:
        super().__init__(network=nn.Sequential(*small_network(), nn.Dropout(0.3)))
        self.outputs: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step((batch[0] + torch.randn_like(batch[0]), batch[1]), batch_idx)
        self.outputs.append(loss.detach())
        return loss * (1 + 0.01 * len(self.outputs))


FOREIGN: list[Callable[[], Plain]] = [MomentumTeacher, TargetOfAnotherName, Normalizes, Swaps, OfTheOptimizer, Random]


def everything(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in (*module.named_parameters(), *module.named_buffers())}


class Probe(Callback):
    """Takes scores when training starts, and compares all there is before and after."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        before, objects = everything(pl_module), dict(pl_module.named_parameters())
        fn, trainer.state.fn = trainer.state.fn, None
        self.scores = saliency_scores(pl_module, loader(), strategy=trainer.strategy)
        trainer.state.fn = fn
        after = everything(pl_module)
        assert after.keys() == before.keys()
        assert all(same_bits(value, before[name]) for name, value in after.items())
        assert all(weight is objects[name] for name, weight in pl_module.named_parameters())
        assert not hasattr(pl_module, "notes")
        self.compared = len(after)
        trainer.should_stop = True


@pytest.mark.parametrize("make", FOREIGN)
def test_after_the_pass_everything_has_the_bits_it_had(make):
    probe = Probe()
    fit(make(), probe)
    assert probe.compared >= 9
    assert sum(int(score.any()) for score in probe.scores.values()) >= 5


def test_each_batch_meets_the_same_weights():
    """The sum is of gradients at one point, however far a step would have moved them on the way."""

    class Halves(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.net[7].weight.data.mul_(0.5)
            return super().training_step(batch, batch_idx)

    halved = Plain()
    halved.net[7].weight.data.mul_(0.5)
    expected = saliency_scores(halved, loader())
    assert all(torch.equal(score, expected[name]) for name, score in saliency_scores(Halves(), loader()).items())


@pytest.mark.parametrize("make", [*FOREIGN, Plain])
def test_ratio_1_equals_no_callback_bit_for_bit(make):
    runs = []
    for callbacks in ((), (SaliencyMasking(1),)):
        torch.manual_seed(5)
        module = make()
        fit(module, *callbacks, data=loader(shuffle=True))
        runs.append(everything(module))
    without, masked = runs
    assert masked.keys() == without.keys()
    assert all(same_bits(value, without[name]) for name, value in masked.items())


def test_a_copy_of_the_weights_is_kept_for_a_training_step_only():
    copies = []

    class Watched(Plain):
        def __init__(self, *_: Any) -> None:
            super().__init__()
            self.automatic_optimization = True

    class WithLoss(Watched):
        def forget_loss(self, batch: Any) -> Tensor:
            return functional.cross_entropy(self.net(batch[0]), batch[1])

    clone = Tensor.clone
    for kind in (WithLoss, Watched):
        module = kind()
        own = {weight.data_ptr() for weight in module.parameters()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                Tensor, "clone", lambda t, *a, own=own, **k: (copies.append(t.data_ptr() in own), clone(t, *a, **k))[1]
            )
            saliency_scores(module, loader())
        copies.append(None)
    with_loss, with_step = copies[: copies.index(None)], copies[copies.index(None) + 1 : -1]
    assert sum(with_loss) == 0
    assert sum(with_step) == len(list(module.parameters()))


def test_weights_that_no_optimizer_holds_do_not_count_and_are_left_alone(caplog):
    module, masking = MomentumTeacher(), SaliencyMasking(0.5)
    teacher = everything(module.teacher)
    with caplog.at_level("INFO"):
        fit(module, masking)
    assert masking.mask.num_weights == 300
    assert masking.mask.num_kept == 150
    assert masking.report["num_without_optimizer"] == 300
    assert masking.report["drift"] == 0
    assert not any(name.startswith("teacher") for name in masking.mask)
    assert not same_bits(module.teacher[7].weight, teacher["7.weight"])
    assert "not counted are 300 weights that no optimizer holds and 0 that the mask does not cover" in caplog.text


@pytest.mark.parametrize("uncovered", ["frozen", "free"])
def test_a_mask_over_one_block(uncovered):
    module = Plain()
    original = copied(module)
    whole = half_mask(module)
    part = SaliencyMask({name: whole[name] for name in ("net.5.weight", "net.5.bias")})
    masking = SaliencyMasking(mask=part, uncovered=uncovered)
    fit(module, masking)
    assert masking.report["num_weights"] == part.num_weights == 195
    assert masking.report["num_uncovered"] == 300 - 195
    assert masking.report["drift"] == 0
    for name, weight in copied(module).items():
        if name in part:
            assert same_bits(weight[~part[name]], original[name][~part[name]])
            assert not same_bits(weight, original[name])
        else:
            assert same_bits(weight, original[name]) == (uncovered == "frozen")


class LowRank(nn.Module):
    """A frozen layer, and beside it the product of two matrices, of which one is zero to begin with (Hu et al., ICLR 2022)."""

    def __init__(self, zero: bool = True) -> None:
        super().__init__()
        self.base = nn.Linear(32, 3).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(32, 2, bias=False), nn.Linear(2, 3, bias=False)
        if zero:
            nn.init.zeros_(self.lora_B.weight)

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        return self.base(flat) + self.lora_B(self.lora_A(flat))


def test_a_fresh_low_rank_pair_gets_a_warning():
    with pytest.warns(
        UserWarning, match=r"No gradient .* reaches 1 of 2 weight tensors, such as net\.lora_A.* fresh LoRA pair"
    ):
        fit(Plain(network=LowRank()), SaliencyMasking(0.5))
    masking = SaliencyMasking(0.5)
    fit(Plain(network=LowRank(zero=False)), masking)
    assert masking.mask.num_weights == 70
    assert masking.mask.num_kept == 35


def test_a_mask_whose_names_have_another_prefix_fits():
    module = Plain()
    mask = half_mask(module)
    for prefix in ("", "encoder.backbone.", "net.net."):
        renamed = SaliencyMask({prefix + name.removeprefix("net."): mask[name] for name in mask})
        masking = SaliencyMasking(mask=renamed)
        quiet_trainer(masking, max_epochs=1).fit(Plain(), loader())
        assert masking.mask == mask


def test_a_mask_whose_prefix_is_not_unique_is_refused():
    class Two(MomentumTeacher):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.make_optimizer(self.parameters())

    mask = half_mask(Plain().net)
    with pytest.raises(ValueError, match=r"'0\.weight' fit several parts of the network: net\.0\.weight, teacher\.0\.weight"):
        fit(Two(), SaliencyMasking(mask=mask))
