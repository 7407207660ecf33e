"""Methods in modules of other packages, as these ship them: ``pytest -m foreign``. Nothing is downloaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import Dataset

from salun_lightning import (
    DAMP,
    DELETE,
    SCRUB,
    SSD,
    BadTeacher,
    FineTune,
    FisherForgetting,
    ForgetClasses,
    ForgetRetainDataModule,
    GradientAscent,
    ImageClassifier,
    NegGradPlus,
    RandomLabel,
    SaliencyMasking,
    Unlearn,
)
from salun_lightning.networks.head import head_of
from salun_lightning.networks.stages import stages_of
from tests.foreign.test_foreign_modules import Classifies, adamw, everything, vision_transformer
from tests.saliency.helpers import same_bits

pytestmark = [pytest.mark.foreign, pytest.mark.filterwarnings("default")]

EDITS = [SSD(), DAMP(), FisherForgetting()]
TRAINING = [FineTune(), RandomLabel(), GradientAscent(), NegGradPlus(0.9), SCRUB(), BadTeacher(), DELETE()]


class Scenes(Dataset[dict[str, Tensor]]):
    """Twenty-four random images of three classes in three colours, as torchgeo and Hugging Face hand them out."""

    def __init__(self, image: str, label: str) -> None:
        self.names = (image, label)
        self.targets = [index % 3 for index in range(24)]
        colours = torch.eye(3)[self.targets][:, :, None, None]
        self.images = 0.5 * torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0)) + 0.5 * colours

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return dict(zip(self.names, (self.images[index], torch.tensor(self.targets[index])), strict=True))


def torchgeo_task() -> tuple[LightningModule, str, str]:
    from torchgeo.trainers import ClassificationTask

    return ClassificationTask(model="resnet18", in_channels=3, num_classes=3, lr=1e-3), "image", "label"


class OfHuggingFace(Classifies):
    """A module that is asked by the names of its model."""

    def forward(self, pixel_values: Tensor) -> Any:
        return self.network(pixel_values)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.network(**batch).loss
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.network(**batch).loss)


def hugging_face() -> tuple[LightningModule, str, str]:
    return OfHuggingFace(vision_transformer(), adamw), "pixel_values", "labels"


@pytest.mark.parametrize("method", [*TRAINING, *EDITS], ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("make", [torchgeo_task, hugging_face], ids=lambda make: make.__name__)
def test_a_method_runs_with_a_mask_in_an_unchanged_module(make: Any, method: Any, tmp_path: Path) -> None:
    torch.manual_seed(3)
    module, image, label = make()
    scenes = Scenes(image, label)
    data = ForgetRetainDataModule(
        ForgetClasses(1), scenes, scenes, val_fraction=0.25, batch_size=6, input_key=image, target_key=label
    )
    masking, before = SaliencyMasking(0.5), everything(module)
    steps = {"max_steps": 1} if method in EDITS else {"max_epochs": 2}
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", devices=1, callbacks=[Unlearn(method), masking], **steps, **quiet)
    trainer.fit(module, datamodule=data)
    assert {"train/loss", "val_loss"} <= trainer.callback_metrics.keys()
    moved = 0
    for name, weight in module.named_parameters():
        movable = masking.mask[name]
        assert same_bits(weight[~movable], before[name][~movable]), name
        moved += int((weight != before[name]).sum())
    assert moved > 0
    tester = Trainer(accelerator="cpu", devices=1, **quiet)
    tester.test(ImageClassifier(module), datamodule=data, verbose=False)
    assert {"UA", "RA", "TA", "MIA"} <= tester.callback_metrics.keys()


def test_heads_and_stages_of_other_packages() -> None:
    import timm

    images = torch.rand(2, 3, 32, 32)
    task = torchgeo_task()[0]
    vit: nn.Module = vision_transformer()
    of_timm = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
    assert [head_of(one.eval(), images)[0] for one in (task, vit, of_timm)] == ["fc", "classifier", "head"]
    stages = [stages_of(network.eval(), images) for network in (vit, of_timm)]
    of_vit, of_timm = ([[operator.name for operator in stage] for stage in some] for some in stages)
    assert [len(stage) for stage in of_vit] == [3, 3, 1]  # query, key and value are given the same
    assert of_timm == [["blocks.0.attn.qkv"], ["blocks.1.attn.qkv"], ["head"]]
