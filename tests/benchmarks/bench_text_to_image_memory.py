"""Peak memory of SalUn on a UNet of the size of Stable Diffusion 1.4, in bytes a weight, in bfloat16 at batch 1.

The saliency pass, the selection, the mask file and one masked step of Adam, in a process of its own. The weights are random: it
is the sizes that count. (In the released code, the mask alone is an int64 tensor in the size of the network: 8 bytes a weight.)
"""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from lightning.pytorch import Trainer
from measuring import report
from torch import Tensor, nn
from typing_extensions import override

from salun_lightning import ForgetClasses, ForgetRetainDataModule, NegGradPlus, SaliencyMasking
from salun_lightning.data import ImageTensors
from salun_lightning.modules.diffusion import Diffusion
from salun_lightning.modules.sampling import Sampling

ON_GPU = torch.cuda.is_available()


class OfPrompts(Diffusion):
    """A UNet that is told one of three prompts, in latents of 4 x 64 x 64."""

    null = 2

    def __init__(self, **kwargs: Any) -> None:
        network = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)  # its other sizes are those of version 1.4
        super().__init__(network, DDPMScheduler(), **kwargs)
        self.prompts = torch.randn(3, 77, 768)

    @override
    def predict(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Tensor) -> Tensor:
        told = self.prompts.to(noisy)[conditions]
        prediction: Tensor = network(noisy, timesteps, encoder_hidden_states=told, return_dict=False)[0]
        return prediction


def _peak() -> float:
    if ON_GPU:
        return float(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def bytes_a_weight() -> tuple[float, int, float]:
    """Peak memory beyond what was there before the network, the number of weights, and the size of the mask file."""
    before = _peak()
    torch.set_default_dtype(torch.bfloat16)
    module = OfPrompts(
        method=NegGradPlus(),
        sampling=Sampling(guidance=7.5),
        gradient_checkpointing=True,
        optimizer=lambda p: torch.optim.Adam(p, lr=1e-5, fused=True),
    )
    torch.set_default_dtype(torch.float32)
    latents = ImageTensors(torch.randint(0, 256, (4, 4, 64, 64), dtype=torch.uint8), torch.arange(4) % 2)
    data = ForgetRetainDataModule(ForgetClasses(0), latents, latents, batch_size=1)
    masking = SaliencyMasking(0.5)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = Trainer(devices=1, max_steps=1, limit_val_batches=0, precision="bf16-true", callbacks=[masking], **quiet)
    run.fit(module, datamodule=data)
    assert masking.mask is not None
    with TemporaryDirectory() as folder:
        path = Path(folder) / "mask.safetensors"
        masking.mask.save(path)
        size = path.stat().st_size
    return (_peak() - before) / masking.mask.num_weights, masking.mask.num_weights, size / masking.mask.num_weights


@pytest.mark.benchmark
def test_memory_of_stable_diffusion() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        measured, weights, file = pool.submit(bytes_a_weight).result()
    place = torch.cuda.get_device_name() if ON_GPU else "CPU"
    what = f"SalUn, bytes a weight, {weights / 1e6:.0f} M in bfloat16 on {place}; file {file:.3f}"
    report(what, f"{measured:.1f}", "8 for the mask alone", f"{measured / 8:.2f}x", "< 20")
    assert weights > 850e6
    assert file < 0.13
    assert measured < 20
