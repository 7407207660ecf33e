"""Text-to-image pipelines: what the module does with them is what plain diffusers does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from lightning.pytorch import LightningDataModule
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from salun_lightning.data import DigitPromptsDataModule, ForgetConcepts, ForgetRetainDataModule, ImageTensors
from salun_lightning.methods import FineTune, Remap
from salun_lightning.modules.sampling import Sampling, generators, noise_of
from salun_lightning.modules.text_to_image import TextToImage
from salun_lightning.networks.text_to_image import embed, read_text_to_image, small_text_to_image
from salun_lightning.saliency import SaliencyMasking
from tests.modules.small_runs import same, trainer, weights

WORDS = "a photo of an beside zero one two three four five six seven eight nine"
PROMPTS = ["a cat", "a dog", "a cat beside a dog"]
TARGETS, NUMBERS = torch.tensor([0, 2, 1]), torch.tensor([0, 0, 4])


def digits(**kwargs: Any) -> DigitPromptsDataModule:
    return DigitPromptsDataModule(pairs=40, forget=ForgetConcepts({"a seven": "an eight"}), batch_size=32, **kwargs)


def text_encoder(kind: Any, tokenizer: Any) -> Any:
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length, projection_dim=8, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def stable_diffusion(kind: str, prediction: str = "epsilon") -> DiffusionPipeline:
    """A tiny pipeline with the parts of Stable Diffusion 1 and 2, or of XL: two text encoders and added conditions."""
    torch.manual_seed(0)
    tokenizer = small_text_to_image("a cat dog beside", 5).tokenizer
    width = {"1": 16, "xl": 32}[kind]
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + 8,
    }
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width, attention_head_dim=4, **(added if kind == "xl" else {}),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, sample_size=16,
    )  # fmt: skip
    parts = {
        "vae": vae,
        "text_encoder": text_encoder(CLIPTextModel, tokenizer),
        "tokenizer": tokenizer,
        "unet": unet,
        "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1, prediction_type=prediction),
    }
    if kind == "xl":
        return StableDiffusionXLPipeline(
            **parts, text_encoder_2=text_encoder(CLIPTextModelWithProjection, tokenizer), tokenizer_2=tokenizer
        )
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


class Photos(ForgetRetainDataModule):
    """Six random images of three prompts."""

    def __init__(self, **kwargs: Any) -> None:
        draw = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=draw)
        forget = ForgetConcepts({"dog": "cat"})
        super().__init__(forget, ImageTensors(images, torch.arange(6) % 3), class_names=PROMPTS, batch_size=2, **kwargs)


def started(module: TextToImage, data: LightningDataModule, folder: Path) -> TextToImage:
    trainer(folder).test(module, datamodule=data, verbose=False)
    return module.eval()


def drawn(pipeline: Any, module: TextToImage, prompts: list[str]) -> torch.Tensor:
    """What plain diffusers draws from the noise that belongs to conditions and numbers."""
    noise = noise_of(generators(TARGETS, NUMBERS, 0), module.latent_shape, torch.device("cpu"))
    pipeline.set_progress_bar_config(disable=True)
    asked = [prompts[target] for target in TARGETS]
    images = pipeline(asked, latents=noise, num_inference_steps=3, guidance_scale=3.0, output_type="pt").images
    return images


@pytest.mark.parametrize(("kind", "prediction"), [("1", "epsilon"), ("1", "v_prediction"), ("xl", "epsilon")])
def test_it_draws_what_plain_diffusers_draws(kind: str, prediction: str, tmp_path: Path) -> None:
    module = TextToImage(stable_diffusion(kind, prediction), sampling=Sampling(steps=3, guidance=3.0))
    started(module, Photos(), tmp_path)
    module.save_pretrained(tmp_path / "pipeline")
    expected = drawn(DiffusionPipeline.from_pretrained(tmp_path / "pipeline"), module, PROMPTS)
    torch.testing.assert_close(module.sample(TARGETS, NUMBERS), expected, atol=1e-5, rtol=0)
    assert expected.shape == (3, 3, 16, 16)


def test_the_small_pipeline_draws_what_plain_diffusers_draws(tmp_path: Path) -> None:
    data = digits()
    data.setup()
    module = TextToImage(small_text_to_image(WORDS), sampling=Sampling(steps=3, guidance=3.0))
    started(module, data, tmp_path)
    module.save_pretrained(tmp_path / "pipeline")
    expected = drawn(DiffusionPipeline.from_pretrained(tmp_path / "pipeline"), module, data.class_names)
    torch.testing.assert_close(module.sample(TARGETS, NUMBERS), expected, atol=1e-5, rtol=0)
    images = torch.rand(2, 1, 8, 16)
    torch.testing.assert_close(module.encode(images), 2 * images - 1, atol=1e-6, rtol=0)
    torch.testing.assert_close(module.decode(module.encode(images)), images, atol=5e-4, rtol=0)  # a tenth of it in tanh


def test_a_word_is_a_token(tmp_path: Path) -> None:
    data = digits()
    data.setup()
    tokenizer = small_text_to_image(WORDS).tokenizer
    words = {word for prompt in data.class_names for word in prompt.split()}
    assert all(len(tokenizer(word)["input_ids"]) == 3 for word in words)
    assert len({tokenizer(word)["input_ids"][1] for word in words}) == len(words)


def test_the_weights_of_the_unet_alone_are_trained_and_saved(tmp_path: Path) -> None:
    module = TextToImage(stable_diffusion("1"), method=FineTune(order="all"))
    before = {name: weights(part) for name, part in module.pipeline.components.items() if name in ("vae", "text_encoder")}
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, datamodule=Photos())
    run.save_checkpoint(tmp_path / "last.ckpt")
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert kept.keys() == {f"network.{name}" for name in module.network.state_dict()}
    assert not same(weights(module.network), weights(stable_diffusion("1").unet))
    for name, untouched in before.items():
        assert same(weights(module.pipeline.components[name]), untouched)
        assert not any(weight.requires_grad for weight in module.pipeline.components[name].parameters())


def test_a_concept_is_remapped_to_its_anchor_under_a_mask(tmp_path: Path) -> None:
    pipeline = stable_diffusion("1")
    original = weights(pipeline.unet)
    module = TextToImage(pipeline, method=Remap(to="anchor"), sampling=Sampling(guidance=3.0))
    masking = SaliencyMasking(0.5)
    trainer(tmp_path, max_epochs=1, callbacks=[masking]).fit(module, datamodule=Photos())
    moved = {name: (tensor != original[name]) for name, tensor in weights(module.network).items()}
    assert 0 < sum(int(where.sum()) for where in moved.values()) <= sum(int(allowed.sum()) for allowed in masking.mask.values())
    for name, allowed in masking.mask.items():
        assert not (moved[name.removeprefix("network.")] & ~allowed).any()
    prompts = [*PROMPTS, "", "a cat beside a cat"]
    assert module.anchors(torch.arange(3)).tolist() == [0, 0, 4]
    torch.testing.assert_close(module.embedded.tokens, embed(pipeline, prompts, torch.device("cpu")).tokens)


def test_the_loss_of_a_timestep_is_weighted() -> None:
    plain, weighted = (TextToImage(small_text_to_image("a"), min_snr=gamma) for gamma in (None, 2.0))
    assert plain.min_snr is None
    from salun_lightning.modules.noise import min_snr_weights

    timesteps = torch.tensor([0, 400, 999])
    kept = weighted.process.alphas_cumprod[timesteps]
    ratio = kept / (1 - kept)
    expected = [min(value, 2.0) / value for value in ratio.tolist()]
    assert min_snr_weights(weighted.process, timesteps, 2.0).tolist() == pytest.approx(expected)
    assert expected[0] < 0.01
    assert expected[2] == 1


def saved(folder: Path, **index: Any) -> Path:
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "SomePipeline", **index}))
    return folder


def test_what_is_no_such_pipeline_is_refused_in_a_sentence(tmp_path: Path) -> None:
    flux = saved(tmp_path / "flux", transformer=["diffusers", "FluxTransformer2DModel"])
    with pytest.raises(ValueError, match=r"has a transformer in the place of a UNet\. .* not served yet"):
        read_text_to_image(flux)
    unconditional = saved(tmp_path / "ddpm", unet=["diffusers", "UNet2DModel"])
    with pytest.raises(ValueError, match=r"is no text-to-image pipeline: it needs .*, and has unet \(UNet2DModel\)\."):
        read_text_to_image(unconditional)
    with pytest.raises(ValueError, match="cannot be read as a text-to-image pipeline"):
        read_text_to_image(tmp_path / "nowhere")
    stable_diffusion("1").save_pretrained(tmp_path / "damaged")
    weights_file = tmp_path / "damaged" / "unet" / "diffusion_pytorch_model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read as a text-to-image pipeline"):
        read_text_to_image(tmp_path / "damaged")


def test_prompts_that_do_not_fit_are_refused() -> None:
    pipeline = small_text_to_image("a cat dog beside", 5)
    with pytest.raises(
        ValueError, match=r"The prompt 'a cat beside .*' has 8 tokens, .* and the tokenizer takes 7\. Shorten it"
    ):
        embed(pipeline, ["a cat beside a dog a"], torch.device("cpu"))
