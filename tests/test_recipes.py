"""The recipes of the pages for own data, own modules, weights and predictions, run as they stand there."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from salun_lightning import SaliencyMasking
from salun_lightning.cli import main
from salun_lightning.configurations import SHIPPED
from salun_lightning.evidence.predictions import PredictedSet, Predictions
from salun_lightning.lightning_cli import UnlearningCLI
from salun_lightning.networks import SmallResNet
from tests.test_readme import block, commands


def test_own_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """From a folder of images to a table, with two epochs in the place of thirty."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.RandomState(0)
    for split, count in (("train", 20), ("test", 6)):
        for name, shade in (("dark", 0), ("middle", 64), ("bright", 128)):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray((shade + draw.randint(0, 128, (24, 32, 3))).astype(np.uint8)).save(folder / f"{number}.jpg")
    (init,) = (words for words in commands() if words[0] == "init")
    (compare,) = (words for words in commands() if words[0] == "compare" and words[-1].startswith(init[1]))
    main(init)
    assert " ".join(compare) in capsys.readouterr().out
    task = yaml.safe_load((tmp_path / init[1] / "photos.yaml").read_text())
    network = task["model"]["init_args"]["network"]["init_args"]
    assert network["num_classes"] == 3
    assert network["mean"] == [pytest.approx(0.5, abs=0.02)] * 3  # of 0 to 127, 64 to 191 and 128 to 255
    assert network["std"] == [pytest.approx(0.22, abs=0.05)] * 3
    assert task["data"]["init_args"]["root"] == str(tmp_path / "images")
    assert (tmp_path / init[1] / "photos.yaml").read_text().count("#") == (SHIPPED / "photos.yaml").read_text().count("#")
    quick = ["--seeds=[1]", "--", "--trainer.max_epochs=2", "--model.network.width=4", "--trainer.accelerator=cpu"]
    main(["compare", *compare[1:], *quick])
    results = json.loads((tmp_path / "runs/compare/photos_compare/results.json").read_text())
    assert [cell["row"] for cell in results["cells"]] == ["original", "Retrain", "FT", "SalUn"]
    assert all(f"--config {init[1]}/photos.yaml" in cell["command"] for cell in results["cells"])
    cli = UnlearningCLI([f"--config={init[1]}/photos.yaml", "--config=method/salun", "--trainer.accelerator=cpu"], run=False)
    assert cli.trainer.default_root_dir == "runs/photos/salun"


def test_random_labels_in_a_module_of_another_project(tmp_path: Path) -> None:
    code = block("python", "def forget_loss")
    assert len(code.split("def forget_loss")[0].strip().splitlines()) <= 6
    names: dict[str, Any] = {"torch": torch, "functional": functional}
    exec(code, names)

    class Theirs(LightningModule):
        num_classes = 3
        training_step, forget_loss = names["training_step"], names["forget_loss"]

        def __init__(self) -> None:
            super().__init__()
            self.network = SmallResNet(3, width=4, stages=1)
            self.asked: list[torch.Tensor] = []

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.network(images)
            return logits

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = TensorDataset(torch.rand(16, 1, 8, 8), torch.arange(16) % 3, torch.arange(16) < 5)
    masking, module = SaliencyMasking(ratio=0.5), Theirs()
    before = module.network.head.bias.clone()
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"), False)
    Trainer(max_epochs=1, accelerator="cpu", callbacks=[masking], default_root_dir=tmp_path, **quiet).fit(
        module, DataLoader(data, batch_size=8)
    )
    assert masking.report["drift"] == 0
    assert not torch.equal(module.network.head.bias, before)
    # wrong labels are drawn for what is to be forgotten, and never the true one: their loss is that of the wrong classes alone
    logits = torch.zeros(5, 3).scatter_(1, (torch.arange(5) % 3).unsqueeze(1), 50.0)
    module.network = torch.nn.Identity()
    assert module.training_step((logits, torch.arange(5) % 3, torch.ones(5, dtype=torch.bool)), 0) == pytest.approx(50)
    assert module.forget_loss((logits, torch.arange(5) % 3)) < 1e-6


def test_plain_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    from torchvision.models import resnet18

    trained = resnet18(num_classes=2).state_dict()
    torch.save({"state_dict": {f"network.network.{name}": tensor for name, tensor in trained.items()}}, "last.ckpt")
    names: dict[str, Any] = {}
    exec(block("python", "export_state_dict"), names)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in names["network"].state_dict().items())


def test_figures_of_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    code = block("python", "Predictions.load")
    path = re.search(r'load\("(.*)"\)', code)
    assert path is not None
    Path(path[1]).parent.mkdir(parents=True)
    said = PredictedSet(torch.tensor([[99.0, 0.0]]).repeat(4, 1), torch.tensor([0, 0, 0, 1]), torch.arange(4))
    Predictions({"forget": said}).save(path[1])
    exec(code, {})
    assert capsys.readouterr().out.startswith("25.0 tensor(0.7500)")
