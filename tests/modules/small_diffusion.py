"""Tiny diffusion models, and small runs with them, that the tests of diffusion share."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, UNet2DModel
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from salun_lightning.data import ForgetClasses, ForgetRetainDataModule, ImageTensors, Samples
from salun_lightning.modules.class_diffusion import ClassDiffusion
from salun_lightning.modules.sampling import Sampling
from salun_lightning.networks.frozen import Frozen

CLASSES = 3
NULL = CLASSES
STEPS = 20  # of the noise schedule


def unet(seed: int = 0, **kwargs: Any) -> UNet2DModel:
    """A network of 3 classes and a null class on images of 1 x 4 x 4 pixels."""
    torch.manual_seed(seed)
    settings = {
        "sample_size": 4,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (4, 8),
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "num_class_embeds": CLASSES + 1,
        "attention_head_dim": 4,
    }
    return UNet2DModel(**{**settings, **kwargs})


def transformer(seed: int = 0, **kwargs: Any) -> DiTTransformer2DModel:
    """A transformer of 3 classes, and a null class of its own, on images of 1 x 8 x 8 pixels."""
    torch.manual_seed(seed)
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 4,
        "in_channels": 1,
        "out_channels": 1,
        "num_layers": 1,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": CLASSES,
    }
    return DiTTransformer2DModel(**{**settings, **kwargs})


class Plain(nn.Module):
    """A network that knows nothing of diffusers but how it is called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(1, 1, 3, padding=1)
        self.classes = nn.Embedding(CLASSES + 1, 1)

    def forward(self, noisy: Tensor, timesteps: Tensor, class_labels: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        assert not return_dict
        return (self.convolution(noisy) + (self.classes(class_labels) + timesteps.view(-1, 1) / STEPS)[..., None, None],)


def noise_schedule(**kwargs: Any) -> DDPMScheduler:
    return DDPMScheduler(**{"num_train_timesteps": STEPS, **kwargs})


def diffusion(network: nn.Module | None = None, noise: Any = None, **kwargs: Any) -> ClassDiffusion:
    """A model with a null class, that samples in five steps."""
    settings = {"null_class": NULL, "sampling": Sampling(steps=5), "optimizer": adam}
    return ClassDiffusion(network or unet(), noise or noise_schedule(), **{**settings, **kwargs})


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def random_images(count: int, seed: int, size: int = 4, classes: int = CLASSES) -> ImageTensors:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 1, size, size), dtype=torch.uint8, generator=generator)
    return ImageTensors(pixels, torch.arange(count) % classes)


def images(size: int = 4, count: int = 30, classes: int = CLASSES, test: int = 12, **kwargs: Any) -> ForgetRetainDataModule:
    """A datamodule over random images of which class 0 is to be forgotten."""
    settings = {"forget": ForgetClasses([0]), "batch_size": 8, **kwargs}
    return ForgetRetainDataModule(
        train=random_images(count, 1, size, classes), test=random_images(test, 2, size, classes), **settings
    )


def some_samples(count: int, first: int = 0, size: int = 4, seed: int = 0) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(count, 1, size, size, generator=generator)
    return Samples(pixels, torch.arange(count) % CLASSES, torch.arange(first, first + count))


def saved(module: LightningModule, folder: Path) -> Path:
    """The weights of the network as a file that an original model is read from."""
    path = folder / "original.pt"
    torch.save({f"network.{name}": tensor for name, tensor in module.network.state_dict().items()}, path)
    return path


class Attached(ClassDiffusion):
    """A model as it is in training, without a trainer: with its data, and with a frozen original model beside it."""

    forgotten_classes: list[int]

    @property
    def datamodule(self) -> Any:
        names = [str(number) for number in range(CLASSES)]
        return SimpleNamespace(num_classes=CLASSES, forgotten_classes=self.forgotten_classes, class_names=names)


def attached(network: nn.Module | None = None, forgotten: tuple[int, ...] = (0,), **kwargs: Any) -> Attached:
    """With an original model of other weights."""
    module = Attached(network or unet(), **{"noise_scheduler": noise_schedule(), "null_class": NULL, **kwargs})
    module.forgotten_classes = list(forgotten)
    module.setup("test")
    module._reference = Frozen(unet(seed=8))
    return module
