"""On a CUDA device: run with ``-m gpu``."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from salun_lightning import SaliencyMask, SaliencyMasking
from salun_lightning.cli import main
from salun_lightning.lightning_cli import UnlearningCLI

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


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diffusion")
    main(
        ["fit", f"--config={CONFIGS}/diffusion/original.yaml", f"--trainer.default_root_dir={folder}", "--trainer.max_steps=5"]
    )
    return folder


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_diffusion_model_unlearns_on_the_device(precision: str, diffusion: Path, tmp_path: Path) -> None:
    config = [f"--config={CONFIGS}/diffusion/salun.yaml", f"--model.original={diffusion}/pipeline"]
    options = ["--trainer.accelerator=gpu", f"--trainer.precision={precision}", "--trainer.max_steps=5"]
    cli = main(["fit", *config, *options, f"--trainer.default_root_dir={tmp_path}"])
    masking = next(callback for callback in cli.trainer.callbacks if isinstance(callback, SaliencyMasking))
    assert masking.report["drift"] == 0
    assert 0 < masking.report["num_moved"] <= masking.report["num_kept"]


def test_no_step_copies_a_mask_between_host_and_device(diffusion: Path, tmp_path: Path) -> None:
    """What a step copies from or to the device is far smaller than the mask, 1 byte a weight."""

    class Recorder(Callback):
        profile: torch.profiler.profile

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                self.profile = torch.profiler.profile(record_shapes=True)
                self.profile.start()

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                torch.cuda.synchronize()
                self.profile.stop()

    config = [f"--config={CONFIGS}/diffusion/salun.yaml", f"--model.original={diffusion}/pipeline"]
    cli = UnlearningCLI([*config, "--trainer.accelerator=gpu", "--trainer.max_steps=5"], run=False)
    recorder = Recorder()
    cli.trainer.callbacks.append(recorder)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    trace = tmp_path / "trace.json"
    recorder.profile.export_chrome_trace(str(trace))
    copies = [event for event in json.loads(trace.read_text())["traceEvents"] if "Memcpy" in event.get("name", "")]
    across = [event["args"]["bytes"] for event in copies if "HtoD" in event["name"] or "DtoH" in event["name"]]
    assert recorder.profile.key_averages()
    assert sum(across) < 0.1 * sum(weight.numel() for weight in cli.model.network.parameters())
