"""Text-to-image pipelines of diffusers: how they are read, how prompts become embeddings, and a small one to train."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from salun_lightning.networks.pipeline import reason, silent_diffusers

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

_CHUNK = 64  # prompts that are embedded at a time


class Embedded(NamedTuple):
    """What the text encoders of a pipeline make of prompts."""

    tokens: Tensor
    """For cross-attention, (P, L, D)."""
    pooled: Tensor | None
    """Of each prompt as a whole, (P, E); with Stable Diffusion XL."""


def text_to_image(source: "str | os.PathLike[str] | DiffusionPipeline") -> "DiffusionPipeline":
    """Read a text-to-image pipeline with a UNet: Stable Diffusion 1, 2 or XL, or what is built like them.

    No pickle is executed. A safety checker is left out: it would blacken images that are to be measured. All weights become
    float32, whatever they were stored in: the precision of training is the trainer's.

    Args:
        source: A directory, the name of a pipeline on the hub of Hugging Face, or a pipeline that is there already.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        ValueError: It is no such pipeline, or cannot be read.
    """
    need_transformers("Text-to-image pipelines need")
    import diffusers
    from safetensors import SafetensorError

    if isinstance(source, diffusers.DiffusionPipeline):
        kinds = {name: type(part).__name__ for name, part in source.components.items() if part is not None}
        _check_parts("The pipeline", type(source).__name__, kinds)
        return _served(source)
    try:
        with silent_diffusers():
            index = diffusers.DiffusionPipeline.load_config(source)
            _check_parts(str(source), index["_class_name"], _kinds(index))
            left_out = {"safety_checker": None} if "safety_checker" in index else {}
            read = diffusers.DiffusionPipeline.from_pretrained(source, use_safetensors=True, **left_out)
    except (OSError, RuntimeError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"'{source}' cannot be read as a text-to-image pipeline: {reason(error)}. Give a directory that diffusers has"
            " saved with safe_serialization=True, or a name on the hub that can be reached."
        ) from error
    return _served(read)


def _served(pipeline: Any) -> Any:
    """The pipeline in float32, if its parts are understood."""
    told, made = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
    if told != made:
        raise ValueError(
            f"The UNet of the pipeline takes {told} channels, and the latents have {made}: it is told more than a prompt, such"
            " as an image to change. Give a pipeline that is told prompts alone."
        )
    if not hasattr(pipeline.scheduler, "alphas_cumprod"):
        raise ValueError(
            f"The pipeline samples with {type(pipeline.scheduler).__name__}, from another kind of process than that of Stable"
            " Diffusion: it has no variance schedule (alphas_cumprod). Such pipelines are not served."
        )
    if any(pipeline.vae.config.get(name) for name in ("latents_mean", "latents_std", "shift_factor")):
        raise ValueError("The VAE of the pipeline shifts its latents (latents_mean, shift_factor). Such ones are not served.")
    if len(pipeline.tokenizer) <= len(pipeline.tokenizer.all_special_ids):
        raise ValueError("The tokenizer of the pipeline knows no words: its vocabulary is missing.")
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.float()
    return pipeline


def _kinds(index: Mapping[str, Any]) -> dict[str, str]:
    """The classes of the parts that model_index.json names."""
    parts = {name: part for name, part in index.items() if isinstance(part, list | tuple) and len(part) == 2}
    return {name: kind for name, (_, kind) in parts.items() if kind}


def _check_parts(name: str, kind: str, parts: Mapping[str, str]) -> None:
    if "unet" not in parts and "transformer" in parts:
        raise ValueError(
            f"'{name}' is a {kind}, which has a transformer in the place of a UNet. Such pipelines (Stable Diffusion 3, Flux)"
            " are not served yet: give one of Stable Diffusion 1, 2 or XL."
        )
    if parts.get("unet") != "UNet2DConditionModel" or not {"vae", "tokenizer", "text_encoder"} <= parts.keys():
        has = ", ".join(sorted(f"{part} ({of})" for part, of in parts.items())) or "nothing"
        raise ValueError(
            f"'{name}' is no text-to-image pipeline: it needs a UNet2DConditionModel, a VAE, a tokenizer and a text encoder,"
            f" and has {has}."
        )


def need_transformers(what: str) -> None:
    """Refuse to go on without transformers.

    Args:
        what: What needs it, as a sentence begins.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    try:
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{what} transformers. Install it: pip install 'salun_lightning[text]'.") from error


