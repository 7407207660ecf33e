"""Frozen means frozen in a diffusion model, whatever trains it: precisions, averages, resumed runs, and two processes."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor

from salun_lightning.callbacks import GenerationEvaluator
from salun_lightning.methods import ESD, FineTune, Method, Remap, SelectiveAmnesia
from salun_lightning.modules.class_diffusion import ClassDiffusion
from salun_lightning.modules.sampling import Sampling
from salun_lightning.networks import SmallResNet
from salun_lightning.saliency import SaliencyMask, SaliencyMasking
from tests.modules.small_diffusion import CLASSES, adamw, diffusion, images, saved, unet
from tests.modules.small_runs import same, weights
from tests.saliency.helpers import assert_frozen, copied, quiet_trainer, same_weights
from tests.saliency.processes import in_two_processes

RATIO = 0.3
DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.float32, "bf16-true": torch.bfloat16}


def model(seed: int = 0, **kwargs: Any) -> ClassDiffusion:
    settings = {"method": Remap(), "optimizer": adamw, "label_dropout": 0.2, "sampling": Sampling(steps=5, guidance=2.0)}
    return diffusion(unet(seed), **{**settings, **kwargs})


def unlearn(module: ClassDiffusion, *callbacks: Callback, resume: Path | None = None, **kwargs: Any) -> Any:
    trainer = quiet_trainer(*callbacks, **{"limit_val_batches": 0, **kwargs})
    trainer.fit(module, datamodule=images(), ckpt_path=resume, weights_only=True if resume else None)
    return trainer


@pytest.mark.parametrize(
    ("precision", "average"), [("32-true", False), ("32-true", True), ("bf16-mixed", True), ("bf16-true", True)]
)
def test_frozen_in_every_precision_with_and_without_an_average(precision: str, average: bool) -> None:
    module = model().to(DTYPES[precision])
    original, callback = copied(module), SaliencyMasking(RATIO)
    extra = [EMAWeightAveraging(decay=0.5)] if average else []
    unlearn(module, callback, *extra, precision=precision, max_epochs=2)
    total = sum(weight.numel() for weight in original.values())
    assert callback.mask.num_kept == int(RATIO * total) == sum(int(mask.sum()) for mask in callback.mask.values())
    assert next(module.parameters()).dtype == DTYPES[precision]
    assert_frozen(original, copied(module), callback.mask)
    assert callback.report["drift"] == 0
    moved = sum(int((original[name] != weight).sum()) for name, weight in copied(module).items())
    assert moved == callback.report["num_moved"] <= callback.mask.num_kept


@pytest.mark.parametrize("method", [FineTune(), Remap(to="random"), ESD(), SelectiveAmnesia(images=2, timesteps=2)])
def test_frozen_whatever_the_method(method: Method) -> None:
    module, callback = model(method=method), SaliencyMasking(RATIO)
    original = copied(module)
    unlearn(module, callback, gradient_clip_val=0.5, max_epochs=1)
    assert_frozen(original, copied(module), callback.mask)
    assert callback.report["drift"] == 0


def test_precision_does_not_change_the_mask() -> None:
    masks = []
    for precision in ("32-true", "bf16-mixed"):
        masks.append(SaliencyMasking(RATIO))
        unlearn(model(), masks[-1], precision=precision, max_epochs=1)
    assert masks[0].mask == masks[1].mask


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_nothing_and_everything_may_move(ratio: float) -> None:
    module, callback = model(), SaliencyMasking(ratio)
    original = copied(module)
    unlearn(module, callback, max_epochs=1)
    moved = sum(int((original[name] != weight).sum()) for name, weight in copied(module).items())
    total = sum(weight.numel() for weight in original.values())
    assert moved == 0 if ratio == 0 else moved > 0.9 * total
    assert callback.mask.num_kept == ratio * total


def judge() -> GenerationEvaluator:
    torch.manual_seed(0)
    return GenerationEvaluator(6, classifier=SmallResNet(CLASSES, width=4, stages=1), features="classifier")


@pytest.mark.parametrize("average", [False, True])
def test_nothing_but_the_network_is_masked_trained_and_saved(tmp_path: Path, average: bool) -> None:
    module, callback = model(evaluation=judge()), SaliencyMasking(RATIO)
    trainer = unlearn(module, callback, *([EMAWeightAveraging(decay=0.5)] if average else []))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    network = dict(module.network.named_parameters())
    assert set(callback.mask) == set(network)
    optimized = [weight for group in trainer.optimizers[0].param_groups for weight in group["params"]]
    assert [id(weight) for weight in optimized] == [id(weight) for weight in network.values()]
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == {f"network.{name}" for name in module.network.state_dict()}
    assert len(checkpoint["optimizer_states"][0]["state"]) == len(network)
    assert same({f"network.{name}": weight for name, weight in weights(module.network).items()}, checkpoint["state_dict"])


def test_the_mask_is_of_the_original_and_in_force_from_the_first_step(tmp_path: Path) -> None:
    path = saved(model(seed=9), tmp_path)
    expected, callback = SaliencyMasking(RATIO), SaliencyMasking(RATIO)
    unlearn(model(seed=9), expected, max_epochs=1)
    module = model(seed=1, original=path)
    unlearn(module, callback, max_epochs=1)
    assert callback.mask == expected.mask
    assert_frozen(copied(model(seed=9)), copied(module), callback.mask)


def run(folder: Path, average: bool, method: Method, resume: Path | None = None) -> dict[str, Any]:
    """Unlearn for two epochs, from an original model in a file, and save after each."""
    module, callback, kept = model(1, method=method, original=folder / "original.pt"), SaliencyMasking(RATIO), []
    module.on_train_epoch_end = lambda: kept.append(weights(module.reference))  # type: ignore[method-assign]
    torch.rand(5 if resume else 0)  # a process that resumes has drawn other numbers before
    saving = ModelCheckpoint(
        folder / ("resumed" if resume else "whole"), "{epoch}", save_top_k=-1, save_on_train_epoch_end=True
    )
    saving.CHECKPOINT_JOIN_CHAR, saving.CHECKPOINT_EQUALS_CHAR = "", ""
    extra = [EMAWeightAveraging(decay=0.5)] if average else []
    unlearn(module, callback, *extra, saving, resume=resume, max_epochs=2, enable_checkpointing=True)
    return {"final": copied(module), "mask": callback.mask, "reference": kept[-1], "report": callback.report}


@pytest.mark.parametrize(("to", "average"), [("next", False), ("random", True)])
def test_a_resumed_run_ends_where_an_unbroken_one_does(
    tmp_path: Path, to: Any, average: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    saved(model(seed=9), tmp_path)
    original = copied(model(seed=9))
    whole = run(tmp_path, average, Remap(to=to))
    resumed = run(tmp_path, average, Remap(to=to), resume=tmp_path / "whole" / "epoch0.ckpt")
    for result in (whole, resumed):
        assert_frozen(original, result["final"], result["mask"])
        assert result["report"]["drift"] == 0
        assert same(result["reference"], weights(unet(seed=9)))  # not the weights that were resumed
    assert resumed["mask"] == whole["mask"]
    assert same_weights(resumed["final"], whole["final"])
    keys = {f"network.{name}" for name in unet().state_dict()}
    for epoch in range(2):  # of the average and of the weights in training alike
        checkpoint = torch.load(tmp_path / "whole" / f"epoch{epoch}.ckpt", weights_only=True)
        assert checkpoint["state_dict"].keys() == checkpoint.get("current_model_state", checkpoint["state_dict"]).keys() == keys
        assert ("current_model_state" in checkpoint) == average


def double_model(method: Method) -> ClassDiffusion:
    """In float64, so that the order of sums decides no bit that matters."""
    return model(method=method).double()


class Fisher(SelectiveAmnesia):
    """Selective Amnesia that tells its Fisher information."""

    @property
    def fisher(self) -> list[Tensor]:
        return [importance for *_, importance in self._tied]


METHODS = {"Remap": Remap, "SA": lambda: Fisher(images=2, timesteps=2, fisher_weight=10.0)}


def trained(name: str, **kwargs: Any) -> dict[str, Any]:
    """What training came to in this process."""
    module, callback, method = double_model(METHODS[name]()), SaliencyMasking(RATIO), None
    original, method = copied(module), module.method
    unlearn(module, callback, precision="64-true", **kwargs)
    result = {"original": original, "final": copied(module), "mask": callback.mask.state_dict(), "report": callback.report}
    return {**result, "fisher": method.fisher} if isinstance(method, Fisher) else result


def measured(**kwargs: Any) -> dict[str, float]:
    module = model(evaluation=judge())
    results = quiet_trainer(**kwargs).test(module, datamodule=images(), verbose=False)
    return {name: value for result in results for name, value in result.items()}


def one_of_two(rank: int, folder: Path, port: int) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", NODE_RANK="0", LOCAL_RANK=str(rank), RANK=str(rank)
    )
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for name in METHODS:
        torch.save(trained(name, devices=2, strategy="ddp"), folder / f"{name}.{rank}.pt")
    torch.save(measured(devices=2, strategy="ddp"), folder / f"measured.{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes came to."""
    folder = tmp_path_factory.mktemp("diffusion")
    in_two_processes(one_of_two, folder, limit=120)
    return folder


