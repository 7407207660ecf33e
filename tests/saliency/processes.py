"""What the tests of several processes run on each of them. Every scenario returns plain data, which the tests look at."""

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler

from salun_lightning.data import DigitsDataModule, ForgetRandom
from salun_lightning.methods import SSD, OneShot
from salun_lightning.methods.fisher_forgetting import FisherForgetting
from salun_lightning.methods.influence_unlearning import InfluenceUnlearning
from salun_lightning.methods.neg_merge import NegMerge
from salun_lightning.modules import ImageClassifier
from salun_lightning.networks import SmallResNet
from salun_lightning.saliency import SaliencyMasking, Score, SoftMasking
from salun_lightning.saliency.selection import top_k_masks
from salun_lightning.weights import weights_of
from tests.methods.test_one_shot import network, plain_step
from tests.saliency.helpers import Plain, PlainManual, fit, half_mask, images_and_targets, loader, quiet_trainer, sgd
from tests.small import free_port, small_datamodule

FORGET = list(range(3, 25, 2))  # 11 samples: the two processes have uneven shares
adamw = partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1)


class Doubled(Plain):
    """In float64, so that the order of sums decides no bit that matters."""

    def __init__(self, make_optimizer: Any = sgd) -> None:
        super().__init__(make_optimizer)
        self.double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch[0].double(), batch[1]), batch_idx)


class DoubledManual(PlainManual):
    def __init__(self) -> None:
        super().__init__()
        self.double()

    def forget_loss(self, batch: Any) -> Tensor:
        return super().forget_loss((batch[0].double(), batch[1]))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step((batch[0].double(), batch[1]), batch_idx)


class Sharded(Doubled):
    """FSDP2; 15 rows of weights and 3 of the convolution on two ranks are uneven shards."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in (self.net[0], self.net[5]):
            fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0].double())


class TensorParallel(Doubled):
    """Two layers are split among the ranks, the last one is whole on each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(32, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
        self.double()

    def configure_model(self) -> None:
        plan = {"1": ColwiseParallel(), "3": RowwiseParallel()}
        parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(images_and_targets())


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in tensors.items()}


def trained(module: LightningModule, callback: SaliencyMasking, *callbacks: Any, **settings: Any) -> dict[str, Any]:
    """Train on two processes."""
    original = whole(weights_of(module))  # the same on each rank, from the same seed
    fit(module, callback, *callbacks, devices=2, **{"data": loader(batch_size=4, shuffle=True), "max_epochs": 3, **settings})
    return outcome(module, callback, original)


def outcome(module: LightningModule, callback: SaliencyMasking, original: dict[str, Tensor]) -> dict[str, Any]:
    """The whole weights before and after, the mask, the report."""
    final = whole(weights_of(module))
    return {"original": original, "final": final, "mask": callback.mask.state_dict(), "report": callback.report}


def ddp(module_class: Any = Doubled, score: Score = "gradient", *callbacks: Any, **settings: Any) -> dict[str, Any]:
    return trained(module_class(), SaliencyMasking(0.5, score=score), *callbacks, **{"strategy": "ddp", **settings})


def fsdp(make_optimizer: Any = sgd, score: Score = "gradient", *callbacks: Any, **settings: Any) -> dict[str, Any]:
    callback = SaliencyMasking(0.5, score=score)
    return trained(Sharded(make_optimizer), callback, *callbacks, **{"strategy": sharding(), **settings})


def sharding(tensor_parallel: bool = False, **kwargs: Any) -> ModelParallelStrategy:
    sizes = (1, 2) if tensor_parallel else (2, 1)
    return ModelParallelStrategy(*sizes, process_group_backend="gloo", **kwargs)


def soft(**settings: Any) -> dict[str, Tensor]:
    """Soft masking, without BatchNorm, whose statistics would be those of half a batch."""
    torch.manual_seed(0)
    module = Doubled()
    module.net = nn.Sequential(nn.Flatten(), nn.Linear(32, 9), nn.Tanh(), nn.Linear(9, 3, bias=False)).double()
    fit(module, SoftMasking(0.5), max_epochs=4, **settings)
    return whole(weights_of(module))


def subset() -> DataLoader:
    return DataLoader(images_and_targets(), batch_size=4, sampler=SubsetRandomSampler(FORGET))


def channels_last() -> dict[str, Any]:
    module = Doubled()
    module.net.to(memory_format=torch.channels_last)
    assert not module.net[0].weight.is_contiguous()
    return trained(module, SaliencyMasking(0.5), strategy="ddp")


