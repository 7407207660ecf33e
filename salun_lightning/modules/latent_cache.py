"""Latents that are kept on disk, so that a VAE sees each image once."""

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from salun_lightning.files import digest, whole
from salun_lightning.weights import bits_of, fingerprint


class LatentCache:
    """Keeps latents by what they are made from: in a folder for each VAE, a file for each image.

    The name of a file comes from the pixels, so an image that was changed, or cropped in another way, is another image. Any
    number of processes and runs may share the folder. A latent of Stable Diffusion takes 64 KiB at 512 x 512 pixels. Files lie
    in 256 folders, because looking for what a dead process left behind takes time where many lie.

    Args:
        folder: Where.
        vae: What makes the latents.
        settings: What else these depend on.
    """

    def __init__(self, folder: str | os.PathLike[str], vae: nn.Module, *settings: object) -> None:
        self.folder = Path(folder) / digest([fingerprint(vae.state_dict().items()), *map(str, settings)])

    def latents(self, images: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """The latents of images (B, C, H, W), of which those that are not there yet are made, and kept.

        Args:
            images: On any device, on which the latents come back.
            encode: Makes the latents of a batch of images.

        Raises:
            ValueError: A file is damaged.
        """
        paths = [self.folder / key[-2:] / f"{key}.safetensors" for key in keys(images)]
        missing = [row for row, path in enumerate(paths) if not path.is_file()]
        if missing:
            for row, latent in zip(missing, encode(images[missing]).cpu(), strict=True):
                with whole(paths[row]) as unfinished:
                    save_file({"latent": latent.contiguous()}, unfinished)
        return torch.stack([_read(path) for path in paths]).to(images.device)


def keys(images: Tensor) -> list[str]:
    """A name for each image (B, C, H, W), of 128 bits that its pixels and their places make."""
    bits = bits_of(images.contiguous()).flatten(1).long()
    sums = [
        [f"{number % 2**64:016x}" for number in (bits * factors).sum(1).tolist()]
        for factors in _factors(bits.shape[1], bits.device)
    ]
    shape = "x".join(map(str, images.shape[1:]))
    return [f"{shape}-{first}{second}" for first, second in zip(*sums, strict=True)]


@lru_cache(maxsize=2)  # each batch asks for the same ones, as large as images
def _factors(count: int, device: torch.device) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(-(2**63), 2**63 - 1, (2, count), generator=draw).to(device)


def _read(path: Path) -> Tensor:
    try:
        return load_file(path)["latent"]
    except Exception as error:
        raise ValueError(f"'{path}' cannot be read as a latent: {error}. Delete it: it is made again.") from error