def results(folder: Path, name: str) -> list[Any]:
    return [torch.load(folder / f"{name}.{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_hold_the_same_weights_still(folder: Path, name: str) -> None:
    first, second = results(folder, name)
    mask, alone = SaliencyMask.from_state_dict(first["mask"]), trained(name)
    assert mask == SaliencyMask.from_state_dict(second["mask"]) == SaliencyMask.from_state_dict(alone["mask"])
    assert same_weights(first["final"], second["final"])
    assert_frozen(first["original"], first["final"], mask)
    assert first["report"] == second["report"]
    assert first["report"]["drift"] == 0
    assert mask.num_kept == int(RATIO * sum(weight.numel() for weight in first["final"].values()))


def test_the_fisher_information_of_two_processes_is_that_of_one(folder: Path) -> None:
    first, second = results(folder, "SA")
    alone = trained("SA")["fisher"]
    assert all(torch.equal(*pair) for pair in zip(first["fisher"], second["fisher"], strict=True))
    torch.testing.assert_close(first["fisher"], alone)


def test_two_processes_measure_what_one_does(folder: Path) -> None:
    first, second = results(folder, "measured")
    assert first == second
    alone = measured()
    assert first.keys() == alone.keys()
    exact = [name for name in alone if name not in ("KID", "FID")]  # KID takes subsets in the order of the images
    assert {name: first[name] for name in exact} == pytest.approx({name: alone[name] for name in exact}, rel=1e-4)
    assert first["FID"] == pytest.approx(alone["FID"], rel=1e-2, abs=1e-4)
