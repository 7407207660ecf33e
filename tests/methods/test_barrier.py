"""BARRIER against its formula with a singular value decomposition, on a linear layer and on a convolution."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from salun_lightning.lightning_cli import UnlearningCLI
from salun_lightning.methods import Barrier, FineTune, GradientAscent, Method, NegGradPlus, Remap
from salun_lightning.modules import ImageClassifier
from salun_lightning.networks import guard as module_of_guards
from salun_lightning.networks.guard import Guard, can_be_held
from salun_lightning.saliency import SaliencyMasking
from tests.modules.small_diffusion import diffusion, images
from tests.modules.small_runs import same, trainer, weights
from tests.small import CLASSIFIER_OF_DIGITS, small_datamodule


def by_hand(change: Tensor, shift: Tensor, inputs: Tensor, reach: tuple[Tensor, Tensor] | float, directions: int) -> Tensor:
    """The barrier of one layer: (outputs, features), (outputs,), and the inputs on the forget set."""
    mean = inputs.mean(0)
    _, values, rows = torch.linalg.svd(inputs - mean, full_matrices=False)
    rows = torch.stack([row * row[row.abs().argmax()].sign() for row in rows])
    first, rest = rows[:directions], rows[directions:]
    along = (inputs - mean) @ first.T
    start, end = torch.quantile(along, 0.05, dim=0), torch.quantile(along, 0.95, dim=0)
    low, high = (start - reach, end + reach) if isinstance(reach, float) else (f((reach[0] - mean) @ first.T) for f in reach[1])
    total = (change @ mean + shift).square().mean() + (change @ rest.T * values[directions:]).square().mean()
    positive, negative = (change @ first.T).clamp(min=0), (-change @ first.T).clamp(min=0)
    for one, other in ((low, start), (start, low), (end, high), (high, end)):
        total = total + (positive @ one - negative @ other).square().mean()
    return total


def guard(layer: Any, original: Any, inputs: Tensor, directions: int, margin: float) -> Guard:
    made = Guard(layer, original)
    for part in inputs.split(7):
        made.spread.add(part.double())
    made.fix(directions)
    for part in inputs.split(7):
        made.project(part.double())
    made.bound(0.05, margin)
    return made


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 4), lambda: nn.Conv2d(6, 4, 1), lambda: nn.Conv2d(6, 4, 3, padding=1)])
def test_the_barrier_of_a_layer(make: Any) -> None:
    torch.manual_seed(0)
    layer, original, inputs = make(), make(), torch.randn(20, 6) @ torch.randn(6, 6) + 1
    value = guard(layer, original, inputs, 2, 20.0).barrier()
    change, shift = layer.weight - original.weight, layer.bias - original.bias
    if change.ndim == 4:
        change = change[:, :, change.shape[2] // 2, change.shape[3] // 2]  # the rest of the kernel sees padding
    expected = by_hand(change, shift, inputs, 20.0, 2)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
    got, wanted = (torch.autograd.grad(one, layer.weight)[0] for one in (value, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
    assert guard(layer, layer, inputs, 2, 20.0).barrier() == 0
    assert guard(make(), original, inputs, 99, 20.0).barrier() > 0  # no directions are left over


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))


class Keeps(Callback):
    """Keeps the batch, the loss and the gradient of the second step."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            pl_module.eval()
            self.change = pl_module.network[3].weight.detach() - network()[3].weight.detach()
            self.shift = pl_module.network[3].bias.detach() - network()[3].bias.detach()
            self.loss = pl_module.method.loss(pl_module, batch).detach()
            self.base = pl_module.method.base.loss(pl_module, batch).detach()
            pl_module.train()


@pytest.mark.parametrize("margin", [None, 2.0])
def test_a_run_holds_the_head(tmp_path: Path, margin: float | None) -> None:
    """The base method, and the barrier of what the original network puts into the head."""
    keeps, method = Keeps(), Barrier(GradientAscent(), weight=0.3, directions=5, margin=margin)
    module = ImageClassifier(network(), method=method, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), trainable=r"^3\.")
    trainer(tmp_path, max_steps=2, callbacks=[keeps]).fit(module, datamodule=images())
    data, original = images(), network().eval()
    data.setup()
    inputs = {
        name: torch.cat([original[:3](batch.inputs) for batch in data.set_dataloader(name)]) for name in ("forget", "retain")
    }
    every = torch.cat(list(inputs.values()))
    reach: Any = margin if margin else (every, (lambda z: z.amin(0), lambda z: z.amax(0)))
    expected = by_hand(keeps.change, keeps.shift, inputs["forget"], reach, 5)
    assert expected > 1e-4
    torch.testing.assert_close(keeps.loss, keeps.base + 0.3 * expected, rtol=1e-3, atol=1e-5)
    assert torch.equal(module.network[0].weight, network()[0].weight)
    assert module.network[1].training
    assert not module.network._forward_pre_hooks


def test_a_mask_of_ratio_0_leaves_all_as_it_was(tmp_path: Path) -> None:
    module = ImageClassifier(network(), method=Barrier(), trainable=r"^3\.")
    trainer(tmp_path, max_epochs=1, callbacks=[SaliencyMasking(0, freeze_buffers=True)]).fit(
        module, datamodule=small_datamodule()
    )
    assert same(weights(module.network), weights(network()))


