"""A diffusion model that is told something else than classes, in a space that is not that of pixels, is four hooks away."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional

from salun_lightning.callbacks import GenerationEvaluator
from salun_lightning.methods import ESD, FineTune, Method, Remap, SelectiveAmnesia
from salun_lightning.modules.diffusion import Diffusion
from salun_lightning.modules.sampling import Sampling
from salun_lightning.networks.frozen import Frozen
from salun_lightning.saliency import SaliencyMasking
from tests.modules.small_diffusion import CLASSES, adam, images, noise_schedule, some_samples
from tests.modules.small_runs import same, trainer, weights
from tests.saliency.helpers import assert_frozen, copied

RATIO = 0.3


class Mixing(nn.Module):
    """In the place of a VAE: four neighbouring pixels make four channels, and are mixed."""

    def __init__(self) -> None:
        super().__init__()
        mix, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))
        self.mix = nn.Parameter(mix)

    def encode(self, images: Tensor) -> Tensor:
        return torch.einsum("oc,bchw->bohw", self.mix, functional.pixel_unshuffle(images, 2))

    def decode(self, latents: Tensor) -> Tensor:
        return functional.pixel_shuffle(torch.einsum("oc,bohw->bchw", self.mix, latents), 2)


class TableDiffusion(Diffusion):
    """Told a row of a table of embeddings, as a pipeline that is told prompts is; the last row stands for none."""

    table: Tensor

    def __init__(self, **kwargs: Any) -> None:
        torch.manual_seed(0)
        network = UNet2DConditionModel(
            sample_size=4,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(4, 8),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=6,
            attention_head_dim=2,
        )
        sampling = Sampling(steps=3, guidance=2.0)
        super().__init__(network, noise_schedule(), **{"optimizer": adam, "sampling": sampling, "label_dropout": 0.2, **kwargs})
        self.null = CLASSES
        self.vae = Frozen(Mixing())
        self.register_buffer("table", torch.randn(CLASSES + 1, 5, 6), persistent=False)

    def encode(self, images: Tensor) -> Tensor:
        latents: Tensor = self.vae.network.encode(2 * images - 1)
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        pixels: Tensor = self.vae.network.decode(latents)
        return (pixels + 1) / 2

    def predict(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, conditions: Tensor) -> Tensor:
        rows = self.table[conditions].to(noisy.dtype)
        prediction: Tensor = network(noisy, timesteps, encoder_hidden_states=rows, return_dict=False)[0]
        return prediction


METHODS = [FineTune(), Remap(), ESD(steps=3), SelectiveAmnesia(images=1, timesteps=1)]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_it_trains_under_a_mask(tmp_path: Path, method: Method) -> None:
    module, callback = TableDiffusion(method=method), SaliencyMasking(RATIO)
    original = copied(module)
    runner = trainer(tmp_path, max_epochs=1, callbacks=[callback])
    runner.fit(module, datamodule=images(size=8))
    assert set(callback.mask) == set(dict(module.network.named_parameters()))
    assert_frozen(original, copied(module), callback.mask)
    assert not same(copied(module), original)
    runner.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == {f"network.{name}" for name in module.network.state_dict()}


def test_the_loss_is_that_of_latents_and_rows() -> None:
    module, samples = TableDiffusion().eval(), some_samples(5, size=8)
    torch.manual_seed(3)
    noisy, timesteps, noise = module.noised(samples)
    torch.manual_seed(3)
    loss = module.task_loss(samples)
    assert noisy.shape == (5, *module.latent_shape) == (5, 4, 4, 4)
    alpha = (1 - torch.linspace(1e-4, 0.02, 20)).cumprod(0)[timesteps].view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy, alpha.sqrt() * module.encode(samples.inputs) + (1 - alpha).sqrt() * noise)
    told = module.table[samples.targets]
    prediction = module.network(noisy, timesteps, encoder_hidden_states=told).sample
    torch.testing.assert_close(loss, (prediction - noise).square().mean())
    none = module.network(noisy, timesteps, encoder_hidden_states=module.table[[CLASSES] * 5]).sample
    torch.testing.assert_close(module.denoise(noisy, timesteps), none)
    torch.testing.assert_close(module.guided(noisy, timesteps, samples.targets), none + 2 * (prediction - none))


def test_images_are_decoded_from_latents() -> None:
    module = TableDiffusion().eval()
    pixels = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(module.decode(module.encode(pixels)), pixels)
    drawn = module.sample(torch.tensor([0, 1]), torch.tensor([4, 0]))
    assert drawn.shape == (2, 1, 8, 8)
    assert (drawn.min() >= 0) & (drawn.max() <= 1)
    torch.testing.assert_close(module.sample(torch.tensor([0]), torch.tensor([4])), drawn[:1], rtol=0, atol=1e-4)


def test_it_is_measured_and_predicts(tmp_path: Path) -> None:
    module = TableDiffusion(evaluation=GenerationEvaluator(4, features=nn.Flatten()))
    before = weights(module)
    runner, data = trainer(tmp_path), images(size=8)
    results = runner.test(module, datamodule=data, verbose=False)[0]
    assert (results["num_generated"], results["num_real"]) == (8, 20)
    assert {"FID", "test/forget/loss"} <= runner.callback_metrics.keys()
    batches = runner.predict(module, datamodule=data)
    assert torch.cat([batch["image"] for batch in batches]).shape == (12, 1, 8, 8)
    assert same(weights(module), before)
