"""Methods that forget a concept, on a UNet whose weights are sharded over two processes (FSDP2)."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from salun_lightning.methods import UCE, ConceptAblation, Method, Remap, SelectiveAmnesia
from salun_lightning.modules.sampling import Sampling
from salun_lightning.modules.text_to_image import TextToImage
from salun_lightning.saliency import SaliencyMasking
from salun_lightning.weights import whole_of
from tests.modules.small_diffusion import adamw
from tests.modules.small_runs import trainer
from tests.modules.test_text_to_image import Photos, stable_diffusion
from tests.saliency.processes import in_two_processes

METHODS: dict[str, Any] = {
    "UCE": UCE,
    "SA": partial(SelectiveAmnesia, images=2, timesteps=2),
    "CA": partial(ConceptAblation, images=2),
    "Remap": partial(Remap, to="anchor"),
}


class Sharded(TextToImage):
    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.network.mid_block, mesh=mesh)
        fully_shard(self.network, mesh=mesh)


def trained(kind: type[TextToImage], method: Method, folder: Path, **settings: Any) -> dict[str, Any]:
    optimizer: Any = partial(torch.optim.SGD, lr=1.0) if isinstance(method, UCE) else adamw
    module = kind(stable_diffusion("xl"), method=method, sampling=Sampling(steps=2, guidance=3.0), optimizer=optimizer)
    masking = SaliencyMasking(0.5)
    trainer(folder, callbacks=[masking], max_steps=1, **settings).fit(module, datamodule=Photos())
    weights = {name: whole_of(weight.detach()).clone() for name, weight in module.network.named_parameters()}
    return {"weights": weights, "mask": masking.mask.state_dict() if masking.mask else None, "report": masking.report}


def one_of_two(rank: int, folder: Path, port: int) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", NODE_RANK="0", LOCAL_RANK=str(rank), RANK=str(rank)
    )
    torch.set_num_threads(1)
    for name, method in METHODS.items():
        strategy = ModelParallelStrategy(2, 1, process_group_backend="gloo")
        torch.save(trained(Sharded, method(), folder, devices=2, strategy=strategy), folder / f"{name}.{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("sharded")
    in_two_processes(one_of_two, folder)
    return {name: [torch.load(folder / f"{name}.{rank}.pt", weights_only=False) for rank in (0, 1)] for name in METHODS}


@pytest.mark.parametrize("name", METHODS)
def test_both_processes_have_one_network_that_moved_within_the_mask(name: str, found: dict[str, list[Any]]) -> None:
    first, second = found[name]
    before = stable_diffusion("xl").unet.state_dict()
    assert all(torch.equal(weight, second["weights"][key]) for key, weight in first["weights"].items())
    assert first["report"]["drift"] == 0
    assert 0 < first["report"]["num_moved"] <= first["report"]["num_kept"]
    moved = sum(int((weight != before[key]).sum()) for key, weight in first["weights"].items())
    assert moved == first["report"]["num_moved"]


def test_the_closed_form_is_that_of_one_process(found: dict[str, list[Any]], tmp_path: Path) -> None:
    """Under the same mask: saliency of two halves is summed in another order, which swaps a weight now and then."""
    alone, sharded = trained(TextToImage, UCE(), tmp_path), found["UCE"][0]
    before = stable_diffusion("xl").unet.state_dict()
    compared = 0
    for key, weight in alone["weights"].items():
        both = (weight != before[key]) & (sharded["weights"][key] != before[key])
        torch.testing.assert_close(sharded["weights"][key][both], weight[both], atol=1e-6, rtol=1e-4)
        compared += int(both.sum())
    assert compared > 0.9 * alone["report"]["num_moved"]
