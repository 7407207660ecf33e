"""Which mask is in force: computed from whichever loader there is, given, or restored; and what is refused."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Subset, SubsetRandomSampler

from salun_lightning.data import DigitsDataModule, ForgetRandom
from salun_lightning.modules import ImageClassifier
from salun_lightning.networks import SmallResNet
from salun_lightning.saliency import SaliencyMask, SaliencyMasking, saliency_scores
from salun_lightning.weights import weights_of
from tests.saliency.helpers import Plain, assert_frozen, copied, fit, half_mask, images_and_targets, loader, quiet_trainer

FORGET = list(range(3, 25, 2))


def expected_mask(positions: list[int] | None = None, ratio: float = 0.5) -> SaliencyMask:
    """The mask of a forget set of images, in one batch."""
    data = images_and_targets() if positions is None else Subset(images_and_targets(), positions)
    return SaliencyMask.from_scores(saliency_scores(Plain(), DataLoader(data, batch_size=25)), ratio)


def assert_same_up_to_rounding(mask: SaliencyMask, expected: SaliencyMask) -> None:
    """Batches are summed in another order, which may swap two weights at the threshold."""
    assert mask.num_kept == expected.num_kept
    assert (mask & expected).num_kept >= expected.num_kept - 1


class Parts(Plain):
    """A third-party module whose batches may have the parts ``forget`` and ``retain``."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not isinstance(batch, dict):
            return super().training_step(batch, batch_idx)
        return sum((super(Parts, self).training_step(part, batch_idx) for part in batch.values()), torch.zeros(()))


class PartsDataset(torch.utils.data.Dataset):
    """Yields dictionaries of a forget and a retain sample."""

    def __len__(self) -> int:
        return len(FORGET)

    def __getitem__(self, index: int) -> dict[str, tuple[Tensor, Tensor]]:
        images = images_and_targets()
        return {"retain": images[2 * index], "forget": images[FORGET[index]]}


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(images_and_targets())


class OneClass(BatchSampler):
    """Batches of one class alone."""

    def __iter__(self) -> Any:
        return iter([[1, 4, 7, 10], [13, 16, 19, 22]])


class Batches:
    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


def forget_loader(**kwargs: Any) -> DataLoader:
    return DataLoader(Subset(images_and_targets(), FORGET), batch_size=4, **kwargs)


LOADERS = {
    "in order": (lambda: loader(batch_size=4), None),
    "shuffled and dropping the last": (lambda: loader(batch_size=4, shuffle=True, drop_last=True), None),
    "drawn with replacement": (
        lambda: DataLoader(images_and_targets(), 4, sampler=RandomSampler(range(25), replacement=True, num_samples=9)),
        None,
    ),
    "a subset picked by the sampler": (
        lambda: DataLoader(images_and_targets(), 4, sampler=SubsetRandomSampler(FORGET)),
        FORGET,
    ),
    "batches picked by a list": (
        lambda: DataLoader(images_and_targets(), batch_sampler=[[3, 5], [7, 9, 11]]),
        [3, 5, 7, 9, 11],
    ),
    "a batch sampler": (
        lambda: DataLoader(images_and_targets(), batch_sampler=BatchSampler(RandomSampler(range(25)), 4, drop_last=True)),
        None,
    ),
    "batches put together by a rule": (
        lambda: DataLoader(images_and_targets(), batch_sampler=OneClass(RandomSampler(range(25)), 4, drop_last=True)),
        list(range(1, 25, 3)),
    ),
    "a stream": (lambda: DataLoader(Stream(), batch_size=4), None),
    "batches that are no DataLoader": (lambda: Batches(loader(batch_size=4)), None),
    "loaders by name": (lambda: {"retain": loader(), "forget": forget_loader(shuffle=True, drop_last=True)}, FORGET),
    "a combined loader": (lambda: CombinedLoader({"forget": forget_loader(), "retain": loader()}, "max_size_cycle"), FORGET),
    "batches with parts": (lambda: DataLoader(PartsDataset(), batch_size=4, shuffle=True, drop_last=True), FORGET),
    "batches with one of the parts": (
        lambda: Batches([{"forget": batch} for batch in forget_loader()] + [{"retain": batch} for batch in loader()]),
        FORGET,
    ),
}


