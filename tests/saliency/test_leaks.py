"""Frozen means frozen, whatever writes: nobody ever sees a weight outside the mask that differs from the original."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from salun_lightning.saliency import SaliencyMask, SaliencyMasking
from salun_lightning.saliency.held import Held
from salun_lightning.weights import weights_of
from tests.saliency.helpers import Plain, PlainManual, assert_frozen, copied, fit, half_mask, loader, quiet_trainer, same_bits

LEAK = "ignore:Something other than an optimizer wrote to weights outside the saliency mask:UserWarning"


class ScheduleFree(torch.optim.Optimizer):
    """SGD that trains on one sequence of weights and is evaluated on another (Defazio et al., 2024), with weight decay."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float = 0.1, beta: float = 0.9, decay: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr, "beta": beta, "decay": decay})
        self.steps, self.training = 0, True

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        self.steps += 1
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                fast, average = (state.setdefault(name, weight.clone()) for name in ("fast", "average"))
                fast.sub_(group["lr"] * (weight.grad + group["decay"] * weight))
                average.lerp_(fast, 1 / self.steps)
                weight.copy_(average.lerp(fast, 1 - group["beta"]))
        return loss

    @torch.no_grad()
    def _switch(self, training: bool) -> None:
        if training != self.training:
            self.training = training
            for group in self.param_groups:
                for weight in group["params"]:
                    if self.state[weight]:
                        state = self.state[weight]
                        weight.copy_(state["average"].lerp(state["fast"], 0.1) if training else state["average"])

    def train(self) -> None:
        self._switch(training=True)

    def eval(self) -> None:
        self._switch(training=False)


class Evaluated(Plain):
    """Looks at its frozen weights in every validation."""

    def __init__(self, make_optimizer: Any) -> None:
        super().__init__(make_optimizer)
        self.seen: list[dict[str, Tensor]] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append({name: weight.detach().clone() for name, weight in weights_of(self).items()})


class SwitchesForValidation(Evaluated):
    def on_validation_epoch_start(self) -> None:
        self.optimizers().eval()

    def on_validation_epoch_end(self) -> None:
        self.optimizers().train()


class SwitchesAfterEpochs(Evaluated):
    def on_train_epoch_start(self) -> None:
        self.optimizers().train()

    def on_train_epoch_end(self) -> None:
        self.optimizers().eval()


class SwitchesForCheckpoints(Evaluated):
    def on_train_epoch_start(self) -> None:
        self.optimizers().train()

    def on_save_checkpoint(self, checkpoint: Any) -> None:
        self.optimizers().eval()


@pytest.mark.filterwarnings(LEAK)
@pytest.mark.parametrize("kind", [SwitchesForValidation, SwitchesAfterEpochs, SwitchesForCheckpoints])
def test_an_optimizer_that_writes_when_it_is_switched(kind, tmp_path):
    module = kind(ScheduleFree)
    original, mask = copied(module), half_mask(module)
    masking = SaliencyMasking(mask=mask)
    every = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, every_n_epochs=1)
    trainer = quiet_trainer(masking, every, enable_checkpointing=True, max_epochs=3, num_sanity_val_steps=0)
    trainer.fit(module, loader(), loader())
    assert_frozen(original, copied(module), mask)
    for weights in module.seen:
        assert_frozen(original, weights, mask)
    paths = list(tmp_path.glob("*.ckpt"))
    assert len(paths) == 3
    for path in paths:
        assert_frozen(original, torch.load(path, weights_only=True)["state_dict"], mask)
    assert 1e-5 < masking.report["drift"] < 1  # what the switch wrote, the largest of all