def embed(pipeline: Any, prompts: Sequence[str], device: torch.device) -> Embedded:
    """Embed prompts once and for all, with the text encoders of a pipeline.

    The empty prompt is what the pipeline guides with: nothing but zeros with Stable Diffusion XL.

    Args:
        pipeline: The pipeline, whose text encoders lie on ``device``.
        prompts: The prompts.
        device: Where.

    Raises:
        ValueError: A prompt is longer than the tokenizer takes: what stands behind would be cut off without a word.
    """
    for prompt in prompts:
        count = len(pipeline.tokenizer(prompt, truncation=False)["input_ids"])
        if count > pipeline.tokenizer.model_max_length:
            raise ValueError(
                f"The prompt '{prompt[:60]}' has {count} tokens, start and end included, and the tokenizer takes"
                f" {pipeline.tokenizer.model_max_length}. Shorten it."
            )
    made = []
    with torch.no_grad(), torch.autocast(device.type, enabled=False):  # they are kept, whoever asks first
        for start in range(0, len(prompts), _CHUNK):
            made.append(
                pipeline.encode_prompt(
                    [*prompts[start : start + _CHUNK]],
                    device=device,
                    num_images_per_prompt=1,
                    do_classifier_free_guidance=False,
                )
            )
    pooled = torch.cat([part[2] for part in made]).float() if len(made[0]) > 2 else None  # as SDXL returns them
    embedded = Embedded(torch.cat([part[0] for part in made]).float(), pooled)
    if getattr(pipeline.config, "force_zeros_for_empty_prompt", False):
        for part in embedded:
            if part is not None:
                part[[number for number, prompt in enumerate(prompts) if not prompt]] = 0.0
    return embedded


def tokens_of(tokenizer: Any, prompt: str, end: int, start: int = 0) -> range:
    """Which tokens of a prompt stand for its characters from ``start`` up to ``end``, where words begin and end.

    Args:
        tokenizer: It puts one token in front of each prompt and one behind it.
        prompt: The prompt.
        end: Where the last word ends.
        start: Where the first word begins.
    """
    first, behind = (len(tokenizer(prompt[:place])["input_ids"]) - 1 for place in (start, end))
    return range(first, behind)


def small_text_to_image(
    words: str, length: int = 8, height: int = 8, width: int = 16, seed: int = 0
) -> "StableDiffusionPipeline":
    """A text-to-image pipeline with random weights, small enough to be trained on a CPU in minutes.

    It has the parts of Stable Diffusion. The VAE does nothing: latents are grey images, in [-1, 1]. The tokenizer makes one
    token of each word. The text encoder stays as it is drawn: what a token is, and where it stands, can be read off its
    answers, and that is enough for the UNet to learn what is meant.

    Args:
        words: The words of all prompts that it will be given, with spaces between them.
        length: How many words a prompt may have.
        height: Height of the images.
        width: Width of the images.
        seed: Of the weights.

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    need_transformers("Text-to-image pipelines need")
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = _word_tokenizer(words, length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=tokenizer.model_max_length,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=(height, width),
            in_channels=1,
            out_channels=1,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=64,
            attention_head_dim=4,
            norm_num_groups=8,
        )
    return StableDiffusionPipeline(
        vae=_idle_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _idle_vae() -> Any:
    """An autoencoder of diffusers whose latents are the grey images themselves.

    It is two linear convolutions each way. Its decoder begins with a tanh, so what it is handed is a tenth of the image, where
    tanh is straight; the scaling factor of the pipeline makes up for that.
    """
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny(
        in_channels=1,
        out_channels=1,
        latent_channels=1,
        encoder_block_out_channels=(1,),
        decoder_block_out_channels=(1,),
        num_encoder_blocks=(0,),
        num_decoder_blocks=(0,),
        scaling_factor=10.0,
    )
    convolutions = [child for child in vae.modules() if isinstance(child, torch.nn.Conv2d)]
    # it turns [-1, 1] into [0, 1] before the first, and back behind the last
    for convolution, (factor, offset) in zip(convolutions, [(1.0, 0.0), (0.2, -0.1), (5.0, 0.5), (1.0, 0.0)], strict=True):
        for weight in convolution.parameters():
            torch.nn.init.zeros_(weight)
        with torch.no_grad():
            convolution.weight[0, 0, 1, 1] = factor
            if convolution.bias is not None:
                convolution.bias.fill_(offset)
    return vae


def _word_tokenizer(words: str, length: int) -> Any:
    """A tokenizer of CLIP that knows these words alone, each as one token, and takes prompts of so many words."""
    from transformers import AddedToken, CLIPTokenizer

    with TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1}', encoding="utf-8")
        Path(folder, "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
        tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=2 + length)
    tokenizer.add_tokens([AddedToken(word, single_word=True) for word in dict.fromkeys(words.split())])
    return tokenizer
