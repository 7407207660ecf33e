"""Pipeline directories: plain diffusers loads what is saved here, and a model starts from what plain diffusers saved."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline
from lightning.pytorch.callbacks import EMAWeightAveraging
from safetensors.torch import load_file, save_file
from torch import nn

from salun_lightning import files
from salun_lightning.callbacks import SavePipeline
from salun_lightning.methods import Remap
from salun_lightning.modules.class_diffusion import ClassDiffusion
from salun_lightning.modules.sampling import Sampling
from salun_lightning.networks.loading import read_checkpoint
from salun_lightning.saliency import SaliencyMasking
from tests.modules.small_diffusion import NULL, Plain, diffusion, images, noise_schedule, transformer, unet
from tests.modules.small_runs import same, trainer, weights

TARGETS, NUMBERS = torch.tensor([0, 1, 2, 1]), torch.tensor([0, 0, 5, 1])


def started(module: ClassDiffusion, folder: Path) -> ClassDiffusion:
    """With its original model loaded, as a test does it."""
    trainer(folder).test(module, datamodule=images(size=module.latent_shape[1]), verbose=False)
    return module


@torch.no_grad()
def plain_images(folder: Path, guidance: float) -> torch.Tensor:
    """What a user of diffusers draws from the directory, without this library."""
    loaded = DiffusionPipeline.from_pretrained(folder)
    network, scheduler = loaded.unet.eval(), DDIMScheduler.from_config(loaded.scheduler.config)
    scheduler.set_timesteps(5)
    pairs = zip(TARGETS.tolist(), NUMBERS.tolist(), strict=True)
    own = [torch.Generator().manual_seed(target * 1_000_003 + number) for target, number in pairs]
    drawn = torch.stack([torch.randn(1, 4, 4, generator=generator) for generator in own])
    labels = torch.cat([TARGETS, torch.full((4,), NULL)])
    for timestep in scheduler.timesteps:
        toward, without = network(torch.cat([drawn, drawn]), timestep, class_labels=labels).sample.chunk(2)
        drawn = scheduler.step(without + guidance * (toward - without), timestep, drawn).prev_sample
    return (drawn / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_plain_diffusers_draws_the_same_images_from_what_is_saved(tmp_path: Path, kind: str) -> None:
    noise = noise_schedule(beta_schedule="squaredcos_cap_v2", prediction_type=kind)
    module = diffusion(noise=noise, sampling=Sampling(steps=5, guidance=2.0)).eval()
    module.save_pretrained(tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"]
    assert torch.equal(plain_images(tmp_path / "model", 2.0), module.sample(TARGETS, NUMBERS))


def test_a_model_starts_from_what_was_saved(tmp_path: Path) -> None:
    first = diffusion(unet(seed=5)).eval()
    first.save_pretrained(tmp_path / "model")
    second = started(diffusion(unet(seed=6), original=tmp_path / "model"), tmp_path).eval()
    assert same(weights(second), weights(first))
    assert torch.equal(second.sample(TARGETS, NUMBERS), first.sample(TARGETS, NUMBERS))


def test_a_model_unlearns_from_a_directory_of_plain_diffusers(tmp_path: Path) -> None:
    network = unet(seed=5)
    DDPMPipeline(unet=network, scheduler=noise_schedule()).save_pretrained(tmp_path / "model")
    kept = []
    module = diffusion(unet(seed=6), method=Remap(), original=tmp_path / "model")
    module.on_train_epoch_end = lambda: kept.append(weights(module.reference))  # type: ignore[method-assign]
    trainer(tmp_path, max_epochs=1).fit(module, datamodule=images())
    assert same(kept[0], weights(network))
    assert not same(weights(module.network), weights(network))


def test_a_transformer_is_saved_and_loaded(tmp_path: Path) -> None:
    first = diffusion(transformer(seed=5)).eval()
    first.save_pretrained(tmp_path / "model")
    second = started(diffusion(transformer(seed=6), original=tmp_path / "model"), tmp_path)
    assert same(weights(second), weights(first))
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "model")
    assert same(weights(loaded.unet), weights(first.network))


def test_a_directory_with_a_network_called_transformer(tmp_path: Path) -> None:
    first = diffusion(transformer(seed=5))
    first.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "unet").rename(tmp_path / "model" / "transformer")
    index = tmp_path / "model" / "model_index.json"
    index.write_text(index.read_text().replace('"unet"', '"transformer"'))
    second = started(diffusion(transformer(seed=6), original=tmp_path / "model"), tmp_path)
    assert same(weights(second), weights(first))


def test_precision_is_kept_and_cast(tmp_path: Path) -> None:
    first = diffusion().to(torch.bfloat16)
    first.save_pretrained(tmp_path / "model")
    written = load_file(tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    second = started(diffusion(unet(seed=1), original=tmp_path / "model"), tmp_path)
    assert same(weights(second), {name: tensor.float() for name, tensor in weights(first).items()})


@pytest.mark.parametrize(
    ("network", "sentence"),
    [
        (
            lambda: unet(block_out_channels=(8, 8)),
            r"The UNet2DModel of the pipeline is built in another way .*: block_out_chan",
        ),
        (
            lambda: unet(act_fn="gelu"),
            r"is built in another way than the network of this configuration: act_fn silu \(here gelu\)",
        ),
        (lambda: unet(num_class_embeds=7), r"num_class_embeds 4 \(here 7\)\.$"),
        (lambda: unet(sample_size=8), r"sample_size 4 \(here 8\)\.$"),
        (
            lambda: unet(sample_size=8, act_fn="gelu", num_class_embeds=7, block_out_channels=(8, 8), norm_eps=1e-3),
            r"act_fn silu .*, block_out_channels .*, norm_eps .*, and 2 more\.$",
        ),
        (
            lambda: transformer(sample_size=4),
            r"^The pipeline holds a UNet2DModel, but the network .* is a DiTTransformer2DModel\.$",
        ),
        (Plain, r"^The pipeline holds a UNet2DModel, but the network of this configuration is a Plain\.$"),
    ],
)
def test_a_directory_of_another_architecture_is_refused(tmp_path: Path, network: Any, sentence: str) -> None:
    diffusion().save_pretrained(tmp_path / "model")
    module = diffusion(network(), original=tmp_path / "model")
    before = weights(module)
    with pytest.raises(ValueError, match=sentence):
        trainer(tmp_path).test(module, datamodule=images(), verbose=False)
    assert same(weights(module), before)


def test_a_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match=r"^'.*model' is not a pipeline directory: it holds no model_index\.json\.$"):
        read_checkpoint(tmp_path / "model")


def test_a_pipeline_without_a_network(tmp_path: Path) -> None:
    diffusion().save_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "unet")
    with pytest.raises(ValueError, match=r"^'.*model' cannot be read as a pipeline; .* no file named config\.json"):
        read_checkpoint(tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    index.write_text(index.read_text().replace('"unet"', '"prior"'))
    with pytest.raises(ValueError, match=r"It holds no network of diffusers under unet or transformer\."):
        read_checkpoint(tmp_path / "model")


def test_a_network_that_is_none(tmp_path: Path) -> None:
    diffusion().save_pretrained(tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    index.write_text(index.read_text().replace("UNet2DModel", "DDIMScheduler"))
    with pytest.raises(ValueError, match=r"Its unet is a DDIMScheduler, which is no network\."):
        read_checkpoint(tmp_path / "model")


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pipeline_of_pickled_weights(tmp_path: Path) -> None:
    DDPMPipeline(unet=unet(), scheduler=DDPMScheduler()).save_pretrained(tmp_path / "model", safe_serialization=False)
    (weights_file,) = (tmp_path / "model" / "unet").glob("*.bin")
    weights_file.write_bytes(pickle.dumps(Planted(tmp_path / "executed")))
    with pytest.raises(ValueError, match=r"no file named diffusion_pytorch_model\.safetensors .* safe_serialization=True"):
        read_checkpoint(tmp_path / "model")
    assert not (tmp_path / "executed").exists()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_truncated_weights(tmp_path: Path) -> None:
    diffusion().save_pretrained(tmp_path / "model")
    truncate(tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"^'.*model.*' cannot be read as a pipeline; a file may be truncated"):
        read_checkpoint(tmp_path / "model")


def test_a_truncated_configuration(tmp_path: Path) -> None:
    diffusion().save_pretrained(tmp_path / "model")
    truncate(tmp_path / "model" / "unet" / "config.json")
    with pytest.raises(ValueError, match=r"^'.*model.*' cannot be read as a pipeline; a file may be truncated"):
        read_checkpoint(tmp_path / "model")


def test_weights_of_another_shape_than_the_configuration_says(tmp_path: Path) -> None:
    diffusion().save_pretrained(tmp_path / "model")
    diffusion(unet(num_class_embeds=6)).save_pretrained(tmp_path / "other")
    name = "diffusion_pytorch_model.safetensors"
    shutil.copy(tmp_path / "other" / "unet" / name, tmp_path / "model" / "unet" / name)
    with pytest.raises(
        ValueError, match=r"cannot be read as a pipeline; .* class_embedding.weight expected shape .*4, 16.*, but got .*6, 16"
    ):
        started(diffusion(original=tmp_path / "model"), tmp_path)


def test_there_is_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no model at"):
        read_checkpoint(tmp_path / "model")


def test_a_pipeline_is_replaced(tmp_path: Path) -> None:
    diffusion(unet(seed=1)).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "stale.txt").write_text("of the first")
    second = diffusion(unet(seed=2))
    second.save_pretrained(tmp_path / "model")
    found = read_checkpoint(tmp_path / "model")["state_dict"]
    assert same(found, weights(second.network))
    assert os.listdir(tmp_path) == ["model"]
    assert not (tmp_path / "model" / "stale.txt").exists()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_something_else_is_not_replaced(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "model"
    if kind == "folder":
        target.mkdir()
        (target / "thesis.txt").write_text("years of work")
    else:
        target.write_text("years of work")
    with pytest.raises(ValueError, match=r"^'.*model' is there and is not a pipeline directory, so it is not replaced\.$"):
        diffusion().save_pretrained(target)
    assert os.listdir(tmp_path) == ["model"]
    assert (target / "thesis.txt" if kind == "folder" else target).read_text() == "years of work"


def test_a_broken_off_save_leaves_the_old_directory_and_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diffusion(unet(seed=1)).save_pretrained(tmp_path / "model")
    before = read_checkpoint(tmp_path / "model")["state_dict"]

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(DDPMScheduler, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        diffusion(unet(seed=2)).save_pretrained(tmp_path / "model")
    assert same(read_checkpoint(tmp_path / "model")["state_dict"], before)
    assert os.listdir(tmp_path) == ["model"]


def test_a_failed_exchange_leaves_a_whole_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diffusion(unet(seed=1)).save_pretrained(tmp_path / "model")

    def refused(*_: Any, **__: Any) -> None:
        raise OSError("not permitted")

    monkeypatch.setattr(files.os, "replace", refused)
    with pytest.raises(OSError, match="not permitted"):
        diffusion(unet(seed=2)).save_pretrained(tmp_path / "model")
    assert read_checkpoint(tmp_path / "model")["state_dict"]


def test_only_models_of_diffusers_are_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^Plain is not a model of diffusers, so it cannot be saved as a pipeline"):
        diffusion(Plain()).save_pretrained(tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_the_saved_configuration_is_that_of_the_training(tmp_path: Path) -> None:
    diffusion(noise=noise_schedule(beta_schedule="scaled_linear", clip_sample=False)).save_pretrained(tmp_path / "model")
    found = json.loads((tmp_path / "model" / "scheduler" / "scheduler_config.json").read_text())
    assert (found["_class_name"], found["beta_schedule"], found["clip_sample"]) == ("DDPMScheduler", "scaled_linear", False)
    assert found["num_train_timesteps"] == 20


class Compiled(nn.Module):
    """A wrapper that keeps its network as torch.compile does."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self._orig_mod = network
        self.config = network.config
        self.forward = network.forward


