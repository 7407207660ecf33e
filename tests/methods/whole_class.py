"""Small data of three classes of which one is forgotten whole, and small networks for them."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from salun_lightning.data import ForgetClasses, ForgetRandom, ForgetRequest, ForgetRetainDataModule, ImageTensors
from salun_lightning.methods import Method
from salun_lightning.modules import ImageClassifier
from salun_lightning.saliency import SaliencyMask, SaliencyMasking
from tests.modules.small_runs import trainer

CLASSES = 4
FORGOTTEN = 2


def images(count: int = 48) -> ImageTensors:
    """Noise, and a bright corner that says the class."""
    pixels = torch.randint(0, 128, (count, 1, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    targets = torch.arange(count) % CLASSES
    corners = torch.tensor([[0, 0], [0, 3], [3, 0], [3, 3]])[targets]
    for image, (row, column) in zip(pixels, corners.tolist(), strict=True):
        image[0, row : row + 3, column : column + 3] += 127
    return ImageTensors(pixels, targets)


def data(forget: ForgetRequest | None = None, **kwargs: Any) -> ForgetRetainDataModule:
    request = ForgetClasses(FORGOTTEN) if forget is None else forget
    datamodule = ForgetRetainDataModule(request, images(), images(12), **{"batch_size": 16, **kwargs})
    datamodule.setup()
    return datamodule


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(54, CLASSES)),
    )


def trained(folder: Path, method: Method, mask: SaliencyMask | float | None = None, **kwargs: Any) -> ImageClassifier:
    """A classifier after a run of the method: by default one plain step, as an edit needs it."""
    settings = {"optimizer": lambda p: torch.optim.SGD(p, lr=1.0), "max_steps": 1, **kwargs}
    module = ImageClassifier(settings.pop("network", network()), method=method, optimizer=settings.pop("optimizer"))
    masking = [] if mask is None else [SaliencyMasking(**{"ratio" if isinstance(mask, float) else "mask": mask})]
    datamodule = settings.pop("data", None) or data()
    trainer(folder, callbacks=masking, **settings).fit(module, datamodule=datamodule)
    return module


NOT_WHOLE = ForgetRandom(fraction=0.25)
