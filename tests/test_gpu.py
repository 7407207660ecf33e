"""On a CUDA device: run with ``-m gpu``."""

from pathlib import Path

import pytest
import torch

from salun_lightning import SaliencyMask
from salun_lightning.cli import main

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CONFIGS = Path(__file__).parents[1] / "configs" / "digits"
QUICK = ["--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    main(["fit", f"--config={CONFIGS}/original.yaml", f"--trainer.default_root_dir={folder}", *QUICK])
    return folder / "checkpoints" / "last.ckpt"


def fit(original: Path, folder: Path, *options: str) -> dict[str, torch.Tensor]:
    common = [f"--config={CONFIGS}/salun.yaml", f"--model.original={original}", f"--trainer.default_root_dir={folder}"]
    main(["fit", *common, *QUICK, *options])
    state: dict[str, torch.Tensor] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return state


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("optimizer", [("SGD", "momentum=0.9"), ("AdamW", "fused=true"), ("AdamW", "foreach=true")], ids=str)
def test_frozen_bits_on_the_device(optimizer: tuple[str, str], precision: str, original: Path, tmp_path: Path) -> None:
    name, argument = optimizer
    chosen = [f"--model.optimizer=torch.optim.{name}", f"--model.optimizer.{argument}", "--model.optimizer.weight_decay=0.1"]
    after = fit(original, tmp_path, f"--trainer.precision={precision}", "--trainer.accelerator=gpu", *chosen)
    before = torch.load(original, weights_only=True)["state_dict"]
    mask = SaliencyMask.load(tmp_path / "checkpoints" / "last.ckpt")
    moved = 0
    for weight in mask:
        changed = after[f"network.{weight}"].cpu().view(torch.int32) != before[f"network.{weight}"].cpu().view(torch.int32)
        assert not (changed & ~mask[weight]).any()
        moved += int(changed.sum())
    assert moved > 0


def test_same_mask_as_on_the_cpu(original: Path, tmp_path: Path) -> None:
    for accelerator in ("cpu", "gpu"):
        fit(original, tmp_path / accelerator, f"--trainer.accelerator={accelerator}")
    cpu, gpu = (SaliencyMask.load(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("cpu", "gpu"))
    assert cpu.num_kept == gpu.num_kept
    assert cpu.iou(gpu) > 0.99  # the same sums, rounded in another order: only weights at the threshold may differ
