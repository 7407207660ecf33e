"""Text-to-image pipelines: what the module does with them is what plain diffusers does."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from lightning.pytorch import LightningDataModule
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from salun_lightning.callbacks import GenerationEvaluator
from salun_lightning.cli import main
from salun_lightning.data import DigitPromptsDataModule, ForgetConcepts, ForgetRetainDataModule, ImageTensors, Samples
from salun_lightning.evidence.measures import composition
from salun_lightning.methods import FineTune, Remap
from salun_lightning.modules.noise import min_snr_weights
from salun_lightning.modules.sampling import Sampling, generators, noise_of
from salun_lightning.modules.text_to_image import TextToImage
from salun_lightning.networks import SmallResNet
from salun_lightning.networks.pipeline import read_pipeline
from salun_lightning.networks.text_to_image import embed, small_text_to_image, text_to_image
from salun_lightning.saliency import SaliencyMasking
from tests.modules.small_diffusion import adamw, unet
from tests.modules.small_runs import same, trainer, weights

WORDS = "a an beside in ink zero one two three four five six seven eight nine"
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


def stable_diffusion(
    kind: str, prediction: str = "epsilon", words: str = "a cat dog beside", length: int = 5
) -> DiffusionPipeline:
    """A tiny pipeline with the parts of Stable Diffusion 1, 2 (heads of one width, linear projections) or XL.

    The last one also has two text encoders, added conditions, and several transformer blocks in a row.
    """
    torch.manual_seed(0)
    tokenizer = small_text_to_image(words, length).tokenizer
    added: dict[str, Any] = {"attention_head_dim": 4} if kind == "1" else {"attention_head_dim": (2, 4)}
    if kind != "1":
        added |= {"use_linear_projection": True}
    if kind == "xl":
        added |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + 8,
            "transformer_layers_per_block": (1, 2),
        }
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32 if kind == "xl" else 16, **added,
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

    def __init__(self, concepts: dict[str, str] | None = None, **kwargs: Any) -> None:
        draw = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=draw)
        forget = ForgetConcepts(concepts or {"dog": "cat"})
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


@pytest.mark.parametrize(("kind", "prediction"), [("1", "epsilon"), ("2", "epsilon"), ("2", "v_prediction"), ("xl", "epsilon")])
def test_it_draws_what_plain_diffusers_draws(kind: str, prediction: str, tmp_path: Path) -> None:
    module = TextToImage(stable_diffusion(kind, prediction), sampling=Sampling(steps=3, guidance=3.0))
    started(module, Photos(), tmp_path)
    module.save_pretrained(tmp_path / "pipeline")
    expected = drawn(DiffusionPipeline.from_pretrained(tmp_path / "pipeline"), module, PROMPTS)
    torch.testing.assert_close(module.sample(TARGETS, NUMBERS), expected, atol=1e-5, rtol=0)
    assert expected.shape == (3, 3, 16, 16)


@pytest.mark.parametrize("kind", [PNDMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_it_draws_as_ddim_whatever_scheduler_a_pipeline_comes_with(kind: Any, tmp_path: Path) -> None:
    pipeline: Any = stable_diffusion("1")
    extra = {"skip_prk_steps": True, "set_alpha_to_one": False} if kind is PNDMScheduler else {}
    pipeline.scheduler = kind(beta_schedule="scaled_linear", steps_offset=1, **extra)
    module = started(TextToImage(pipeline, sampling=Sampling(steps=3, guidance=3.0)), Photos(), tmp_path)
    module.save_pretrained(tmp_path / "pipeline")
    plain: Any = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert type(plain.scheduler) is kind
    plain.scheduler = DDIMScheduler.from_config(plain.scheduler.config, clip_sample=False)
    torch.testing.assert_close(module.sample(TARGETS, NUMBERS), drawn(plain, module, PROMPTS), atol=1e-5, rtol=0)


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


def test_a_word_is_a_token_with_the_same_number_in_every_process(tmp_path: Path) -> None:
    pipeline = small_text_to_image(WORDS)
    pipeline.save_pretrained(tmp_path)
    asked = "An eight beside a seven in ink"
    for tokenizer in (pipeline.tokenizer, DiffusionPipeline.from_pretrained(tmp_path).tokenizer):
        numbers = tokenizer(asked)["input_ids"]
        assert numbers == [0, *(2 + WORDS.split().index(word) for word in asked.lower().split()), 1]
    assert len({*WORDS.split()}) + 2 == len(pipeline.tokenizer)


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


def test_a_concept_is_remapped_to_its_anchor_under_a_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = stable_diffusion("1")
    original = weights(pipeline.unet)
    module = TextToImage(pipeline, method=Remap(to="anchor"), sampling=Sampling(guidance=3.0))
    masking, asked, denoise = SaliencyMasking(0.5), set(), module.denoise

    def watched(noisy: Any, timesteps: Any, targets: Any = None, original: bool = False) -> Any:
        if original:
            asked.update(zip(forgotten[-1], targets.tolist(), strict=True))
        forgotten.append([] if targets is None else targets.tolist())
        return denoise(noisy, timesteps, targets, original)

    forgotten: list[list[int]] = []
    wanted = module.anchors
    monkeypatch.setattr(module, "anchors", lambda targets: (forgotten.append(targets.tolist()), wanted(targets))[1])
    monkeypatch.setattr(module, "denoise", watched)
    trainer(tmp_path, max_epochs=1, callbacks=[masking]).fit(module, datamodule=Photos())
    moved = {name: (tensor != original[name]) for name, tensor in weights(module.network).items()}
    assert 0 < sum(int(where.sum()) for where in moved.values()) <= sum(int(allowed.sum()) for allowed in masking.mask.values())
    for name, allowed in masking.mask.items():
        assert not (moved[name.removeprefix("network.")] & ~allowed).any()
    assert asked == {(1, 0), (2, 4)}
    prompts = [*PROMPTS, "", "a cat beside a cat"]
    assert module.anchors(torch.arange(3)).tolist() == [0, 0, 4]
    torch.testing.assert_close(module.embedded.tokens, embed(pipeline, prompts, torch.device("cpu")).tokens)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_of_a_timestep_is_weighted(prediction: str, tmp_path: Path) -> None:
    samples = Samples(torch.rand(6, 3, 16, 16), torch.arange(6) % 3, torch.arange(6))
    found = {}
    for gamma in (None, 2.0):
        module = started(TextToImage(stable_diffusion("1", prediction), min_snr=gamma), Photos(), tmp_path)
        torch.manual_seed(3)
        found[gamma] = module.losses(samples)
        torch.manual_seed(3)
        timesteps = module.noised(samples)[1]
    kept = module.process.alphas_cumprod[timesteps]
    ratios = (kept / (1 - kept)).tolist()
    weights = [min(ratio, 2.0) / (ratio + (prediction != "epsilon")) for ratio in ratios]
    torch.testing.assert_close(found[2.0], found[None] * torch.tensor(weights))
    assert min(ratios) < 2 < max(ratios)


def test_no_noise_at_all_is_weighted_too() -> None:
    process = DDPMScheduler(rescale_betas_zero_snr=True)
    assert min_snr_weights(process, torch.tensor([999]), 5.0).tolist() == [1]


def saved(folder: Path, **index: Any) -> Path:
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "SomePipeline", **index}))
    return folder


def test_what_is_no_such_pipeline_is_refused_in_a_sentence(tmp_path: Path) -> None:
    flux = saved(tmp_path / "flux", transformer=["diffusers", "FluxTransformer2DModel"])
    with pytest.raises(ValueError, match=r"has a transformer in the place of a UNet\. .* not served yet"):
        text_to_image(flux)
    unconditional = saved(tmp_path / "ddpm", unet=["diffusers", "UNet2DModel"])
    with pytest.raises(ValueError, match=r"is no text-to-image pipeline: it needs .*, and has unet \(UNet2DModel\)\."):
        text_to_image(unconditional)
    inpainting: Any = stable_diffusion("1")
    inpainting.unet.register_to_config(in_channels=9)
    with pytest.raises(ValueError, match=r"takes 9 channels, and the latents have 4: it is told more than a prompt"):
        TextToImage(inpainting)
    with pytest.raises(ValueError, match=r"'The pipeline' is no text-to-image pipeline: .* and has scheduler .*, unet"):
        TextToImage(DDPMPipeline(unet(), DDPMScheduler()))
    with pytest.raises(ValueError, match="cannot be read as a text-to-image pipeline"):
        text_to_image(tmp_path / "nowhere")
    for damaged in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        stable_diffusion("1").save_pretrained(tmp_path / "damaged")
        weights_file = tmp_path / "damaged" / damaged
        weights_file.write_bytes(weights_file.read_bytes()[:1000])
        with pytest.raises(ValueError, match=r"'.*/damaged' cannot be read as a text-to-image pipeline"):
            text_to_image(tmp_path / "damaged")


def test_a_pipeline_of_another_process_is_refused() -> None:
    """Its own scheduler tells; the one that draws here is made of its settings, and would hide it."""
    for scheduler in (EDMEulerScheduler(), FlowMatchEulerDiscreteScheduler()):
        other: Any = stable_diffusion("xl")
        other.scheduler = scheduler
        with pytest.raises(ValueError, match=rf"samples with {type(scheduler).__name__}, from another kind of process"):
            TextToImage(other)
    shifted: Any = stable_diffusion("1")
    shifted.vae.register_to_config(latents_mean=[0.0] * 4)
    with pytest.raises(ValueError, match="shifts its latents"):
        TextToImage(shifted)
    speechless: Any = stable_diffusion("1", words="")
    with pytest.raises(ValueError, match="knows no words: its vocabulary is missing"):
        TextToImage(speechless)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_pipeline_in_half_precision_is_trained_in_single(dtype: torch.dtype, tmp_path: Path) -> None:
    """Given or read: the steps of 1e-5 would be lost in bfloat16, and float16 would end in NaN."""
    stable_diffusion("xl").to(dtype).save_pretrained(tmp_path / "half")
    for half in (stable_diffusion("xl").to(dtype), str(tmp_path / "half")):
        module = TextToImage(half, method=Remap(to="anchor"), optimizer=lambda p: torch.optim.Adam(p, lr=1e-5))
        parts = [part for part in module.pipeline.components.values() if isinstance(part, torch.nn.Module)]
        assert len(parts) == 4
        assert {tensor.dtype for part in parts for tensor in part.parameters()} == {torch.float32}
        before = weights(module.network)
        trainer(tmp_path, max_epochs=1).fit(module, datamodule=Photos())
        moved = [float((now != before[name]).double().mean()) for name, now in weights(module.network).items()]
        assert all(torch.isfinite(now).all() for now in weights(module.network).values())
        assert sum(moved) / len(moved) > 0.9


def test_what_was_trained_in_bfloat16_is_a_pipeline_that_plain_diffusers_draws_with(tmp_path: Path) -> None:
    module = TextToImage(stable_diffusion("xl"), method=Remap(to="anchor"))
    trainer(tmp_path, max_epochs=1, precision="bf16-true").fit(module, datamodule=Photos())
    assert {weight.dtype for weight in module.network.parameters()} == {torch.bfloat16}
    module.save_pretrained(tmp_path / "pipeline")
    plain: Any = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    plain.set_progress_bar_config(disable=True)
    images = plain(["a cat"], num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 16, 16, 3)
    for name, weight in weights(module.network).items():
        assert torch.equal(weights(plain.unet)[name].bfloat16(), weight), name


def test_images_of_another_size_than_the_pipeline_draws_are_refused(tmp_path: Path) -> None:
    data = Photos()
    data.given = data.given._replace(train=ImageTensors(torch.zeros(6, 3, 8, 8, dtype=torch.uint8), torch.arange(6) % 3))
    with pytest.raises(ValueError, match=r"8 x 8 pixels, and the pipeline draws 16 x 16\. .* \(image_size: 16\)"):
        trainer(tmp_path, max_epochs=1).fit(TextToImage(stable_diffusion("1"), method=Remap(to="anchor")), datamodule=data)


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument")  # what diffusers calls
def test_a_hub_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the file that diffusers misses for it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for read in (text_to_image, read_pipeline):
        with pytest.raises(
            ValueError, match=r"'nobody/nothing' cannot be read as .*the hub .* cannot be reached, and it was not d"
        ):
            read("nobody/nothing")


def test_prompts_that_do_not_fit_are_refused() -> None:
    pipeline = small_text_to_image("a cat dog beside", 5)
    with pytest.raises(
        ValueError, match=r"The prompt 'a cat beside .*' has 8 tokens, .* and the tokenizer takes 7\. Shorten it"
    ):
        embed(pipeline, ["a cat beside a dog a"], torch.device("cpu"))


def test_a_pipeline_is_saved_and_read_without_a_word(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Where there are many, as in a comparison, bars of the parts of each would hide what is said."""
    module = TextToImage(stable_diffusion("xl"))
    capfd.readouterr()
    module.save_pretrained(tmp_path / "pipeline")
    text_to_image(tmp_path / "pipeline")
    assert capfd.readouterr() == ("", "")


