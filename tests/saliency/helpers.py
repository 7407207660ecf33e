"""What the tests of the saliency package share: small third-party modules, runs, and plain-torch references."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from salun_lightning.saliency import SaliencyMask, saliency_scores
from salun_lightning.weights import weights_of

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1)


def small_network() -> nn.Sequential:
    """Convolution, BatchNorm and two linear layers: 300 weights on images of 2 x 4 x 4 pixels."""
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 15),
        nn.Tanh(),
        nn.Linear(15, 3, bias=False),
    )


class Plain(LightningModule):
    """A third-party module: it knows nothing of forgetting."""

    def __init__(self, make_optimizer: MakeOptimizer = sgd, network: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = small_network() if network is None else network
        self.make_optimizer = make_optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        loss = functional.cross_entropy(self.net(images).float(), targets)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters())


class PlainManual(Plain):
    """The same under manual optimization, with clipping."""

    def __init__(self, make_optimizer: MakeOptimizer = sgd) -> None:
        super().__init__(make_optimizer)
        self.automatic_optimization = False

    def forget_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]).float(), batch[1])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        optimizer.step()


def images_and_targets(count: int = 25) -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    return TensorDataset(torch.randn(count, 2, 4, 4, generator=generator), torch.arange(count) % 3)


def loader(count: int = 25, batch_size: int = 5, **kwargs: Any) -> DataLoader:
    return DataLoader(images_and_targets(count), batch_size=batch_size, **kwargs)


def quiet_trainer(*callbacks: Callback, **kwargs: Any) -> Trainer:
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(callbacks=list(callbacks), **{**settings, **kwargs})


def fit(
    module: LightningModule, *callbacks: Callback, data: Any = None, val: Any = None, ckpt_path: Any = None, **kwargs: Any
) -> Trainer:
    """Train on the CPU, quietly; ``data`` is a loader or several (25 images in batches of 5 by default)."""
    trainer = quiet_trainer(*callbacks, **kwargs)
    trainer.fit(module, loader() if data is None else data, val, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


def copied(module: nn.Module) -> dict[str, Tensor]:
    """The trainable weights by plain name, as they are now."""
    return {name: weight.detach().clone() for name, weight in weights_of(module).items()}


def half_mask(module: nn.Module, ratio: float = 0.5) -> SaliencyMask:
    """A random one."""
    scores = saliency_scores(module, (), "random", seed=3)
    return SaliencyMask.from_scores(scores, ratio)


def bits(tensor: Tensor) -> Tensor:
    """The bytes of each number, so that NaN equals itself and -0.0 is not 0.0."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).view(tensor.numel(), tensor.element_size())


def same_bits(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(bits(first), bits(second))


def assert_frozen(original: Mapping[str, Tensor], final: Mapping[str, Tensor], mask: SaliencyMask) -> None:
    """Every weight outside the mask has its original bits; and there was movement inside, or this would prove nothing."""
    moved = 0
    for name, before in original.items():
        changed = (bits(before.to(final[name].dtype)) != bits(final[name])).any(1)
        movable = mask[name].flatten()
        assert not changed[~movable].any(), f"{name}: {int(changed[~movable].sum())} frozen weights moved"
        moved += int(changed[movable].sum())
    assert moved > 0.5 * mask.num_kept


def same_weights(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(same_bits(first[name], second[name]) for name in first)
