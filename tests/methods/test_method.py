"""A method as a callback: its hooks, what they may write, what survives a resume, and which module it is for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from salun_lightning.data import Samples
from salun_lightning.methods import ESD, FineTune, Method, RandomLabel, Remap, SelectiveAmnesia
from salun_lightning.modules import ImageClassifier
from salun_lightning.saliency import SaliencyMask, SaliencyMasking, saliency_scores
from salun_lightning.weights import weights_of
from tests.modules.small_diffusion import attached, diffusion, some_samples
from tests.modules.small_runs import same, trainer, weights
from tests.small import small_datamodule


class Ordinary(Method):
    """As short as a method can be."""

    def loss(self, module: Any, batch: Any) -> Tensor:
        return sum(module.task_loss(part) for part in batch.values())


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3))


def classifier(method: Method, **kwargs: Any) -> ImageClassifier:
    return ImageClassifier(network(), method=method, **kwargs)


def test_the_order_is_paired_unless_a_method_says_otherwise(tmp_path: Path) -> None:
    assert (Ordinary().order, classifier(Ordinary()).order) == ("paired", "paired")
    data = small_datamodule()
    trainer(tmp_path, max_steps=1).fit(classifier(Ordinary()), datamodule=data)
    assert data.state_dict()["order"] == "paired"


HOOKS = [
    name
    for name in vars(Callback)
    if name.startswith("on_train") or (name.startswith("on_") and "exception" not in name and "load" not in name)
    if not name.startswith(("on_predict", "on_test", "on_sanity", "on_fit_start"))
]  # from the start of training on


class WritesEverywhere(Ordinary):
    """Adds 1 to all weights in every hook."""

    def __init__(self) -> None:
        self.called: set[str] = set()


def _writing(hook: str) -> Any:
    def write(self: WritesEverywhere, trainer: Any, pl_module: Any, *_: Any, **__: Any) -> None:
        self.called.add(hook)
        for weight in pl_module.network.parameters():
            weight.data.add_(1)

    return write


for _hook in HOOKS:
    setattr(WritesEverywhere, _hook, _writing(_hook))


class Watched(ImageClassifier):
    """Keeps the weights that each validation sees."""

    def validation_step(self, *arguments: Any) -> None:
        self.seen.append(weights(self.network))
        super().validation_step(*arguments)


@pytest.mark.filterwarnings("ignore:Something other than an optimizer wrote to weights outside:UserWarning")
def test_what_a_hook_writes_outside_the_mask_reaches_no_checkpoint_and_no_validation(tmp_path: Path) -> None:
    method = WritesEverywhere()
    module = Watched(network(), method=method)
    module.seen = []
    mask = SaliencyMask.from_scores(saliency_scores(module, [], "random", seed=1), 0.5)
    every = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, every_n_train_steps=1)
    ends = ModelCheckpoint(dirpath=tmp_path / "ends", save_top_k=-1, save_on_train_epoch_end=True)
    runner = trainer(
        tmp_path,
        max_epochs=2,
        callbacks=[SaliencyMasking(mask=mask), every, ends],
        limit_val_batches=1.0,
        num_sanity_val_steps=0,
        enable_checkpointing=True,
    )
    runner.fit(module, datamodule=small_datamodule(val_fraction=0.2))
    assert method.called == set(HOOKS)
    saved = [torch.load(path, weights_only=True)["state_dict"] for path in tmp_path.rglob("*.ckpt")]
    seen = [*module.seen, *({name.removeprefix("network."): t for name, t in state.items()} for state in saved)]
    seen.append(weights(module.network))
    assert len(saved) > 8
    assert len(module.seen) > 4
    for state in seen:
        for name, weight in network().named_parameters():
            assert torch.equal(state[name][~mask[name]], weight[~mask[name]]), name
    moved = sum(int((seen[-1][name] != weight).sum()) for name, weight in network().named_parameters())
    assert moved == mask.num_kept


class Counts(Ordinary):
    """Its loss depends on how many batches there were, also before a resume."""

    def __init__(self) -> None:
        self._count = 0

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self._count += 1

    def loss(self, module: Any, batch: Any) -> Tensor:
        return super().loss(module, batch) / (1 + self._count)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._count = state_dict["count"]


def test_what_a_method_keeps_survives_a_resume(tmp_path: Path) -> None:
    def run(epochs: int, resume: Path | None = None) -> ImageClassifier:
        module = classifier(Counts())
        runner = trainer(tmp_path, max_epochs=epochs)
        runner.fit(module, datamodule=small_datamodule(), ckpt_path=resume, weights_only=True if resume else None)
        runner.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module

    steps = run(1).method._count
    assert torch.load(tmp_path / "1.ckpt", weights_only=True)["callbacks"]["Counts"] == {"count": steps}
    whole, resumed = run(3), run(3, resume=tmp_path / "1.ckpt")
    assert resumed.method._count == whole.method._count == 3 * steps
    assert same(weights(resumed), weights(whole))


def test_a_trainer_that_trained_another_module_calls_the_present_method_alone(tmp_path: Path) -> None:
    before, now = Counts(), Ordinary()
    runner = trainer(tmp_path, max_epochs=1)
    runner.fit(classifier(before), datamodule=small_datamodule())
    count = before._count
    runner.fit_loop.max_epochs = 2
    runner.fit(classifier(now), datamodule=small_datamodule())
    assert before._count == count > 0
    assert [callback for callback in runner.callbacks if isinstance(callback, Method)] == [now]


@pytest.mark.parametrize("method", [ESD, Remap, SelectiveAmnesia])
def test_a_method_for_diffusion_models_refuses_a_classifier_at_once(method: type[Method]) -> None:
    with pytest.raises(ValueError, match=rf"^{method.__name__} is a method for diffusion models; ImageClassifier is none\.$"):
        classifier(method(), original="nowhere.ckpt")


def test_a_method_for_any_model_or_this_kind_is_taken() -> None:
    class Classifies(Ordinary):
        kind = "classifier"

    assert classifier(Classifies()).method.kind == "classifier"
    assert diffusion(method=RandomLabel()).method.kind == "any"
    with pytest.raises(ValueError, match="Classifies is a method for classifier models; ClassDiffusion is none"):
        diffusion(method=Classifies())


def test_only_what_is_trainable_is_trained_and_masked(tmp_path: Path) -> None:
    module, masking = classifier(FineTune(), trainable=r"^3\."), SaliencyMasking(0.5)
    trainer(tmp_path, max_epochs=1, callbacks=[masking]).fit(module, datamodule=small_datamodule())
    before, after = weights(network()), weights(module.network)
    assert masking.mask is not None
    assert set(masking.mask) == {"3.weight", "3.bias"}
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"3.weight", "3.bias"}


ENDS = {"time_embedding", "conv_norm_out", "conv_out"}


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("full", {*ENDS, "conv_in", "attn1.to_q", "attn2.to_q", "attn2.to_k", "attn2.to_v"}),
        ("xattn", {"attn2.to_q", "attn2.to_k", "attn2.to_v"}),
        ("xattn-strict", {"attn2.to_k", "attn2.to_v"}),
        ("noxattn", {"conv_in", "attn1.to_q"}),
        ("selfattn", {"attn1.to_q"}),
    ],
)
def test_parts_of_a_unet_by_name(name: str, chosen: set[str]) -> None:
    def linear(*parts: str) -> nn.ModuleDict:
        return nn.ModuleDict({part: nn.Linear(2, 2, bias=False) for part in parts})

    attention = nn.ModuleDict({"attn1": linear("to_q"), "attn2": linear("to_q", "to_k", "to_v")})
    layers = nn.ModuleDict({**linear("time_embedding", "conv_in", "conv_norm_out", "conv_out"), "blocks": attention})
    module = ImageClassifier(layers, trainable=name)
    assert {key.removeprefix("blocks.").removesuffix(".weight") for key in weights_of(module)} == chosen


def test_a_pattern_that_no_weight_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^trainable 'attn9' is found in the name of no weight .* called like '1\.weight'"):
        classifier(FineTune(), trainable="attn9")


def test_losses_are_those_of_each_sample() -> None:
    model, samples = classifier(FineTune()), next(iter(small_datamodule().set_dataloader("retain")))
    losses = model.losses(samples)
    alone = [model.task_loss(Samples(*(field[i : i + 1] for field in samples))) for i in range(len(samples.targets))]
    torch.testing.assert_close(losses, torch.stack(alone))
    torch.testing.assert_close(model.task_loss(samples), losses.mean(), rtol=0, atol=0)


def test_losses_of_a_diffusion_model_are_the_errors_of_its_predictions() -> None:
    model, samples = attached().eval(), some_samples(5)
    torch.manual_seed(3)
    losses = model.losses(samples)
    torch.manual_seed(3)
    noisy, timesteps, wanted = model.noised(samples)
    error = model.network(noisy, timesteps, class_labels=samples.targets).sample - wanted
    torch.testing.assert_close(losses, error.square().mean((1, 2, 3)))
    torch.manual_seed(3)
    torch.testing.assert_close(model.task_loss(samples), error.square().mean())
