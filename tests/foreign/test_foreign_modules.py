"""The callback on modules, networks and optimizers of other packages, as these ship them: ``pytest -m foreign``.

They come with the extra ``foreign``. Weights are random and data is made here: nothing is downloaded.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from salun_lightning import SaliencyMasking
from salun_lightning.saliency.held import parameters_of
from tests.saliency.helpers import same_bits

pytestmark = [pytest.mark.foreign, pytest.mark.filterwarnings("default")]


class Dictionaries(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Twelve random images and what may be asked of them."""

    def __init__(self, size: int = 32, **more: Callable[[int], Tensor]) -> None:
        self.images = torch.rand(12, 3, size, size, generator=torch.Generator().manual_seed(0))
        self.more = more

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.images[index], **{name: make(index) for name, make in self.more.items()}}


def label(index: int) -> Tensor:
    return torch.tensor(index % 3)


def segmentation(index: int) -> Tensor:
    return torch.full((32, 32), index % 3)


class Pairs(Dictionaries):
    def __getitem__(self, index: int) -> Any:
        return self.images[index], index % 3


def torchgeo_classification() -> tuple[Any, Any]:
    from torchgeo.trainers import ClassificationTask

    return ClassificationTask(model="resnet18", in_channels=3, num_classes=3), Dictionaries(label=label)


def torchgeo_segmentation() -> tuple[Any, Any]:
    from torchgeo.trainers import SemanticSegmentationTask

    task = SemanticSegmentationTask(model="unet", backbone="resnet18", in_channels=3, num_classes=3)
    return task, Dictionaries(mask=segmentation)


def torchgeo_byol() -> tuple[Any, Any]:
    from torchgeo.trainers import BYOLTask

    return BYOLTask(model="resnet18", in_channels=3), Dictionaries(64)


def torchgeo_moco() -> tuple[Any, Any]:
    from torchgeo.trainers import MoCoTask

    return MoCoTask(model="resnet18", in_channels=3, version=2, memory_bank_size=12), Dictionaries(64)


def torchgeo_simclr() -> tuple[Any, Any]:
    from torchgeo.trainers import SimCLRTask

    return SimCLRTask(model="resnet18", in_channels=3, version=1, layers=2), Dictionaries(64)


def small_backbone() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())