def test_a_compiled_network_is_saved_as_what_it_wraps(tmp_path: Path) -> None:
    module = diffusion(unet(seed=3))
    module.network = Compiled(module.network)
    module.save_pretrained(tmp_path / "model")
    assert same(read_checkpoint(tmp_path / "model")["state_dict"], weights(unet(seed=3)))
    second = diffusion(unet(seed=4), original=tmp_path / "model")
    second.network = Compiled(second.network)
    started(second, tmp_path)
    assert same(weights(second.network._orig_mod), weights(unet(seed=3)))


@pytest.mark.parametrize("settings", [{"prediction_type": "v_prediction"}, {"beta_end": 0.5}, {"num_train_timesteps": 30}])
def test_a_pipeline_that_was_trained_on_another_noise_schedule_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Its weights fit, but every prediction would be taken for something else."""
    diffusion(noise=noise_schedule(**settings)).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=next(iter(settings))):
        started(diffusion(original=tmp_path / "model"), tmp_path)


def test_a_checkpoint_of_another_project_that_holds_a_config_of_its_own(tmp_path: Path) -> None:
    torch.save({"state_dict": unet(seed=5).state_dict(), "config": {"lr": 0.1}}, tmp_path / "original.pt")
    module = started(diffusion(original=tmp_path / "original.pt"), tmp_path)
    assert same(weights(module.network), weights(unet(seed=5)))


def test_a_pipeline_in_several_files(tmp_path: Path) -> None:
    saved = DDPMPipeline(unet=unet(seed=5), scheduler=noise_schedule())
    saved.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model" / "unet").glob("*.safetensors"))) > 1
    assert same(read_checkpoint(tmp_path / "model")["state_dict"], weights(unet(seed=5)))


def test_a_weight_that_is_missing_is_not_made_up(tmp_path: Path) -> None:
    """diffusers would draw it at random, with a warning."""
    diffusion().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    written = load_file(path)
    del written["class_embedding.weight"]
    save_file(written, path)
    with pytest.raises(ValueError, match=r"class_embedding\.weight missing from the checkpoint"):
        started(diffusion(original=tmp_path / "model"), tmp_path)


def test_reading_a_pipeline_draws_no_random_numbers(tmp_path: Path) -> None:
    diffusion().save_pretrained(tmp_path / "model")
    before = torch.get_rng_state()
    read_checkpoint(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument")  # of diffusers
def test_a_pipeline_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From what was downloaded before, so that nothing is asked for over the network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    place, commit = tmp_path / "models--someone--tiny", "0123456789abcdef0123456789abcdef01234567"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    diffusion(unet(seed=5)).save_pretrained(place / "snapshots" / commit)
    module = started(diffusion(unet(seed=6), original="hf://someone/tiny"), tmp_path)
    assert same(weights(module), weights(diffusion(unet(seed=5))))
    with pytest.raises(ValueError, match=r"^'someone/else' cannot be read as a pipeline"):
        read_checkpoint("hf://someone/else")


def test_what_is_no_file_is_not_looked_for_on_the_hub() -> None:
    with pytest.raises(FileNotFoundError, match="There is no model at 'someone/tiny'"):
        read_checkpoint("someone/tiny")


@pytest.mark.parametrize(("network", "written"), [(Plain, False), (unet, True)])
def test_fit_saves_what_diffusers_can_load(tmp_path: Path, network: Any, written: bool) -> None:
    """Of a network that is not of diffusers, its checkpoint is all there is to save."""
    module = diffusion(network())
    trainer(tmp_path, max_steps=1, callbacks=[SavePipeline()]).fit(module, datamodule=images())
    assert (tmp_path / "pipeline").exists() == written
    if written:
        assert same(read_checkpoint(tmp_path / "pipeline")["state_dict"], weights(module.network))


def test_what_is_saved_is_the_average_also_when_a_finished_run_is_resumed(tmp_path: Path) -> None:
    runner = trainer(tmp_path, max_epochs=1, callbacks=[EMAWeightAveraging(decay=0.5), SavePipeline()])
    module = diffusion()
    runner.fit(module, datamodule=images())
    runner.save_checkpoint(tmp_path / "last.ckpt")
    averaged = weights(module.network)
    assert same(read_checkpoint(tmp_path / "pipeline")["state_dict"], averaged)
    shutil.rmtree(tmp_path / "pipeline")
    again = trainer(tmp_path, max_epochs=1, callbacks=[EMAWeightAveraging(decay=0.5), SavePipeline()])
    again.fit(diffusion(unet(seed=3)), datamodule=images(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert same(read_checkpoint(tmp_path / "pipeline")["state_dict"], averaged)


def test_what_a_mask_holds_still_is_saved_as_it_was(tmp_path: Path) -> None:
    module = diffusion(method=Remap())
    before = weights(module.network)
    trainer(tmp_path, max_epochs=1, callbacks=[SaliencyMasking(0.0), SavePipeline()]).fit(module, datamodule=images())
    assert same(read_checkpoint(tmp_path / "pipeline")["state_dict"], before)
