"""Latents on disk: the VAE sees each image once, and what comes out is what it would make."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from salun_lightning.data import Samples
from salun_lightning.methods import FineTune
from salun_lightning.modules.latent_cache import LatentCache, keys
from salun_lightning.modules.text_to_image import TextToImage
from salun_lightning.saliency import SaliencyMasking
from tests.modules.small_runs import trainer, weights
from tests.modules.test_text_to_image import Photos, stable_diffusion


class Encoder(torch.nn.Module):
    """Counts what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2, 3))
        self.shown = 0

    def forward(self, images: Tensor) -> Tensor:
        self.shown += len(images)
        return torch.einsum("dc,bchw->bdhw", self.weight, images).detach()


def test_each_image_is_encoded_once_whatever_batch_it_is_in(tmp_path: Path) -> None:
    encoder, images = Encoder(), torch.rand(6, 3, 4, 4)
    expected = Encoder()(images)
    for rows in ([0, 1, 2], [2, 1, 5], [3, 4], [5, 4, 3, 2, 1, 0]):
        cache = LatentCache(tmp_path, encoder)  # as another run would open it
        torch.testing.assert_close(cache.latents(images[rows], encoder), expected[rows], atol=0, rtol=0)
    assert encoder.shown == 6
    (folder,) = tmp_path.iterdir()
    assert len([*folder.glob("??/*.safetensors")]) == 6


def test_another_image_or_another_vae_has_another_latent(tmp_path: Path) -> None:
    image = torch.rand(1, 3, 4, 6)
    one_bit = image.clone()
    one_bit.view(torch.int32)[0, 1, 2, 3] ^= 1
    others = [image.flip(3), image.flip(1), image.transpose(2, 3), image.reshape(1, 3, 6, 4), one_bit, image * 2]
    names = [keys(other)[0] for other in [image, *others]]
    assert len({*names}) == 7
    assert keys(image.to(memory_format=torch.channels_last)) == names[:1]
    assert keys(torch.cat([one_bit, image])) == [names[5], names[0]]
    first, second = Encoder(), Encoder()
    second.weight.data[0, 0] = 2
    for encoder, settings in ((first, ()), (second, ()), (first, ("scaled",))):
        cache = LatentCache(tmp_path, encoder, *settings)
        assert torch.equal(cache.latents(image, encoder), encoder(image))
    assert len([*tmp_path.iterdir()]) == 3


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    cache, image = LatentCache(tmp_path, Encoder()), torch.rand(1, 3, 4, 4)
    cache.latents(image, Encoder())
    (file,) = cache.folder.glob("??/*")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"'.*\.safetensors' cannot be read as a latent: .*\. Delete it: it is made again\."):
        cache.latents(image, Encoder())


def test_a_run_with_latents_on_disk_is_the_run_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saliency pass and two epochs: six images, each seen by the VAE once, in the second run none."""
    shown: list[int] = []
    encode = TextToImage._encoded

    def noted(self: TextToImage, images: Tensor) -> Tensor:
        shown.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(TextToImage, "_encoded", noted)
    found, counts = [], []
    for number, folder in enumerate([None, tmp_path / "latents", tmp_path / "latents"]):
        module, masking = TextToImage(stable_diffusion("1"), method=FineTune(order="all"), latents=folder), SaliencyMasking(0.5)
        torch.manual_seed(1)
        run = trainer(tmp_path / str(number), callbacks=[masking], max_epochs=2)
        run.fit(module, datamodule=Photos())
        assert masking.mask is not None
        found.append((weights(module.network), masking.mask))
        counts.append(sum(shown))
        shown.clear()
    assert counts == [16, 6, 0]  # four that are forgotten, and six in each epoch
    for after, mask in found[1:]:
        assert mask.iou(found[0][1]) > 0.999  # another batch of the VAE, another last bit
        differing = [((tensor - found[0][0][name]).abs() > 1e-5).float().mean().item() for name, tensor in after.items()]
        assert max(differing) < 0.05
    latents = module.encode(torch.rand(2, 3, 16, 16))
    assert latents.shape == (2, 4, 8, 8)
    assert module.losses(Samples(torch.rand(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64), torch.arange(2))).shape == (2,)
