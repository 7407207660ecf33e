"""Two processes: the mask of one, bit-identical ranks, and frozen weights; with whole weights and with shards."""

from pathlib import Path
from typing import Any

import pytest
import torch

from salun_lightning.modules import ImageClassifier
from salun_lightning.saliency import SaliencyMask, SaliencyMasking
from tests.saliency import processes
from tests.saliency.helpers import assert_frozen, fit, half_mask, loader, quiet_trainer, same_weights
from tests.saliency.processes import Doubled, DoubledManual, TensorParallel, sharded_scores, subset
from tests.saliency.test_selection import by_sorting

DDP = [name for name in processes.scenarios(Path()) if name.startswith("ddp") and name != "ddp stream"]
SHARDED = [name for name in processes.scenarios(Path()) if name.startswith(("fsdp", "tensor"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The results of all scenarios, which take turns in one pair of processes."""
    folder = tmp_path_factory.mktemp("processes")
    processes.run_both(folder)
    return folder


@pytest.fixture
def results(folder, request) -> list[dict[str, Any]]:
    """What the two ranks returned."""
    return [torch.load(folder / f"{request.param}.{rank}.pt", weights_only=True) for rank in range(2)]


def mask_of(result: dict[str, Any]) -> SaliencyMask:
    return SaliencyMask.from_state_dict(result["mask"])


@pytest.mark.parametrize("results", DDP + SHARDED, indirect=True)
def test_ranks_are_identical_and_frozen_weights_never_moved(results):
    first, second = results
    assert same_weights(first["final"], second["final"])
    assert mask_of(first) == mask_of(second)
    assert first["report"] == second["report"]
    assert_frozen(first["original"], first["final"], mask_of(first))


@pytest.mark.parametrize("results", DDP + SHARDED, indirect=True)
def test_the_report_is_that_of_the_whole_network(results, request):
    result = results[0]
    mask = mask_of(result)
    moved = sum(int((result["original"][name] != weight).sum()) for name, weight in result["final"].items())
    assert result["report"]["num_weights"] == mask.num_weights == sum(w.numel() for w in result["final"].values())
    assert result["report"]["num_kept"] == mask.num_kept
    assert result["report"]["drift"] == 0
    if "resumed" in request.node.name:  # it counts from where it was resumed, and a few may be back where they began
        assert abs(result["report"]["num_moved"] - moved) <= 2
    else:
        assert result["report"]["num_moved"] == moved


ONE_PROCESS = {
    "": Doubled,
    " bucket view": Doubled,
    " static graph": Doubled,
    " manual static graph": DoubledManual,
    " EMA": Doubled,
    " channels last": Doubled,
    " resumed": Doubled,
    " resumed from shards": Doubled,
    " AdamW clipped": Doubled,
    " AdamW fused": Doubled,
    " after validation": Doubled,
    " manual": DoubledManual,
}
SCORES = ("fisher", "snip", "magnitude", "random")


def how(name: str) -> str:
    return name.removeprefix("ddp").removeprefix("fsdp")


@pytest.mark.parametrize("results", [name for name in DDP + SHARDED if how(name) in ONE_PROCESS], indirect=True)
def test_the_mask_of_two_processes_is_that_of_one(results, request):
    module = ONE_PROCESS[how(request.node.callspec.params["results"])]()
    callback = SaliencyMasking(0.5)
    fit(module, callback, data=loader(batch_size=4, shuffle=True), max_epochs=1)
    assert mask_of(results[0]) == callback.mask


@pytest.mark.parametrize("results", [n for n in DDP + SHARDED if n.endswith(SCORES)], indirect=True)
def test_every_score_of_two_processes_is_that_of_one(results, request):
    callback = SaliencyMasking(0.5, score=request.node.callspec.params["results"].split()[1])
    fit(Doubled(), callback, data=loader(batch_size=4), max_epochs=1)
    assert mask_of(results[0]) == callback.mask


@pytest.mark.parametrize("results", ["ddp subset"], indirect=True)
def test_a_subset_picked_by_the_sampler_is_not_shared_out(results):
    callback = SaliencyMasking(0.5)
    fit(Doubled(), callback, data=subset(), max_epochs=1)
    assert mask_of(results[0]) == callback.mask


@pytest.mark.parametrize("results", ["tensor parallel"], indirect=True)
def test_the_mask_of_a_tensor_parallel_network_is_that_of_one_process(results):
    callback = SaliencyMasking(0.5)
    module = Doubled()
    module.net = TensorParallel().net
    fit(module, callback, data=loader(batch_size=4), max_epochs=1)
    assert mask_of(results[0]) == callback.mask


@pytest.mark.parametrize("results", ["ddp digits"], indirect=True)
def test_the_mask_of_our_module_and_datamodule_is_that_of_one_process(results):
    module, callback = processes.digits_module(), SaliencyMasking(0.3)
    trainer = quiet_trainer(callback, limit_val_batches=0, precision="64-true", max_epochs=1)
    trainer.fit(module, processes.digits_data())
    assert mask_of(results[0]) == callback.mask


@pytest.mark.parametrize(
    "results", [name for name in DDP + SHARDED if name.split()[-1] in processes.one_shots()], indirect=True
)
def test_the_edit_of_two_processes_is_that_of_one_and_is_added_exactly(results, request):
    one = processes.one_shot(ImageClassifier, request.node.callspec.params["results"].split()[1], batch_size=16)
    for found in (*results, one):
        mask = mask_of(found)
        for name, before in found["original"].items():
            assert torch.equal(found["final"][name], torch.where(mask[name], before + found["added"][name], before)), name
    assert mask_of(results[0]) == mask_of(one)
    torch.testing.assert_close(results[0]["added"], one["added"], rtol=1e-4, atol=1e-6)
    assert any(added.any() for added in one["added"].values())
    assert same_weights(results[0]["added"], results[1]["added"])


@pytest.mark.parametrize("results", ["ddp AdamW, mixed, clipped, accumulated"], indirect=True)
def test_a_given_mask_is_that_of_every_rank(results):
    assert mask_of(results[0]) == mask_of(results[1]) == half_mask(Doubled())


@pytest.mark.parametrize("results", [name for name in DDP + SHARDED if "resumed" in name], indirect=True)
def test_a_resumed_run_has_the_mask_of_its_checkpoint(results):
    for result in results:
        assert mask_of(result) == SaliencyMask.from_state_dict(result["first mask"])


def test_the_mask_of_a_sharded_checkpoint_can_be_read(folder):
    saved = SaliencyMask.load(folder / "sharded-True.ckpt" / "meta.pt")
    assert saved == mask_of(torch.load(folder / "fsdp resumed from shards.0.pt", weights_only=True))


@pytest.mark.parametrize("results", ["soft"], indirect=True)
def test_soft_masking_is_that_of_one_process(results):
    assert same_weights(*results)
    for name, weight in processes.soft(data=loader(24, 24)).items():
        torch.testing.assert_close(results[0][name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("results", ["ddp stream"], indirect=True)
def test_a_stream_is_refused(results):
    for result in results:
        assert "With several processes the forget set must be a map-style dataset" in result["error"]


@pytest.mark.parametrize("results", ["selection"], indirect=True)
def test_selection_among_shards_equals_a_stable_sort(results):
    scores = sharded_scores()
    for result in results:
        for k in range(43):
            selected = torch.cat([result[str(k)][name].flatten() for name in scores])
            assert torch.equal(selected, by_sorting(scores, k))


@pytest.mark.parametrize("results", ["selection of NaN"], indirect=True)
def test_nan_in_the_shard_of_one_rank_is_refused_by_all(results):
    for result in results:
        assert "saliency of 'head.weight' contains NaN or infinity" in result["error"]