def lightly_byol() -> tuple[Any, Any]:
    """With ``pytorch_lightning``, as the examples of lightly are."""
    import pytorch_lightning as pl
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    class Bootstrap(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.student = nn.Sequential(small_backbone(), BYOLProjectionHead(32, 16, 8))
            self.predictor = BYOLPredictionHead(8, 16, 8)
            self.teacher = copy.deepcopy(self.student)
            deactivate_requires_grad(self.teacher)
            self.distance = NegativeCosineSimilarity()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            update_momentum(self.student, self.teacher, m=0.9)
            views = batch[0], batch[0].flip(-1)
            seen = [self.predictor(self.student(view)) for view in views]
            wanted = [self.teacher(view).detach() for view in reversed(views)]
            return 0.5 * (self.distance(seen[0], wanted[0]) + self.distance(seen[1], wanted[1]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.06, momentum=0.9, weight_decay=0.1)

    return Bootstrap(), Pairs()


def lightly_dino() -> tuple[Any, Any]:
    import pytorch_lightning as pl
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    class Distilled(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = (
                nn.Sequential(small_backbone(), DINOProjectionHead(32, 16, 8, 24, batch_norm=bn)) for bn in (False, False)
            )
            deactivate_requires_grad(self.teacher)
            self.criterion = DINOLoss(output_dim=24, warmup_teacher_temp_epochs=2)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            update_momentum(self.student, self.teacher, m=0.9)
            views = batch[0], batch[0].flip(-1)
            teachers = [self.teacher(view).detach() for view in views]
            return self.criterion(teachers, [self.student(view) for view in views], epoch=self.current_epoch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.student.parameters(), lr=1e-2, weight_decay=0.1)

    return Distilled(), Pairs()


class Classifies(LightningModule):
    """A network of images with some optimizer."""

    def __init__(self, network: nn.Module, make_optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.network = network
        self.make_optimizer = make_optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        output = self.network(batch[0])
        return functional.cross_entropy(getattr(output, "logits", output), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(weight for weight in self.parameters() if weight.requires_grad)


def adamw(weights: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.1)


def vision_transformer() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=3, **size))


def hugging_face_vit() -> tuple[Any, Any]:
    return Classifies(vision_transformer(), adamw), Pairs()


def peft_lora() -> tuple[Any, Any]:
    from peft import LoraConfig, get_peft_model

    targets = [name for name, child in vision_transformer().named_modules() if isinstance(child, nn.Linear) and "layer" in name]
    config = LoraConfig(r=2, target_modules=targets, modules_to_save=["classifier"], init_lora_weights=False)
    return Classifies(get_peft_model(vision_transformer(), config), adamw), Pairs()


def timm_network() -> tuple[Any, Any]:
    import timm

    return Classifies(timm.create_model("resnet10t", num_classes=3), adamw), Pairs()


def torch_uncertainty_classification() -> tuple[Any, Any]:
    from torch_uncertainty.routines import ClassificationRoutine

    network = nn.Sequential(small_backbone(), nn.Linear(32, 3))
    return ClassificationRoutine(
        model=network,
        num_classes=3,
        loss=nn.CrossEntropyLoss(),
        optim_recipe=torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1),
    ), Pairs()


def schedule_free() -> tuple[Any, Any]:
    """It trains on one set of weights and is evaluated on another: weights change outside of its steps."""
    from schedulefree import AdamWScheduleFree

    class Switches(Classifies):
        def on_train_epoch_start(self) -> None:
            self.optimizers(use_pl_optimizer=False).train()

        def on_train_epoch_end(self) -> None:
            self.optimizers(use_pl_optimizer=False).eval()

    network = nn.Sequential(small_backbone(), nn.Linear(32, 3))
    return Switches(network, lambda weights: AdamWScheduleFree(weights, lr=0.05, weight_decay=0.5)), Pairs()


def sharpness_aware() -> tuple[Any, Any]:
    from pytorch_optimizer import SAM

    class Sharp(Classifies):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.automatic_optimization = False

        def forget_loss(self, batch: Any) -> Tensor:
            return super().training_step(batch, 0)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers(use_pl_optimizer=False)
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.first_step(zero_grad=True)
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.second_step(zero_grad=True)

    network = nn.Sequential(small_backbone(), nn.Linear(32, 3))
    return Sharp(network, lambda weights: SAM(weights, torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1)), Pairs()


def lookahead() -> tuple[Any, Any]:
    from pytorch_optimizer import Lookahead

    network = nn.Sequential(small_backbone(), nn.Linear(32, 3))
    return Classifies(network, lambda weights: Lookahead(adamw(weights), k=2)), Pairs()


FOREIGN = [
    torchgeo_classification,
    torchgeo_segmentation,
    torchgeo_byol,
    torchgeo_moco,
    torchgeo_simclr,
    lightly_byol,
    lightly_dino,
    hugging_face_vit,
    peft_lora,
    timm_network,
    torch_uncertainty_classification,
    schedule_free,
    sharpness_aware,
    lookahead,
]


def run(make: Callable[[], tuple[Any, Any]], *callbacks: Any) -> tuple[Any, dict[str, Tensor]]:
    """Two epochs; the module, and what it had before."""
    torch.manual_seed(3)
    module, data = make()
    kind: Any = Trainer
    if not isinstance(module, LightningModule):
        import pytorch_lightning as pl

        kind = pl.Trainer
    before = everything(module)
    torch.manual_seed(4)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = kind(accelerator="cpu", devices=1, max_epochs=2, callbacks=list(callbacks), **quiet)
    trainer.fit(module, DataLoader(data, batch_size=4, shuffle=True, drop_last=True), DataLoader(data, batch_size=4))
    return module, before


def everything(module: nn.Module) -> dict[str, Tensor]:
    tensors = (*module.named_parameters(remove_duplicate=False), *module.named_buffers())
    return {name: value.detach().clone() for name, value in tensors}


@pytest.mark.parametrize("make", FOREIGN, ids=lambda make: make.__name__)
def test_frozen_weights_keep_their_bits(make):
    masking = SaliencyMasking(0.5)
    module, before = run(make, masking)
    names = {weight: name for name, weight in module.named_parameters()}
    optimized = {weight for optimizer in module.trainer.optimizers for weight in parameters_of(optimizer)}
    moved = 0
    covered = [weight for weight in names if weight in optimized and weight.requires_grad]
    assert sum(weight.numel() for weight in covered) == masking.mask.num_weights
    for weight in covered:
        movable = masking.mask[names[weight]]
        assert same_bits(weight[~movable], before[names[weight]][~movable]), names[weight]
        moved += int((weight[movable] != before[names[weight]][movable]).sum())
    assert masking.report["num_kept"] == masking.mask.num_weights // 2
    assert 0.5 * masking.mask.num_kept < moved <= masking.report["num_kept"]
    assert (masking.report["drift"] > 0) == (make is schedule_free)  # alone to write outside of its steps


@pytest.mark.parametrize("make", FOREIGN, ids=lambda make: make.__name__)
def test_ratio_1_equals_no_callback(make):
    without, with_mask = (everything(run(make, *callbacks)[0]) for callbacks in ((), (SaliencyMasking(1),)))
    assert without.keys() == with_mask.keys()
    assert [name for name, value in with_mask.items() if not same_bits(value, without[name])] == []