@pytest.mark.filterwarnings("ignore:Be aware that when using")
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    """The inputs are those of the original network again, although the network has moved."""
    torch.save({f"network.{name}": tensor for name, tensor in network().state_dict().items()}, tmp_path / "original.pt")

    def make() -> ImageClassifier:
        method = Barrier(FineTune(), directions=3)
        return ImageClassifier(network(), method=method, trainable=r"^3\.", original=tmp_path / "original.pt")

    whole, resumed = make(), make()
    every = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    settings = {"max_epochs": 2, "enable_checkpointing": True}
    trainer(tmp_path, callbacks=[every], **settings).fit(whole, datamodule=small_datamodule())
    trainer(tmp_path, max_epochs=2).fit(resumed, datamodule=small_datamodule(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert same(weights(whole), weights(resumed))
    assert not same(weights(whole.network), weights(network()))


def test_a_diffusion_model(tmp_path: Path) -> None:
    module = diffusion(method=Barrier(Remap(), directions=4), trainable=r"\.to_[qkv]\.|time_emb_proj")
    before = weights(module.network)
    trainer(tmp_path, max_steps=2).fit(module, datamodule=images(count=12))
    moved = {name for name, tensor in weights(module.network).items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all("to_" in name or "time_emb_proj" in name for name in moved)


def test_it_follows_its_base() -> None:
    assert (Barrier().order, Barrier().kind) == ("sequential", "any")
    assert (Barrier(Remap()).order, Barrier(Remap()).kind) == ("paired", "diffusion")
    with pytest.raises(ValueError, match="Remap is a method for diffusion models"):
        ImageClassifier(network(), method=Barrier(Remap()))
    made = "{class_path: Barrier, init_args: {base: {class_path: NegGradPlus, init_args: {alpha: 0.5}}, weight: 2}}"
    method = UnlearningCLI([*CLASSIFIER_OF_DIGITS, f"--model.method={made}"], run=False).model.method
    assert (type(method.base), method.base.alpha, method.weight) == (NegGradPlus, 0.5, 2.0)


class Passes(Method):
    def loss(self, module: Any, batch: Any) -> None:
        return None


def test_a_batch_that_the_base_passes_over() -> None:
    assert Barrier(Passes()).loss(ImageClassifier(network()), {}) is None


@pytest.mark.parametrize(
    "numbers",
    [{"weight": -1.0}, {"weight": float("nan")}, {"directions": 0}, {"margin": -1.0}],
)
def test_numbers_out_of_range(numbers: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"make no barrier\. Give numbers that are not negative"):
        Barrier(**numbers)


def test_all_but_the_layers_is_frozen_and_afterwards_free_again(tmp_path: Path) -> None:
    module = ImageClassifier(network(), method=Barrier())
    trainer(tmp_path, max_epochs=1).fit(module, datamodule=small_datamodule())
    moved = {
        name for name, weight in module.network.named_parameters() if not torch.equal(weight, network().get_parameter(name))
    }
    assert moved == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert all(weight.requires_grad for weight in module.parameters())


class Attends(nn.Module):
    """Attention, whose output layer torch never calls, and a layer that is used as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.between, self.head = (
            nn.MultiheadAttention(4, 1, batch_first=True),
            nn.Linear(4, 4),
            nn.Linear(4, 3),
        )

    def forward(self, images: Tensor) -> Tensor:
        rows = images[:, 0]
        return self.head(self.attention(rows, rows, rows)[0].mean(1) @ self.between.weight.T)


def test_layers_that_cannot_be_held(tmp_path: Path) -> None:
    for layer, held in (
        (nn.Conv2d(1, 1, 4), False),
        (nn.Conv2d(1, 1, 3, padding=1, stride=2), True),
        (nn.Conv2d(1, 1, 3, padding="same"), True),
        (nn.Conv2d(1, 1, 3, padding="valid"), False),
        (nn.Conv2d(1, 1, 3, padding=2, dilation=2), True),
        (nn.MultiheadAttention(4, 1).out_proj, False),
        (nn.BatchNorm2d(1), False),
    ):
        assert can_be_held(layer) == held
    module = ImageClassifier(Attends(), method=Barrier())
    with pytest.raises(ValueError, match=r"^The layer 'between' is not called as a module\. Leave it out of model\.trainable"):
        trainer(tmp_path, max_epochs=1).fit(module, datamodule=small_datamodule())
    module = ImageClassifier(Attends(), method=Barrier(), trainable="attention|head")
    trainer(tmp_path, max_steps=1).fit(module, datamodule=small_datamodule())
    module = ImageClassifier(network(), method=Barrier(), trainable=r"^1\.")
    with pytest.raises(
        ValueError, match=r"^Barrier trains linear layers and padded convolutions\. Name some in model\.trainable"
    ):
        trainer(tmp_path, max_epochs=1).fit(module, datamodule=small_datamodule())


def test_quantiles_of_many_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    inputs, layer, original = torch.randn(4000, 3), nn.Linear(3, 2), nn.Linear(3, 2)
    everything = guard(layer, original, inputs, 2, 20.0)
    monkeypatch.setattr(module_of_guards, "_KEPT", 1000)
    some = guard(layer, original, inputs, 2, 20.0)
    torch.testing.assert_close(some.start, everything.start, atol=0.1, rtol=0)
    assert not torch.equal(some.start, everything.start)


def test_shards_are_refused(tmp_path: Path) -> None:
    runner = trainer(tmp_path, strategy=ModelParallelStrategy())
    with pytest.raises(MisconfigurationException, match=r"^Barrier needs whole layers, .*\. Use 'ddp'\.$"):
        Barrier().on_train_start(runner, ImageClassifier(network()))