class SharpnessAware(torch.optim.Optimizer):
    """Climbs a little, and descends with the gradient found there (Foret et al., ICLR 2021); with a decay."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float = 0.05) -> None:
        super().__init__(parameters, {"lr": lr})
        self.base = torch.optim.AdamW(self.param_groups, lr=lr, weight_decay=0.1)

    @torch.no_grad()
    def first_step(self) -> None:
        for weight in (weight for group in self.param_groups for weight in group["params"]):
            self.state[weight]["before"] = weight.clone()
            weight.add_(0.05 * (weight.grad + 0.1 * weight))

    @torch.no_grad()
    def second_step(self) -> None:
        for weight in (weight for group in self.param_groups for weight in group["params"]):
            weight.copy_(self.state[weight]["before"])
        self.base.step()


class Sharp(PlainManual):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        for step in (optimizer.first_step, optimizer.second_step):
            optimizer.zero_grad()
            self.manual_backward(self.forget_loss(batch))
            step()


def test_an_optimizer_of_two_steps():
    module = Sharp(SharpnessAware)
    original, masking = copied(module), SaliencyMasking(0.5)
    fit(module, masking)
    assert_frozen(original, copied(module), masking.mask)
    assert masking.report["drift"] == 0


class Lookahead:
    """Every second step, goes half of the way from where it was (Zhang et al., NeurIPS 2019). Not one of torch's optimizers."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base, self.steps = base, 0
        self.param_groups, self.state, self.defaults = base.param_groups, base.state, base.defaults
        self.slow = [weight.detach().clone() for group in base.param_groups for weight in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        loss = self.base.step(closure)
        self.steps += 1
        if self.steps % 2 == 0:
            for slow, weight in zip(self.slow, (w for group in self.param_groups for w in group["params"]), strict=True):
                weight.copy_(slow.lerp_(weight, 0.5).mul_(0.999))
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.base.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.base.load_state_dict(state)


@pytest.mark.filterwarnings(LEAK)
def test_a_wrapper_around_an_optimizer():
    module = Plain(lambda parameters: Lookahead(torch.optim.AdamW(parameters, lr=0.02)))
    original, masking = copied(module), SaliencyMasking(0.5)
    fit(module, masking)
    assert_frozen(original, copied(module), masking.mask)
    assert masking.report["drift"] > 0


class Exchanged(PlainManual):
    """Goes on with an optimizer that was not there at the start."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.trainer.optimizers = [torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)]


class MadeLater(PlainManual):
    """The trainer never hears of its optimizer."""

    def configure_optimizers(self) -> None:
        return None

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.own = torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)
        self.zero_grad()
        self.manual_backward(self.forget_loss(batch))
        self.own.step()


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`:UserWarning")
@pytest.mark.parametrize("kind", [Exchanged, MadeLater])
def test_an_optimizer_that_was_not_there_at_the_start(kind):
    module = kind()
    original, masking = copied(module), SaliencyMasking(0.5)
    fit(module, masking)
    assert masking.mask.num_weights == 300
    assert_frozen(original, copied(module), masking.mask)
    assert masking.report["drift"] == 0


def test_a_weight_that_is_replaced_is_refused_before_it_is_saved(tmp_path):
    class Replaces(Plain):
        def on_train_epoch_end(self) -> None:
            self.net[5].weight = nn.Parameter(self.net[5].weight.detach() + 1)

    checkpoint = ModelCheckpoint(dirpath=tmp_path)
    with pytest.raises(MisconfigurationException, match=r"weight of shape \(15, 12\) was replaced by another parameter"):
        fit(Replaces(), SaliencyMasking(0.5), checkpoint, enable_checkpointing=True)
    assert not list(Path(tmp_path).glob("*.ckpt"))


class Reassigns(Plain):
    """Puts a new tensor in the place of a buffer, also one of another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ema", torch.tensor([0.5, -0.0]))
        self.register_buffer("queue", torch.zeros(2))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.ema = self.ema * 0.9 + 0.1
        self.queue = torch.cat([self.queue, torch.ones(1)])
        return super().training_step(batch, batch_idx)


def test_frozen_buffers_that_are_reassigned_are_put_back(tmp_path):
    module = Reassigns()
    original = {name: buffer.clone() for name, buffer in module.named_buffers()}
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="last")
    fit(module, SaliencyMasking(0.5, freeze_buffers=True), checkpoint, enable_checkpointing=True)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    for name, buffer in module.named_buffers():
        assert same_bits(buffer, original[name])
        assert same_bits(saved[name], original[name])


class Words(Plain):
    """An embedding whose gradient is sparse, before the network."""

    def __init__(self, sparse: bool = True) -> None:
        super().__init__(lambda parameters: torch.optim.SGD(parameters, lr=0.5))
        self.words = nn.Embedding(9, 32, sparse=sparse)
        torch.nn.init.normal_(self.words.weight, generator=torch.Generator().manual_seed(3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images = self.words(batch[1] * 2 + torch.arange(len(batch[1])) % 2).view(-1, 2, 4, 4)
        return super().training_step((images + batch[0], batch[1]), batch_idx)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")
def test_sparse_gradients_are_masked_before_clipping():
    runs = []
    for sparse in (True, False):
        module = Words(sparse)
        mask = half_mask(module)
        original = copied(module)
        fit(module, SaliencyMasking(mask=mask), gradient_clip_val=0.01, max_epochs=1)
        assert_frozen_words(original, copied(module), mask)
        runs.append(copied(module))
    for name, weight in runs[0].items():
        torch.testing.assert_close(weight, runs[1][name])


def assert_frozen_words(original: dict[str, Tensor], final: dict[str, Tensor], mask: SaliencyMask) -> None:
    for name, before in original.items():
        assert same_bits(before[~mask[name]], final[name][~mask[name]])
    assert not same_bits(original["words.weight"], final["words.weight"])


def test_every_number_of_a_sparse_gradient_counts_once_and_in_its_place():
    weight = nn.Parameter(torch.zeros(4, 3))
    movable = torch.tensor([[True] * 3, [False] * 3, [True, False, True], [True] * 3])
    values = torch.tensor([[2.0] * 3, [float("nan")] * 3, [2.0] * 3, [3.0] * 3])
    weight.grad = torch.sparse_coo_tensor(torch.tensor([[0, 1, 2, 2]]), values, (4, 3), check_invariants=True)
    Held(weight, movable).mask_gradient(weight)
    assert weight.grad.is_sparse
    expected = torch.zeros(4, 3)
    expected[0] = 2.0
    expected[2, [0, 2]] = 5.0
    assert torch.equal(weight.grad.to_dense(), expected)


class Complex(Plain):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.ones(2, 4, 4, dtype=dtype))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(((batch[0] * self.phase).abs().float(), batch[1]), batch_idx)


def test_complex_weights_are_held_or_refused():
    module, masking = Complex(torch.complex64), SaliencyMasking(0.5)
    original = copied(module)
    fit(module, masking)
    assert_frozen(original, copied(module), masking.mask)
    assert 0 < masking.mask["phase"].sum() < 32
    with pytest.raises(ValueError, match=r"Weights of torch\.complex128 have too many bits .* Use complex64"):
        fit(Complex(torch.complex128), SaliencyMasking(0.5))