def digits_module() -> ImageClassifier:
    torch.manual_seed(0)
    return ImageClassifier(SmallResNet(10, width=4, stages=2)).double()


def digits_data() -> DigitsDataModule:
    return DigitsDataModule(forget=ForgetRandom(count=41, seed=1), batch_size=8, order="forget")


def digits() -> dict[str, Any]:
    module, callback = digits_module(), SaliencyMasking(0.3)
    original, settings = whole(weights_of(module)), {"limit_val_batches": 0, "precision": "64-true"}
    quiet_trainer(callback, devices=2, strategy="ddp", **settings).fit(module, digits_data())
    return outcome(module, callback, original)


class ShardedClassifier(ImageClassifier):
    """FSDP2; the three classes are uneven shards."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.network[5], mesh=mesh)
        fully_shard(self.network, mesh=mesh)


def one_shots() -> dict[str, OneShot]:
    """Methods that edit the weights once."""
    return {
        "SSD": SSD(alpha=0.9, dampening=0.5),
        "LFSSD": SSD(alpha=1.0, dampening=0.5, importance="output"),
        "IU": InfluenceUnlearning(samples=7),
        "FF": FisherForgetting(alpha=0.1, floor=1e-3),
        "NegMerge": NegMerge(lrs=[0.01, 0.1], epochs=[2, 3]),
    }


def one_shot(kind: type[ImageClassifier], name: str, batch_size: int = 8, **settings: Any) -> dict[str, Any]:
    """An edit that is computed and added, with what it should be. One process has a batch as large as those of two together."""
    method, added = one_shots()[name], {}
    compute = method.edit

    def edit(module: Any) -> dict[str, Tensor]:
        edit = compute(module)
        added.update(whole(edit))
        return edit

    method.edit = edit
    module = kind(network(), method=method, optimizer=plain_step)
    callback, original = SaliencyMasking(0.5), whole(weights_of(module))
    quiet_trainer(callback, max_steps=1, limit_val_batches=0, **settings).fit(module, small_datamodule(batch_size=batch_size))
    return {**outcome(module, callback, original), "added": added}


def stream() -> dict[str, Any]:
    try:
        fit(Doubled(), SaliencyMasking(0.5), data=DataLoader(Stream(), batch_size=5), devices=2, strategy="ddp")
    except MisconfigurationException as error:
        return {"error": str(error)}
    return {}


def resumed(first: Any, module: LightningModule, folder: Path, **settings: Any) -> dict[str, Any]:
    """One epoch, saved; and two more from its checkpoint. The original weights are those before the first."""
    path, whole_run = folder / f"{type(module).__name__}.ckpt", SaliencyMasking(0.5)
    original = whole(weights_of(module))
    fit(first, whole_run, devices=2, max_epochs=1, **settings).save_checkpoint(path)
    result = trained(module, SaliencyMasking(0.5), ckpt_path=path, **settings)
    return {**result, "original": original, "first mask": whole_run.mask.state_dict()}


def fsdp_resumed(folder: Path, distributed: bool) -> dict[str, Any]:
    strategy = partial(sharding, save_distributed_checkpoint=distributed)
    modules = [type(f"Sharded{distributed}", (Sharded,), {})() for _ in range(2)]
    original = whole(weights_of(modules[0]))
    callbacks, path = [SaliencyMasking(0.5), SaliencyMasking(0.5)], folder / f"sharded-{distributed}.ckpt"
    first = fit(modules[0], callbacks[0], devices=2, max_epochs=1, strategy=strategy())
    first.save_checkpoint(path)
    result = trained(modules[1], callbacks[1], strategy=strategy(), ckpt_path=path)
    return {**result, "original": original, "first mask": callbacks[0].mask.state_dict()}


def sharded_scores() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"a": (7, 3), "b": (1, 5), "scalar": (), "c": (4,), "d": (2, 6)}
    return {name: torch.rand(shape, generator=draw).round(decimals=1) for name, shape in shapes.items()}


def selection() -> dict[str, Any]:
    """Uneven, empty, replicated and column-wise shards, with ties among them."""
    mesh = init_device_mesh("cpu", (2,))
    placements = {"a": Shard(0), "b": Shard(0), "scalar": Replicate(), "c": Replicate(), "d": Shard(1)}
    scores = {name: distribute_tensor(score, mesh, [placements[name]]) for name, score in sharded_scores().items()}
    return {str(k): dict(top_k_masks(scores, k)) for k in range(43)}


def selection_of_nan() -> dict[str, Any]:
    """NaN in the part of one rank alone; the other must not wait for it for ever."""
    mesh = init_device_mesh("cpu", (2,))
    score = distribute_tensor(torch.tensor([1.0, 2.0, 3.0, float("nan")]), mesh, [Shard(0)])
    try:
        dict(top_k_masks({"head.weight": score}, 2))
    except ValueError as error:
        return {"error": str(error)}
    return {}


def scenarios(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    return {
        "ddp": ddp,
        "ddp fisher": partial(ddp, Doubled, "fisher"),
        "ddp snip": partial(ddp, Doubled, "snip"),
        "ddp random": partial(ddp, Doubled, "random"),
        "ddp AdamW, mixed, clipped, accumulated": partial(
            trained, Plain(adamw), SaliencyMasking(mask=half_mask(Plain())), strategy="ddp", precision="bf16-mixed",
            gradient_clip_val=0.1, accumulate_grad_batches=2,
        ),
        "ddp manual": partial(ddp, DoubledManual),
        "ddp bucket view": lambda: ddp(strategy=DDPStrategy(gradient_as_bucket_view=True)),
        "ddp static graph": lambda: ddp(strategy=DDPStrategy(static_graph=True)),
        "ddp manual static graph": lambda: ddp(DoubledManual, strategy=DDPStrategy(static_graph=True)),
        "ddp EMA": lambda: ddp(Doubled, "gradient", EMAWeightAveraging(decay=0.9)),
        "ddp subset": lambda: ddp(data=subset()),
        "ddp channels last": channels_last,
        "ddp digits": digits,
        **{f"ddp {n}": partial(one_shot, ImageClassifier, n, devices=2, strategy="ddp") for n in one_shots()},
        "ddp stream": stream,
        "ddp resumed": lambda: resumed(Doubled(), Doubled(), folder, strategy="ddp"),
        "fsdp": fsdp,
        "fsdp fisher": partial(fsdp, sgd, "fisher"),
        "fsdp snip": partial(fsdp, sgd, "snip"),
        "fsdp magnitude": partial(fsdp, sgd, "magnitude"),
        "fsdp random": partial(fsdp, sgd, "random"),
        "fsdp AdamW clipped": partial(fsdp, adamw, gradient_clip_val=0.1),
        "fsdp AdamW fused": partial(fsdp, partial(adamw, fused=True)),
        "fsdp after validation": lambda: fsdp(val=loader()),
        **{f"fsdp {n}": partial(one_shot, ShardedClassifier, n, devices=2, strategy=sharding()) for n in one_shots()},
        "fsdp resumed": partial(fsdp_resumed, folder, distributed=False),
        "fsdp resumed from shards": partial(fsdp_resumed, folder, distributed=True),
        "tensor parallel": lambda: trained(TensorParallel(), SaliencyMasking(0.5), strategy=sharding(tensor_parallel=True)),
        "soft": lambda: soft(devices=2, strategy="ddp", data=loader(24, 12)),
        "selection": selection,
        "selection of NaN": selection_of_nan,
    }  # fmt: skip


def run(rank: int, folder: Path, port: int, names: list[str] | None = None) -> None:
    """One process: every scenario in turn, each with its result in a file."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", NODE_RANK="0", LOCAL_RANK=str(rank), RANK=str(rank)
    )
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for name, scenario in scenarios(folder).items():
        if names is None or name in names:
            torch.manual_seed(0)
            torch.save(scenario(), folder / f"{name}.{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run_both(folder: Path, names: list[str] | None = None, limit: float = 240) -> None:
    """Both processes; those that do not come to an end are ended."""
    in_two_processes(run, folder, names, limit=limit)


def in_two_processes(function: Callable[..., None], folder: Path, *arguments: Any, limit: float = 240) -> None:
    """Call a function with the rank, the folder and a port to meet at, in each of two processes that are ended at the limit."""
    context = torch.multiprocessing.spawn(function, (folder, free_port(), *arguments), nprocs=2, join=False)
    deadline = time.monotonic() + limit
    try:
        while not context.join(timeout=max(0, deadline - time.monotonic())):
            if time.monotonic() >= deadline:
                raise TimeoutError(f"two processes did not come to an end; results: {sorted(p.name for p in folder.iterdir())}")
    finally:
        for process in context.processes:
            process.kill()
