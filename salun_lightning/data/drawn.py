"""Training images that a pipeline draws itself."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from salun_lightning.data.order import epoch_seed
from salun_lightning.files import digest, read_json, whole, write_json

_SETTINGS = "drawn.json"
TABLE = "metadata.csv"


@dataclass(frozen=True)
class DrawnImages:
    """Images that a text-to-image pipeline draws of some prompts, as SalUn makes them of "a photo of a nude person".

    Each comes from noise of its own, which its prompt, its number and the seed fix. What was drawn stays: a call that was
    broken off goes on where it was, and one that finds everything there does nothing. No safety checker blackens them.

    Args:
        pipeline: See ``TextToImage``.
        prompts: How many images of each prompt.
        steps: The number of steps.
        guidance: Scale of classifier-free guidance, in the convention of diffusers.
        batch_size: How many images are drawn at a time.
        seed: Another seed draws others.

    Raises:
        ValueError: No prompt is given, or a number is not positive.
    """

    pipeline: str
    prompts: Mapping[str, int]
    steps: int = 50
    guidance: float = 7.5
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise ValueError("No prompt is given that images could be drawn of.")
        for name, number in {"steps": self.steps, "batch_size": self.batch_size, **self.prompts}.items():
            if number < 1:
                raise ValueError(f"{name} must be positive, got {number}.")

    def draw(self, folder: Path, device: torch.device | None = None) -> None:
        """Draw what is not there yet, and write the table ``metadata.csv`` of all.

        Args:
            folder: Where the images go.
            device: Where they are drawn; by default on a GPU, if there is one.

        Raises:
            ValueError: Images of other settings lie there, or the pipeline cannot be read.
        """
        settings = {name: vars(self)[name] for name in ("pipeline", "steps", "guidance", "seed")}
        noted = folder / _SETTINGS
        if noted.is_file() and (before := read_json(noted)) != settings:
            raise ValueError(
                f"'{folder}' holds images that were drawn with {_told(before)}, and now it is {_told(settings)}. Give another"
                " folder."
            )
        wanted = [
            (number, prompt, folder / f"{digest(prompt)}-{number:05d}.png")
            for prompt, count in self.prompts.items()
            for number in range(count)
        ]
        missing = [one for one in wanted if not one[2].is_file()]
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(noted, settings)
            self._draw(missing, device or torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        rows = [(path.name, prompt) for _, prompt, path in wanted]
        with whole(folder / TABLE) as unfinished, unfinished.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("file_name", "text"), *rows])

    def _draw(self, missing: list[tuple[int, str, Path]], device: torch.device) -> None:
        from salun_lightning.networks.text_to_image import text_to_image  # nothing else here knows of models

        pipeline: Any = text_to_image(self.pipeline).to(device)
        pipeline.set_progress_bar_config(disable=True)
        batches = [missing[start : start + self.batch_size] for start in range(0, len(missing), self.batch_size)]
        for batch in tqdm(batches, desc="Drawing images", unit="batch"):
            noise = [torch.Generator().manual_seed(self._seed(prompt, number)) for number, prompt, _ in batch]
            images = pipeline(
                [prompt for _, prompt, _ in batch],
                num_inference_steps=self.steps,
                guidance_scale=self.guidance,
                generator=noise,
            ).images
            for image, (_, _, path) in zip(images, batch, strict=True):
                with whole(path) as unfinished:
                    image.save(unfinished, format="PNG")

    def _seed(self, prompt: str, number: int) -> int:
        return epoch_seed(self.seed, int(digest(prompt), 16) % 1_000_003, number)


def _told(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())