@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__`:UserWarning")
@pytest.mark.parametrize("kind", LOADERS)
def test_a_third_party_module_is_masked_by_the_callback_alone(kind):
    make, positions = LOADERS[kind]
    torch.manual_seed(5)
    module, callback = Parts(), SaliencyMasking(0.5)
    original = copied(module)
    fit(module, callback, data=make())
    assert_same_up_to_rounding(callback.mask, expected_mask(positions))
    assert_frozen(original, copied(module), callback.mask)


def test_samples_are_collated_and_loaded_as_the_loader_does():
    def collate(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return torch.stack([image + 1 for image, _ in samples]), torch.stack([target for _, target in samples])

    callback = SaliencyMasking(0.5)
    fit(Plain(), callback, data=loader(collate_fn=collate, shuffle=True, num_workers=1))
    moved = [(images + 1, targets) for images, targets in loader()]
    assert_same_up_to_rounding(callback.mask, SaliencyMask.from_scores(saliency_scores(Plain(), moved), 0.5))


def test_several_loaders_of_which_none_is_called_forget_are_refused():
    for data in ({"a": loader(), "b": loader()}, [loader(), loader()]):
        with pytest.raises(MisconfigurationException, match=r"none is called 'forget'.* a forget_dataloader\(\)"):
            fit(Parts(), SaliencyMasking(0.5), data=data)


class ForgetData(LightningDataModule):
    """Third-party data with a loader for what is to be forgotten."""

    def train_dataloader(self) -> DataLoader:
        return loader(shuffle=True)

    def forget_dataloader(self) -> DataLoader:
        torch.rand(3)  # must not disturb the random numbers of training
        return forget_loader(shuffle=True, drop_last=True)


def test_the_forget_loader_of_the_datamodule_comes_first():
    callback = SaliencyMasking(0.5)
    trainer = quiet_trainer(callback)
    torch.manual_seed(3)
    module = Plain()
    trainer.fit(module, ForgetData())
    assert_same_up_to_rounding(callback.mask, expected_mask(FORGET))
    everything = SaliencyMasking(1)
    runs = []
    for callbacks in ((), (everything,)):
        module = Plain()
        torch.manual_seed(3)
        quiet_trainer(*callbacks).fit(module, ForgetData())
        runs.append(copied(module))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("score", ["gradient", "fisher", "snip", "magnitude", "random"])
def test_our_module_and_datamodule_with_every_score(score):
    torch.manual_seed(0)
    datamodule = DigitsDataModule(forget=ForgetRandom(count=30, seed=1), batch_size=128, order="forget")
    module, callback = ImageClassifier(SmallResNet(10, width=4, stages=2)), SaliencyMasking(0.3, score=score, seed=2)
    original = copied(module)
    scores = saliency_scores(module, prepared(datamodule).forget_dataloader(), score, seed=2)
    quiet_trainer(callback, limit_val_batches=0, max_epochs=4).fit(module, datamodule)
    assert callback.mask == SaliencyMask.from_scores(scores, 0.3)
    assert callback.mask.metadata["score"] == ("random, seed 2" if score == "random" else score)
    assert callback.mask.metadata["data"] == datamodule.fingerprint
    assert len(callback.mask.metadata["network"]) == 16
    assert_frozen(original, copied(module), callback.mask)


def prepared(datamodule: DigitsDataModule) -> DigitsDataModule:
    datamodule.setup()
    return datamodule


def test_a_given_mask_and_a_mask_file_are_used(tmp_path):
    mask = half_mask(Plain(), 0.2)
    mask.save(tmp_path / "mask.safetensors")
    for given in (mask, tmp_path / "mask.safetensors", str(tmp_path / "mask.safetensors")):
        callback = SaliencyMasking(mask=given)
        fit(Plain(), callback)
        assert callback.mask == mask
        assert callback.report["num_kept"] == 60


def test_a_mask_computed_on_other_weights_of_the_same_network_is_used_with_a_warning():
    callback, other = SaliencyMasking(0.5), Plain()
    fit(Plain(), callback)
    with torch.no_grad():
        other.net[5].bias += 1
    with pytest.warns(UserWarning, match=r"computed with another network \(same shapes, other values\)"):
        fit(other, SaliencyMasking(mask=callback.mask))


def test_a_mask_of_another_network_is_refused():
    mask = half_mask(Plain(network=nn.Sequential(nn.Flatten(), nn.Linear(32, 3))))
    with pytest.raises(
        ValueError, match=r"belongs to another network: 'net\.1\.weight' is \(3, 32\) in the mask and is \(3,\)"
    ):
        fit(Plain(), SaliencyMasking(mask=mask))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "takes either ratio .* or mask"),
        ({"ratio": 0.5, "mask": "mask.safetensors"}, "takes either ratio .* or mask"),
        ({"ratio": 1.2}, r"ratio must lie between 0 .* and 1 .*, got 1\.2"),
        ({"ratio": -0.1}, "ratio must lie between"),
        ({"ratio": 0.5, "score": "hessian"}, "Unknown saliency score 'hessian'"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        SaliencyMasking(**arguments)


@pytest.mark.parametrize("strategy", [DeepSpeedStrategy, FSDPStrategy, XLAStrategy])
def test_strategies_that_hold_weights_in_a_form_of_their_own_are_refused(strategy):
    trainer = Mock(strategy=Mock(spec=strategy))
    with pytest.raises(MisconfigurationException, match=r"weights in a form of its own.*'ddp', or ModelPar"):
        SaliencyMasking(0.5).setup(trainer, Plain(), "fit")
    SaliencyMasking(0.5).setup(trainer, Plain(), "test")


@pytest.mark.parametrize("strategy", [DDPStrategy, ModelParallelStrategy])
def test_strategies_that_leave_weights_whole_or_shard_them_are_served(strategy):
    SaliencyMasking(0.5).setup(Mock(strategy=Mock(spec=strategy)), Plain(), "fit")
    with pytest.raises(MisconfigurationException):
        SaliencyMasking(0.5).setup(Mock(strategy=Mock(spec=DeepSpeedStrategy)), Plain(), "fit")


without_its_callbacks = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")


class Saved:
    """A masked run of one epoch with a checkpoint at its end."""

    def __init__(self, folder: Path, **arguments: Any) -> None:
        self.module, self.callback = Plain(), SaliencyMasking(**arguments)
        self.original = copied(self.module)
        checkpoint = ModelCheckpoint(dirpath=folder, filename="last")
        fit(self.module, self.callback, checkpoint, max_epochs=1, enable_checkpointing=True)
        self.path = folder / "last.ckpt"


@without_its_callbacks
def test_a_resumed_run_goes_on_with_the_mask_of_its_checkpoint(tmp_path, monkeypatch):
    first = Saved(tmp_path, ratio=0.3)
    whole, resumed, callback = Plain(), Plain(), SaliencyMasking(0.3)
    fit(whole, SaliencyMasking(0.3), max_epochs=3)
    with monkeypatch.context() as patch:
        patch.setattr("salun_lightning.saliency.source.saliency_scores", Mock(side_effect=AssertionError("computed again")))
        fit(resumed, callback, ckpt_path=first.path, max_epochs=3)
    assert callback.mask == first.callback.mask
    assert callback.mask.metadata == first.callback.mask.metadata
    assert_frozen(first.original, copied(resumed), callback.mask)
    assert all(torch.equal(copied(whole)[name], weight) for name, weight in copied(resumed).items())
    assert callback.report["drift"] == 0


def test_a_checkpoint_is_read_without_code_and_holds_the_mask(tmp_path):
    first = Saved(tmp_path, ratio=0.3)
    content = torch.load(first.path, weights_only=True)
    assert SaliencyMask.from_state_dict(content["callbacks"]["SaliencyMasking"]["mask"]) == first.callback.mask
    loaded = SaliencyMask.load(first.path)
    assert loaded == first.callback.mask
    assert (loaded.ratio, loaded.metadata) == (0.3, first.callback.mask.metadata)


@without_its_callbacks
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 0.4}, r"mask of ratio 0\.3 by gradient, but ratio 0\.4 by gradient is asked for"),
        ({"ratio": 0.3, "score": "fisher"}, r"by gradient, but ratio 0\.3 by fisher is asked for\. Resume with the same"),
        ({"mask": half_mask(Plain())}, "another saliency mask than the one given"),
    ],
)
def test_resuming_with_another_mask_is_refused(arguments, message, tmp_path):
    first = Saved(tmp_path, ratio=0.3)
    with pytest.raises(MisconfigurationException, match=message):
        fit(Plain(), SaliencyMasking(**arguments), ckpt_path=first.path, max_epochs=2)


@pytest.mark.parametrize("ratio", [0, 1])
def test_a_mask_that_leaves_no_choice_measures_nothing(ratio, monkeypatch):
    def measured(_: Any) -> None:
        raise AssertionError("the forget set was looked at")

    monkeypatch.setattr(ForgetData, "forget_dataloader", measured)
    callback = SaliencyMasking(ratio)
    quiet_trainer(callback).fit(Plain(), ForgetData())
    assert callback.mask.num_kept == ratio * callback.mask.num_weights
    assert callback.mask.metadata["score"] == "gradient"
    with pytest.raises(AssertionError, match="the forget set was looked at"):
        quiet_trainer(SaliencyMasking(0.5)).fit(Plain(), ForgetData())


@without_its_callbacks
def test_a_random_mask_of_another_seed_is_refused(tmp_path):
    first = Saved(tmp_path, ratio=0.3, score="random", seed=1)
    with pytest.raises(MisconfigurationException, match=r"by random, seed 1, but .* by random, seed 2 is asked for"):
        fit(Plain(), SaliencyMasking(0.3, score="random", seed=2), ckpt_path=first.path, max_epochs=2)


@without_its_callbacks
def test_resuming_with_the_given_mask_goes_on(tmp_path):
    mask = half_mask(Plain())
    first, module, callback = Saved(tmp_path, mask=mask), Plain(), SaliencyMasking(mask=mask)
    fit(module, callback, ckpt_path=first.path, max_epochs=2)
    assert_frozen(first.original, copied(module), mask)


@without_its_callbacks
def test_testing_a_checkpoint_does_not_ask_for_its_settings(tmp_path):
    class Tested(Plain):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            pass

    first, callback = Saved(tmp_path, ratio=0.3), SaliencyMasking(0.9)
    quiet_trainer(callback).test(Tested(), loader(), ckpt_path=first.path, weights_only=True)
    assert callback.mask == first.callback.mask


def test_a_second_fit_with_the_same_callback_computes_a_new_mask():
    module, callback = Plain(), SaliencyMasking(0.3)
    fit(module, callback)
    first, between = callback.mask, copied(module)
    fit(module, callback)
    assert callback.mask != first
    assert callback.mask.metadata["network"] != first.metadata["network"]
    assert_frozen(between, copied(module), callback.mask)


def test_weights_that_cannot_be_trained_are_not_counted():
    module, callback = Plain(), SaliencyMasking(0.5)
    module.net[0].weight.requires_grad_(False)
    fit(module, callback)
    assert "0.weight" not in {name.removeprefix("net.") for name in callback.mask}
    assert callback.mask.num_weights == sum(weight.numel() for weight in weights_of(module).values()) == 246


@without_its_callbacks
@pytest.mark.parametrize(
    ("made", "asked", "message"),
    [
        ({}, {"freeze_buffers": True}, "made with freeze_buffers False, but True is asked for"),
        ({"freeze_buffers": True}, {}, "made with freeze_buffers True, but False is asked for"),
        ({"uncovered": "free"}, {}, "made with uncovered free, but frozen is asked for"),
    ],
)
def test_resuming_with_another_policy_is_refused(made, asked, message, tmp_path):
    first = Saved(tmp_path, ratio=0.3, **made)
    with pytest.raises(MisconfigurationException, match=message):
        fit(Plain(), SaliencyMasking(0.3, **asked), ckpt_path=first.path, max_epochs=2)
    fit(Plain(), SaliencyMasking(0.3, **made), ckpt_path=first.path, max_epochs=2)


def test_an_unknown_policy_is_refused_at_once():
    with pytest.raises(ValueError, match="uncovered must be 'frozen' or 'free', got 'held'"):
        SaliencyMasking(0.5, uncovered="held")