def test_copies_share_what_is_frozen(tmp_path: Path) -> None:
    module = TextToImage(stable_diffusion("xl"))
    copied = copy.deepcopy(module)
    for name, part in module.pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            assert (copied.pipeline.components[name] is part) == (name != "unet")
    assert copied.pipeline.unet is copied.network
    assert copied.network is not module.network


def test_a_module_is_made_again_from_its_checkpoint(tmp_path: Path) -> None:
    module = TextToImage(stable_diffusion("1"), method=FineTune(order="all"))
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, datamodule=Photos())
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = TextToImage.load_from_checkpoint(tmp_path / "last.ckpt", pipeline=stable_diffusion("1"))
    assert same(weights(again.network), weights(module.network))
    with pytest.raises(ValueError, match=r"TextToImage.load_from_checkpoint\(path, pipeline=\.\.\.\)"):
        TextToImage.load_from_checkpoint(tmp_path / "last.ckpt")


def test_a_concept_is_forgotten_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original model is trained from random weights, and a concept forgotten in the pipeline that this leaves behind."""
    monkeypatch.chdir(tmp_path)
    once = ["--trainer.max_steps=1", "--trainer.enable_progress_bar=false", "--data.pairs=20"]
    main(["fit", "-c", "digits_text", "-c", "digits_text/original", *once])
    pipeline = tmp_path / "runs" / "digits_text" / "original" / "pipeline"
    before = weights(DiffusionPipeline.from_pretrained(pipeline).unet)
    started_from = [f"--model.pipeline={pipeline}", "--model.original=null", "--trainer.default_root_dir=erased"]
    main(["fit", "-c", "digits_text", "-c", "method/salun_concept", *started_from, *once])
    after = weights(DiffusionPipeline.from_pretrained(tmp_path / "erased" / "pipeline").unet)
    moved = sum(int((after[name] != tensor).sum()) for name, tensor in before.items())
    total = sum(tensor.numel() for tensor in before.values())
    assert 0.2 * total < moved <= total // 2
    again = TextToImage.load_from_checkpoint(tmp_path / "erased" / "checkpoints" / "last.ckpt")
    assert same(weights(again.network), after)

    asked = ["--model.evaluation.per_condition=2", "--model.evaluation.conditions=[a seven, an eight]"]
    tasks = ["-c", "digits_text", "-c", "method/salun_concept"]
    common = ["predict", *tasks, f"--model.pipeline={pipeline}", "--model.original=null", *asked, *once[1:]]
    main([*common, "--ckpt_path=original", "--trainer.default_root_dir=drawn"])  # the pipeline itself
    module = started(TextToImage(str(pipeline), sampling=Sampling(steps=10, guidance=4.0)), digits(), tmp_path / "module")
    images = (255 * module.sample(torch.tensor([7, 7]), torch.arange(2))).round()[:, 0]
    shown = np.stack([np.asarray(Image.open(f"drawn/images/7-a_seven/0000{n}.png")) for n in range(2)])
    assert np.abs(shown - images.numpy()).max() <= 1  # a batch of other images beside them rounds otherwise
    # one with random weights is none
    with pytest.raises(ValueError, match=r"^There is no original model: give its checkpoint"):
        main(["predict", "-c", "digits_text", "--model.original=null", "--ckpt_path=original"])
    compared = ["--trainer.callbacks=ImageWriter", "--trainer.callbacks.before=drawn/images"]
    main([*common, "--ckpt_path=erased/checkpoints/last.ckpt", "--trainer.default_root_dir=erased", *compared])
    grid = np.asarray(Image.open("erased/images/7-a_seven.png"))
    assert np.array_equal(grid[:8], np.asarray(Image.open("drawn/images/7-a_seven.png")))
    assert not np.array_equal(grid[:8], grid[9:])


def test_the_parts_that_prompts_ask_for_are_judged(tmp_path: Path) -> None:
    torch.manual_seed(1)
    judge = SmallResNet(num_classes=10, in_channels=1, width=4, stages=1)
    prompts = ["a seven", "a three in ink", "a seven beside a two", "a one beside a seven", "a two beside a six"]
    evaluation = GenerationEvaluator(3, prompts, judge, features="classifier")
    module = TextToImage(small_text_to_image(WORDS), sampling=Sampling(steps=2), evaluation=evaluation)
    (logged,) = trainer(tmp_path).test(module, datamodule=digits(), verbose=False)[-1:]
    names = module.datamodule.class_names
    places = {"left": slice(0, 8), "middle": slice(4, 12), "right": slice(8, 16)}
    asked = {"left": [(2, 7), (3, 1), (4, 2)], "middle": [(0, 7), (1, 3)], "right": [(2, 2), (3, 7), (4, 6)]}
    for part, of_part in asked.items():
        said = evaluation.predictions.sets[f"generated/{part}"]
        conditions, numbers = said.indices % len(names), said.indices // len(names)
        found = {(names[condition], digit) for condition, digit in zip(conditions.tolist(), said.targets.tolist(), strict=True)}
        assert found == {(prompts[place], digit) for place, digit in of_part}
        images = (255 * module.sample(conditions, numbers)).round() / 255
        with torch.no_grad():
            torch.testing.assert_close(said.logits, judge.eval()(images[..., places[part]]), atol=1e-4, rtol=0)
    expected = composition(dict(evaluation.predictions.sets), module.datamodule.forgotten_classes, len(names))
    assert {name: logged[name] for name in expected} == pytest.approx(expected)
    assert expected.keys() == {"UA", "acc", "inside", "other", "pairs"}
    trained = [names[number] for number in module.datamodule.trained_classes]
    assert "a three in ink" in trained
    assert logged["num_generated"] == 3 * (
        1 + 2 * ("a two beside a six" in trained)
    )  # parts of what is retained, and has images


def adapted(**lora: Any) -> TextToImage:
    sampling = Sampling(steps=3, guidance=3.0)
    module = TextToImage(
        stable_diffusion("1"), method=Remap(to="anchor"), sampling=sampling, lora={"r": 2, **lora}, optimizer=adamw
    )
    return module


def test_adapters_alone_are_trained_and_masked_and_what_is_saved_is_a_plain_pipeline(tmp_path: Path) -> None:
    module, masking = adapted(), SaliencyMasking(0.5, score="random")
    before = {name: weight.clone() for name, weight in module.network.state_dict().items()}
    trainer(tmp_path, max_epochs=3, callbacks=[masking]).fit(module, datamodule=Photos())
    assert masking.mask is not None
    assert all("lora_" in name for name in masking.mask)
    assert len(masking.mask) > 10
    moved = {name for name, weight in module.network.state_dict().items() if not torch.equal(weight, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    module.eval().save_pretrained(tmp_path / "pipeline")
    plain: Any = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert plain.unet.state_dict().keys() == stable_diffusion("1").unet.state_dict().keys()
    expected = drawn(plain, module, PROMPTS)
    torch.testing.assert_close(module.sample(TARGETS, NUMBERS), expected, atol=1e-4, rtol=0)
    base: Any = stable_diffusion("1")
    unchanged = drawn(base, module, PROMPTS)
    assert (expected - unchanged).abs().max() > 0.01
    base.load_lora_weights(tmp_path / "pipeline")
    torch.testing.assert_close(drawn(base, module, PROMPTS), expected, atol=1e-4, rtol=0)


def test_fresh_adapters_change_nothing(tmp_path: Path) -> None:
    module = started(adapted(), Photos(), tmp_path)
    plain = started(TextToImage(stable_diffusion("1"), sampling=Sampling(steps=3, guidance=3.0)), Photos(), tmp_path)
    torch.testing.assert_close(module.sample(TARGETS, NUMBERS), plain.sample(TARGETS, NUMBERS), atol=1e-6, rtol=0)


def test_adapters_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lora .*rank.* cannot be used: .*unexpected keyword argument 'rank'"):
        adapted(rank=3)
    with pytest.raises(ValueError, match=r"lora .* cannot be used: .*not found"):
        adapted(target_modules=["nothing"])
    with pytest.raises(ValueError, match=r"Adapters \(lora\) start from the pipeline itself\. Leave original unset"):
        TextToImage(stable_diffusion("1"), lora={"r": 2}, original="somewhere")
