"""Short runs of every method that ships for classifiers, made from its configuration alone; also what two processes run."""

import json
import os
import traceback
from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import SwinTransformer, VisionTransformer

from salun_lightning.configurations import SHIPPED
from salun_lightning.data import ForgetClasses, ForgetRetainDataModule, ImageTensors
from salun_lightning.methods import Method
from salun_lightning.modules import ImageClassifier
from salun_lightning.networks import SmallResNet
from tests.modules.small_runs import trainer

CLASSES = 3
EPOCHS = 2


def _configured() -> dict[str, dict[str, Any]]:
    """The content of each configuration of a method for classifiers; of those that differ in the mask alone, the first."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted((SHIPPED / "method").glob("*.yaml"))}
    fitting = {
        name: yaml.safe_load(text)
        for name, text in texts.items()
        if "for a concept" not in text and "diffusion" not in text.splitlines()[0].lower()
    }
    first = {json.dumps(content["model.method"]): name for name, content in reversed(fitting.items())}
    return {name: fitting[name] for name in sorted(first.values())}


CONFIGURED = _configured()


def _plain() -> nn.Module:
    """Without BatchNorm, whose statistics are those of one process."""
    layers = {"conv": nn.Conv2d(3, 6, 3, padding=1), "tanh": nn.Tanh(), "pool": nn.AvgPool2d(4), "flat": nn.Flatten()}
    layers |= {"hidden": nn.Linear(24, 8), "relu": nn.ReLU(), "head": nn.Linear(8, CLASSES)}
    return nn.Sequential(OrderedDict(layers))


def _swin() -> nn.Module:
    sizes = {"patch_size": [2, 2], "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": [2, 2]}
    return SwinTransformer(**sizes, num_classes=CLASSES)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "plain": _plain,
    "SmallResNet": lambda: SmallResNet(CLASSES, in_channels=3, width=4, stages=2),
    "ViT": lambda: VisionTransformer(8, 4, 1, 2, 8, 16, num_classes=CLASSES),
    "Swin": _swin,
}


def _images(count: int, seed: int) -> ImageTensors:
    """Images of 3 x 8 x 8 pixels, of which a class is brighter in one colour: hard enough that some are mistaken."""
    draw = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % CLASSES
    pixels = torch.randint(0, 200, (count, 3, 8, 8), generator=draw)
    pixels[torch.arange(count), targets] += 25
    return ImageTensors(pixels.to(torch.uint8), targets)


def data(batch_size: int = 8) -> ForgetRetainDataModule:
    """Of 36 training images the first class, a third of them, is to be forgotten. All counts are even: two processes share."""
    return ForgetRetainDataModule(ForgetClasses([0]), _images(48, 1), _images(12, 2), val_fraction=0.25, batch_size=batch_size)


@cache
def original(network: str = "plain") -> nn.Module:
    """A network that was trained for some steps on all images. To be copied, never changed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made, images = NETWORKS[network](), _images(48, 1)
        optimizer = torch.optim.Adam(made.parameters(), lr=0.01)
        for _ in range(20):
            optimizer.zero_grad()
            functional.cross_entropy(made(images.images / 255), images.targets).backward()
            optimizer.step()
    return made


_KEYS = ("model.method", "model.optimizer", "model.trainable")


@cache
def _parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model.method", type=Method)
    parser.add_argument("--model.optimizer", type=OptimizerCallable, default=partial(torch.optim.SGD, lr=0.01, momentum=0.9))
    parser.add_argument("--model.trainable", type=str | None, default=None)
    return parser


def module_of(name: str, network: str = "plain") -> ImageClassifier:
    """A module as a configuration has it, with an original network."""
    content = {key: value for key, value in CONFIGURED[name].items() if key in _KEYS}
    made = _parser().instantiate(_parser().parse_object(content)).model
    return ImageClassifier(deepcopy(original(network)), **vars(made))


def run(
    name: str, folder: Path, *callbacks: Callback, network: str = "plain", resume: Path | None = None, **settings: Any
) -> tuple[ImageClassifier, Trainer]:
    """Unlearn with a method; what its configuration says of the number of steps holds."""
    module = module_of(name, network)
    limit = CONFIGURED[name].get("trainer.max_steps", -1)
    runner = trainer(folder, **{"max_epochs": EPOCHS, "max_steps": limit, "callbacks": [*callbacks], **settings})
    runner.fit(module, datamodule=data(8 // runner.world_size), ckpt_path=resume, weights_only=True)
    return module, runner


def parameters(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights, without buffers."""
    return {name: weight.detach().clone() for name, weight in module.named_parameters()}


def exact(name: str, folder: Path, **settings: Any) -> dict[str, Tensor]:
    """The weights after a run in double precision, in which the order of sums hardly matters."""
    return parameters(run(name, folder, precision="64-true", **settings)[0].network)


def on_each_process(rank: int, folder: Path, port: int, names: list[str]) -> None:
    """One process of two: methods in turn, each with its weights, or with what went wrong, in a file."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", NODE_RANK="0", LOCAL_RANK=str(rank), RANK=str(rank)
    )
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for name in names:
        try:
            found: Any = exact(name, folder, devices=2, strategy="ddp")
        except Exception:
            found = traceback.format_exc()
        torch.save(found, folder / f"{name}.{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
