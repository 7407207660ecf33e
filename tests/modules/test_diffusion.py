"""ClassDiffusion: its losses against a few lines of torch, what training leaves alone, and what test and predict report."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from salun_lightning.callbacks import GenerationEvaluator
from salun_lightning.data import ForgetClasses, ForgetRandom, Samples
from salun_lightning.methods import (
    ESD,
    FineTune,
    GradientAscent,
    Method,
    NegGradPlus,
    RandomLabel,
    Remap,
    SelectiveAmnesia,
)
from salun_lightning.modules.class_diffusion import ClassDiffusion
from salun_lightning.modules.sampling import Sampling
from salun_lightning.networks import SmallResNet
from salun_lightning.saliency import SaliencyMask, SaliencyMasking, saliency_scores
from tests.modules.small_diffusion import (
    CLASSES,
    NULL,
    STEPS,
    Plain,
    diffusion,
    images,
    noise_schedule,
    saved,
    some_samples,
    transformer,
    unet,
)
from tests.modules.small_runs import same, trainer, weights

ALPHAS = (1 - torch.linspace(1e-4, 0.02, STEPS)).cumprod(0)


def by_hand(network: nn.Module, inputs: Tensor, targets: Tensor, timesteps: Tensor, noise: Tensor, velocity: bool) -> Tensor:
    """The squared error of each element of the prediction."""
    alpha = ALPHAS[timesteps].view(-1, 1, 1, 1)
    clean = 2 * inputs - 1
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    wanted = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean if velocity else noise
    return (network(noisy, timesteps, class_labels=targets, return_dict=False)[0] - wanted) ** 2


def told(module: ClassDiffusion) -> list[Tensor]:
    """The class labels that the network will be called with."""
    labels: list[Tensor] = []
    module.network.register_forward_pre_hook(lambda *call: labels.append(call[2]["class_labels"]), with_kwargs=True)
    return labels


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = dict(module.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


@pytest.mark.parametrize("size", [1, 2, 7, 8])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_task_loss_is_that_of_the_reference(kind: str, size: int) -> None:
    module, samples = diffusion(noise=noise_schedule(prediction_type=kind)), some_samples(size)
    torch.manual_seed(5)
    loss = module.task_loss(samples)
    torch.manual_seed(5)
    half = torch.randint(STEPS, (-(-size // 2),))
    timesteps = torch.cat([half, STEPS - 1 - half])[:size]
    noise = torch.randn(size, 1, 4, 4)
    expected = by_hand(module.network, samples.inputs, samples.targets, timesteps, noise, kind == "v_prediction")
    torch.testing.assert_close(loss, expected.sum() / (size * 16))
    torch.testing.assert_close(gradients(module, loss), gradients(module, expected.mean()))


def test_timesteps_come_in_pairs() -> None:
    module = diffusion()
    for size in (1, 5, 8):
        noisy, timesteps, wanted = module.noised(some_samples(size))
        assert len(noisy) == len(timesteps) == len(wanted) == size
        assert timesteps.min() >= 0
        assert timesteps.max() < STEPS
        half = (size + 1) // 2
        assert torch.equal(timesteps[half:], STEPS - 1 - timesteps[: size - half])


def test_label_dropout_puts_the_null_class_in_training_alone() -> None:
    samples = some_samples(400)
    module = diffusion(label_dropout=0.25)
    labels = told(module)
    module.train().task_loss(samples)
    dropped = labels[-1] == NULL
    assert torch.equal(labels[-1][~dropped], samples.targets[~dropped])
    assert 0.15 < dropped.float().mean() < 0.35
    module.eval().task_loss(samples)
    assert torch.equal(labels[-1], samples.targets)
    module.train().forget_loss(samples)
    assert torch.equal(labels[-1], samples.targets)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_label_dropout_of_none_and_of_all(share: float) -> None:
    module, samples = diffusion(label_dropout=share), some_samples(50)
    labels = told(module)
    module.train().task_loss(samples)
    assert torch.equal(labels[-1], torch.full_like(samples.targets, NULL) if share else samples.targets)


def drawn(index: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Timestep and noise of one sample of the forget loss."""
    generator = torch.Generator().manual_seed(seed * 1_000_003**2 + index)
    return torch.randint(STEPS, (1,), generator=generator), torch.randn(1, 4, 4, generator=generator)


def forget_loss_by_hand(module: ClassDiffusion, samples: Any, guidance: float, seed: int = 0) -> Tensor:
    errors = []
    for image, target, index in zip(*samples, strict=True):
        timestep, noise = drawn(int(index), seed)
        alpha = ALPHAS[timestep]
        noisy = (alpha.sqrt() * (2 * image - 1) + (1 - alpha).sqrt() * noise).unsqueeze(0)
        toward = module.network(noisy, timestep, class_labels=target.view(1)).sample
        without = module.network(noisy, timestep, class_labels=torch.tensor([NULL])).sample
        errors.append((without + guidance * (toward - without) - noise).square().mean())
    return torch.stack(errors).mean()


@pytest.mark.parametrize("guidance", [1.0, 0.0, 3.0])
def test_forget_loss_is_that_of_the_reference(guidance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "6")
    module, samples = diffusion(sampling=Sampling(guidance=guidance)), some_samples(7, first=90)
    loss, expected = module.forget_loss(samples), forget_loss_by_hand(module, samples, guidance, seed=6)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(module.network, loss), gradients(module.network, expected))


def test_guidance_keeps_one_graph_at_a_time() -> None:
    """Both halves are computed without a graph; then each of them is computed again, and its graph is gone before the next."""
    module, events = diffusion(sampling=Sampling(guidance=2.0)), list[str]()

    def note(_: nn.Module, __: Any, output: Tensor) -> None:
        events.append("forward")
        if output.requires_grad:
            output.register_hook(lambda _: events.append("backward"))

    module.network.conv_in.register_forward_hook(note)
    module.forget_loss(some_samples(4)).backward()
    assert [event for event in events if event == "forward"] == ["forward"] * 4
    assert events[2:] == ["forward", "backward", "forward", "backward"]


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_halves_of_guidance_give_the_mask_of_one_batch(precision: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mask() -> SaliencyMask:
        masking = SaliencyMasking(0.25)  # at RATIO the last weight that is chosen and the next one have equal scores
        module = diffusion(method=FineTune(), sampling=Sampling(guidance=2.0))
        trainer(tmp_path, max_steps=1, callbacks=[masking], precision=precision).fit(module, datamodule=images())
        assert masking.mask is not None
        return masking.mask

    def both_at_once(predict: Any, noisy: Tensor, timesteps: Tensor, conditions: Tensor, null: Tensor, scale: float) -> Tensor:
        toward, without = predict(noisy.repeat(2, 1, 1, 1), timesteps.repeat(2), torch.cat([conditions, null])).chunk(2)
        return without + scale * (toward - without)

    halves = mask()
    monkeypatch.setattr("salun_lightning.modules.diffusion.with_guidance", both_at_once)
    whole = mask()
    assert halves.iou(whole) == 1 if precision == "64-true" else halves.iou(whole) > 0.9


def test_the_gradient_of_guidance_reaches_both_branches() -> None:
    module, samples = diffusion(sampling=Sampling(guidance=2.0)), some_samples(6)._replace(targets=torch.ones(6).long())
    embedding = gradients(module.network, module.forget_loss(samples))["class_embedding.weight"]
    assert [bool(row.any()) for row in embedding] == [False, True, False, True]  # its class and the null class


def test_noise_of_the_forget_loss_depends_on_the_number_and_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module, samples = diffusion().double(), some_samples(9, first=40)
    whole = module.forget_loss(samples)
    torch.rand(3)  # whatever was drawn before
    assert module.forget_loss(samples) == whole
    backwards = type(samples)(*(field.flip(0) for field in samples))
    torch.testing.assert_close(module.forget_loss(backwards), whole)
    alone = [module.forget_loss(type(samples)(*(field[i : i + 1] for field in samples))) for i in range(9)]
    torch.testing.assert_close(torch.stack(alone).mean(), whole)
    renumbered = samples._replace(indices=samples.indices + 1)
    assert not torch.isclose(module.forget_loss(renumbered), whole)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert not torch.isclose(module.forget_loss(samples), whole)


def test_the_forget_loss_draws_no_random_numbers_of_training() -> None:
    module = diffusion()
    before = torch.get_rng_state()
    module.forget_loss(some_samples(5))
    assert torch.equal(torch.get_rng_state(), before)


def in_batches(samples: Any, size: int) -> list[Any]:
    return [type(samples)(*fields) for fields in zip(*(field.split(size) for field in samples), strict=True)]


RATIO = 0.3


def scores_by_hand(module: ClassDiffusion, samples: Any, guidance: float) -> dict[str, Tensor]:
    """The magnitude of the sum of per-sample gradients."""
    total = {name: torch.zeros_like(weight) for name, weight in module.network.named_parameters()}
    for sample in in_batches(samples, 1):
        for name, gradient in gradients(module.network, forget_loss_by_hand(module, sample, guidance)).items():
            total[name] += gradient
    return {name: value.abs() for name, value in total.items()}


def agree_away_from_the_threshold(first: SaliencyMask, second: SaliencyMask, scores: dict[str, Tensor]) -> bool:
    """Whether masks are equal, but for scores so close to the threshold that rounding decides."""
    every = torch.cat([score.flatten() for score in scores.values()])
    threshold = every.sort(descending=True).values[int(RATIO * len(every)) - 1]
    clear = {name: (score - threshold).abs() > 1e-4 * threshold for name, score in scores.items()}
    assert sum(int((~c).sum()) for c in clear.values()) < 0.01 * len(every)
    return all(torch.equal(first[name][clear[name]], second[name][clear[name]]) for name in scores)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_mask_is_that_of_the_reference(guidance: float) -> None:
    module, samples = diffusion(sampling=Sampling(guidance=guidance)), some_samples(11)
    scores = saliency_scores(module, in_batches(samples, 4))
    expected = scores_by_hand(module, samples, guidance)
    assert scores.keys() == expected.keys()
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    mask = SaliencyMask.from_scores(scores, RATIO)
    every = torch.cat([scores[name].flatten() for name in scores])
    order = every.argsort(descending=True, stable=True)
    flat = torch.cat([mask[name].flatten() for name in scores])
    assert flat.sum() == mask.num_kept == int(RATIO * len(every))
    assert flat[order[: mask.num_kept]].all()
    sizes, shapes = [s.numel() for s in expected.values()], [s.shape for s in expected.values()]
    kept = torch.zeros(len(every), dtype=torch.bool)
    kept[torch.cat([s.flatten() for s in expected.values()]).argsort(descending=True, stable=True)[: mask.num_kept]] = True
    reference = {n: part.view(shape) for n, part, shape in zip(expected, kept.split(sizes), shapes, strict=True)}
    assert agree_away_from_the_threshold(mask, SaliencyMask(reference), expected)


def test_the_mask_repeats_bit_for_bit_and_follows_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    module, batches = diffusion(label_dropout=0.5), in_batches(some_samples(20), 8)
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    first = SaliencyMask.from_scores(saliency_scores(module, batches), RATIO)
    torch.rand(5)
    assert SaliencyMask.from_scores(saliency_scores(module, batches), RATIO) == first
    monkeypatch.setenv("PL_GLOBAL_SEED", "4")
    assert SaliencyMask.from_scores(saliency_scores(module, batches), RATIO) != first


def test_the_mask_does_not_depend_on_the_batch_size() -> None:
    module, samples = diffusion(sampling=Sampling(guidance=2.0)), some_samples(64)
    scores = {size: saliency_scores(module, in_batches(samples, size)) for size in (1, 7, 64)}
    masks = {size: SaliencyMask.from_scores(score, RATIO) for size, score in scores.items()}
    for size in (7, 64):
        torch.testing.assert_close(scores[size], scores[1], rtol=1e-3, atol=1e-5)
        assert agree_away_from_the_threshold(masks[size], masks[1], scores[1])


METHODS: dict[str, Method] = {
    "FT": FineTune(),
    "all": FineTune(order="all"),
    "GA": GradientAscent(),
    "NegGrad+": NegGradPlus(),
    "RL": RandomLabel(),
    "Remap": Remap(),
    "ESD": ESD(),
    "SA": SelectiveAmnesia(images=2, timesteps=2),
}


@pytest.mark.parametrize(
    ("name", "masked"), [*((name, True) for name in METHODS), *((n, False) for n in ("FT", "Remap", "SA"))]
)
def test_every_method_trains_with_and_without_a_mask(tmp_path: Path, name: str, masked: bool) -> None:
    module = diffusion(method=METHODS[name], label_dropout=0.1)
    before = weights(module)
    callback = SaliencyMasking(RATIO)
    runner = trainer(tmp_path, max_epochs=1, callbacks=[callback] if masked else [])
    runner.fit(module, datamodule=images())
    assert torch.isfinite(runner.callback_metrics["train/loss"])
    assert module.network.training
    moved = sum(int((before[key] != tensor).sum()) for key, tensor in module.state_dict().items())
    total = sum(tensor.numel() for tensor in before.values())
    if masked:
        assert 0.5 * callback.mask.num_kept < moved <= callback.mask.num_kept == int(RATIO * total)
        assert all(
            torch.equal(before[f"network.{n}"][~m], module.network.get_parameter(n)[~m]) for n, m in callback.mask.items()
        )
    else:
        assert moved > 0.5 * total


@pytest.mark.parametrize("name", ["GA", "NegGrad+", "SA"])
def test_what_is_unlearned_keeps_its_class(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Label dropout would have the prediction without a class unlearned, which guidance starts from."""
    method, kept, learnt = METHODS[name], [], []
    module = diffusion(method=method, label_dropout=1.0)
    unlearned, task, denoise = module.unlearned_loss, module.task_loss, module.denoise
    told: list[list[int]] = []

    def watched(noisy: Tensor, timesteps: Tensor, targets: Tensor | None = None, original: bool = False) -> Tensor:
        told.append([] if targets is None else targets.tolist())
        return denoise(noisy, timesteps, targets, original)

    def noted(loss: Any, into: list[Any]) -> Any:
        def of(samples: Samples) -> Tensor:
            told.clear()
            value = loss(samples)
            into.append((samples.targets.tolist(), told[0]))
            return value

        return of

    monkeypatch.setattr(module, "denoise", watched)
    monkeypatch.setattr(module, "unlearned_loss", noted(unlearned, kept))
    monkeypatch.setattr(module, "task_loss", noted(task, learnt))
    trainer(tmp_path, max_epochs=1).fit(module, datamodule=images())
    assert kept
    assert all(targets == heard and NULL not in heard for targets, heard in kept)
    assert all(set(heard) == {NULL} for _, heard in learnt)
    assert bool(learnt) == (name != "GA")


def test_training_learns_to_draw_the_images(tmp_path: Path) -> None:
    """Every image of a class is alike: the error falls far below that of a prediction of zero, which is 1."""
    module = diffusion(method=FineTune(order="all"))
    data = images(batch_size=10)
    data.given.train.images[:] = 255 * data.given.train.targets.view(-1, 1, 1, 1).clamp(max=1).to(torch.uint8)
    runner = trainer(tmp_path, max_epochs=15)
    runner.fit(module, datamodule=data)
    assert runner.callback_metrics["train/loss"] < 0.7


@pytest.mark.parametrize("name", ["Remap", "ESD", "SA"])
def test_the_reference_is_the_original_frozen_and_apart(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = METHODS[name]
    module = diffusion(method=method, label_dropout=0.5)
    original, seen = weights(module.network), []

    def loss(*args: Any) -> Tensor:
        reference = module.reference
        ours = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
        theirs = {tensor.untyped_storage().data_ptr() for tensor in (*reference.parameters(), *reference.buffers())}
        seen.append(
            not ours & theirs
            and not any(child.training for child in reference.modules())
            and not any(parameter.requires_grad for parameter in reference.parameters())
            and module.network.training
            and same(weights(reference), original)
        )
        return type(method).loss(method, *args)

    monkeypatch.setattr(method, "loss", loss)
    trainer(tmp_path, max_epochs=3).fit(module, datamodule=images())
    assert len(seen) > 2
    assert all(seen)
    assert not same(weights(module.network), original)
    with pytest.raises(MisconfigurationException, match="There is no original model to refer to"):
        _ = module.reference


def test_the_original_is_read_before_the_reference_is_kept(tmp_path: Path) -> None:
    original = unet(seed=9)
    path = saved(diffusion(original), tmp_path)
    module = diffusion(unet(seed=1), method=Remap(), original=path)
    kept: list[Any] = []
    module.on_train_epoch_end = lambda: kept.append(weights(module.reference))  # type: ignore[method-assign]
    trainer(tmp_path, max_epochs=2).fit(module, datamodule=images())
    assert len(kept) == 2
    assert all(same(reference, weights(original)) for reference in kept)


def test_a_second_fit_of_one_module_still_refers_to_the_original(tmp_path: Path) -> None:
    path = saved(diffusion(unet(seed=9)), tmp_path)
    module = diffusion(unet(seed=1), method=Remap(), original=path)
    kept: list[Any] = []
    module.on_train_epoch_end = lambda: kept.append(weights(module.reference))  # type: ignore[method-assign]
    runner = trainer(tmp_path, max_epochs=1)
    runner.fit(module, datamodule=images())
    runner.save_checkpoint(tmp_path / "one.ckpt")
    trainer(tmp_path, max_epochs=2).fit(module, datamodule=images(), ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    assert len(kept) == 2
    assert same(kept[0], kept[1])


@pytest.mark.parametrize("network", [unet, transformer])
def test_gradient_checkpointing_computes_the_same_gradients(network: Any) -> None:
    samples = some_samples(6, size=8 if network is transformer else 4)
    plain, saving = diffusion(network()), diffusion(network(), gradient_checkpointing=True)
    assert saving.network.is_gradient_checkpointing
    assert not plain.network.is_gradient_checkpointing
    found = []
    for module in (plain, saving):
        torch.manual_seed(3)
        loss = module.train().task_loss(samples)
        loss.backward()
        found.append({name: weight.grad for name, weight in module.named_parameters() if weight.grad is not None})
    assert found[0]
    torch.testing.assert_close(found[0], found[1])


def test_a_network_without_gradient_checkpointing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^Plain offers no gradient checkpointing\.$"):
        diffusion(Plain(), gradient_checkpointing=True)


@pytest.mark.parametrize("method", [FineTune(), Remap(), ESD(), SelectiveAmnesia(images=1, timesteps=1)])
def test_a_transformer_trains_is_masked_and_samples(tmp_path: Path, method: Method) -> None:
    module, callback = diffusion(transformer(), method=method), SaliencyMasking(RATIO)
    before = weights(module)
    trainer(tmp_path, max_epochs=1, callbacks=[callback]).fit(module, datamodule=images(size=8))
    assert callback.report["drift"] == 0
    assert not same(weights(module), before)
    assert callback.mask.num_kept == int(RATIO * sum(p.numel() for p in module.parameters() if p.requires_grad))
    drawn_images = module.eval().sample(torch.arange(3), torch.zeros(3).long())
    assert drawn_images.shape == (3, 1, 8, 8)
    assert drawn_images.min() >= 0
    assert drawn_images.max() <= 1


def test_any_network_with_the_same_signature_trains_and_is_masked(tmp_path: Path) -> None:
    module, callback = diffusion(Plain(), method=Remap()), SaliencyMasking(0.5)
    before = weights(module)
    trainer(tmp_path, max_epochs=1, callbacks=[callback]).fit(module, datamodule=images())
    assert not same(weights(module), before)
    assert callback.mask.num_kept == 7  # of 14
    assert callback.report["drift"] == 0
    with pytest.raises(MisconfigurationException, match="give it a config with sample_size and in_channels"):
        module.sample(torch.tensor([0]), torch.tensor([0]))
    module.network.config = {"sample_size": (4, 6), "in_channels": 1}
    assert module.sample(torch.tensor([0]), torch.tensor([0])).shape == (1, 1, 4, 6)


@pytest.mark.parametrize("settings", [{"label_dropout": 0.1}, {"sampling": Sampling(guidance=2.0)}])
def test_guidance_and_label_dropout_need_a_null_class(tmp_path: Path, settings: dict[str, Any]) -> None:
    module = diffusion(unet(num_class_embeds=CLASSES), null_class=None, **settings)
    with pytest.raises(ValueError, match="Guidance and label dropout need a null class, and the model has none"):
        trainer(tmp_path).test(module, datamodule=images(), verbose=False)


@pytest.mark.parametrize(
    ("network", "null"),
    [(unet, 3), (transformer, 3), (lambda: unet(num_class_embeds=3), None), (lambda: unet(num_class_embeds=5), None)],
)
def test_the_null_class_is_the_one_embedding_more_than_classes(tmp_path: Path, network: Any, null: int | None) -> None:
    module = diffusion(network(), null_class=None)
    trainer(tmp_path).test(module, datamodule=images(size=module.latent_shape[1]), verbose=False)
    assert module.null == null


def test_losses_of_samples_are_those_whose_mean_is_the_task_loss() -> None:
    module, samples = diffusion(), some_samples(7)
    torch.manual_seed(5)
    losses = module.losses(samples)
    torch.manual_seed(5)
    noisy, timesteps, wanted = module.noised(samples)
    each = (module.denoise(noisy, timesteps, samples.targets) - wanted).square().flatten(1).mean(1)
    torch.testing.assert_close(losses, each)
    torch.manual_seed(5)
    torch.testing.assert_close(losses.mean(), module.task_loss(samples))
    assert losses.shape == (7,)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_label_dropout_out_of_range(share: float) -> None:
    with pytest.raises(ValueError, match=f"label_dropout must lie between 0 and 1, got {share}"):
        diffusion(label_dropout=share)


def test_a_null_class_that_is_a_class_of_the_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"null_class 2 is the number of a class of the data, which has 3\."):
        trainer(tmp_path, max_epochs=1).fit(diffusion(null_class=2), datamodule=images())


@pytest.mark.parametrize(
    ("network", "null_class", "needed"),
    [(unet(num_class_embeds=2), None, 3), (unet(num_class_embeds=3), 3, 4), (transformer(num_embeds_ada_norm=2), 3, 4)],
)
def test_a_network_with_too_few_embeddings(tmp_path: Path, network: Any, null_class: int | None, needed: int) -> None:
    with pytest.raises(ValueError, match=rf"The network embeds {2 + (needed == 4)} classes, but {needed} are needed: 3 of"):
        trainer(tmp_path).test(diffusion(network, null_class=null_class), datamodule=images(), verbose=False)


def test_a_model_without_a_null_class_trains_and_samples(tmp_path: Path) -> None:
    module = diffusion(unet(num_class_embeds=3), null_class=None, method=Remap())
    before = weights(module)
    trainer(tmp_path, max_epochs=1).fit(module, datamodule=images())
    assert not same(weights(module), before)
    assert module.sample(torch.tensor([2]), torch.tensor([0])).shape == (1, 1, 4, 4)
    with pytest.raises(ValueError, match="A prediction without a class needs a null class, and the model has none"):
        module.denoise(torch.zeros(1, 1, 4, 4), torch.tensor([1]))


def judge(per_condition: int = 8, **kwargs: Any) -> GenerationEvaluator:
    torch.manual_seed(0)
    network = SmallResNet(CLASSES, width=4, stages=1, in_channels=1)
    return GenerationEvaluator(per_condition, classifier=network, features="classifier", **kwargs)


def measured(module: ClassDiffusion, folder: Path, **kwargs: Any) -> dict[str, float]:
    results = trainer(folder).test(module, datamodule=images(**kwargs), verbose=False)
    return {name: value for result in results for name, value in result.items()}


SETS = ("forget", "retain", "test", "test_forget")


def test_test_reports_the_error_on_every_set(tmp_path: Path) -> None:
    module, data = diffusion(), images()
    metrics = measured(module, tmp_path)
    assert metrics.keys() == {f"test/{name}/loss" for name in SETS}
    data.setup()
    train, test, _ = data.load()
    gone = test.targets == 0
    parts = {
        "forget": (train, data.forget_indices),
        "retain": (train, data.retain_indices),
        "test": (test, (~gone).nonzero().flatten()),
        "test_forget": (test, gone.nonzero().flatten()),
    }
    for name, (source, rows) in parts.items():
        samples = type(some_samples(1))(source.images[rows].float() / 255, source.targets[rows], rows)
        assert metrics[f"test/{name}/loss"] == pytest.approx(forget_loss_by_hand(module, samples, 1.0).item(), rel=1e-5)


def test_the_error_need_not_be_measured(tmp_path: Path) -> None:
    """It takes a pass over all images; what is measured of generated ones stays the same."""
    whole, part = (measured(diffusion(evaluation=judge(), test_loss=wanted), tmp_path) for wanted in (True, False))
    assert part == {name: value for name, value in whole.items() if not name.startswith("test/")}
    assert part["num_real"] > 0


def test_the_losses_that_are_reported_repeat(tmp_path: Path) -> None:
    module = diffusion(sampling=Sampling(steps=5, guidance=2.0), label_dropout=0.5)
    first = measured(module, tmp_path)
    assert measured(module, tmp_path) == first  # without guidance, and without dropout
    assert measured(module, tmp_path, batch_size=3) == pytest.approx(first, rel=1e-5)
    found = []
    for _ in range(2):
        results = trainer(tmp_path, limit_val_batches=1.0).validate(module, datamodule=images(val_fraction=0.2), verbose=False)
        found.append({name: value for result in results for name, value in result.items()})
        torch.rand(3)
    assert found[0] == found[1]
    assert found[0].keys() == {"val/forget/loss", "val/val/loss"}


def test_validation_while_training_is_logged(tmp_path: Path) -> None:
    runner = trainer(tmp_path, max_epochs=1, limit_val_batches=1.0)
    runner.fit(diffusion(), datamodule=images())
    assert runner.callback_metrics.keys() == {"train/loss", "val/forget/loss"}


def test_images_are_sampled_and_measured(tmp_path: Path) -> None:
    module = diffusion(evaluation=judge())
    metrics = measured(module, tmp_path)
    quality = {name: value for name, value in metrics.items() if not name.startswith("test/")}
    compared = {"FID", "KID", "precision", "recall", "num_real", "num_generated", "FID_real", "num_test"}
    assert quality.keys() == {"UA", "entropy", "acc", "acc/0", "acc/1", "acc/2"} | compared
    assert (quality["num_real"], quality["num_generated"], quality["num_test"]) == (20, 16, 8)
    targets, numbers = torch.arange(3).repeat_interleave(8), torch.arange(8).repeat(3)
    drawn_images = (255 * module.sample(targets, numbers)).round() / 255
    with torch.no_grad():
        probabilities = judge().classifier(drawn_images).softmax(1)
    correct = (probabilities.argmax(1) == targets).double()
    assert quality["UA"] == pytest.approx(100 - 100 * correct[:8].mean().item(), abs=1e-4)
    assert quality["acc"] == pytest.approx(100 * correct[8:].mean().item(), abs=1e-4)
    assert quality["acc/1"] == pytest.approx(100 * correct[8:16].mean().item(), abs=1e-4)
    entropy = -(probabilities * probabilities.log()).sum(1)[:8].mean().item()
    assert quality["entropy"] == pytest.approx(entropy, abs=1e-4)


def test_a_test_repeats_whatever_the_batch_size(tmp_path: Path) -> None:
    module = diffusion(evaluation=judge())
    before = weights(module)
    first = measured(module, tmp_path)
    assert measured(module, tmp_path) == first
    other = measured(module, tmp_path, batch_size=5)
    assert other == pytest.approx(first, rel=2e-2, abs=2e-2)  # KID takes subsets in the order of the images
    assert {name: other[name] for name in ("UA", "acc", "entropy")} == pytest.approx(
        {name: first[name] for name in ("UA", "acc", "entropy")}, abs=1e-3
    )
    assert same(weights(module), before)


def test_predict_draws_what_is_requested(tmp_path: Path) -> None:
    module = diffusion(evaluation=GenerationEvaluator(3, [0, 2]))
    (batches,) = [trainer(tmp_path).predict(module, datamodule=images(batch_size=4))]
    assert [output["set"] for output in batches] == ["generated"] * 2
    joined = {name: torch.cat([output[name] for output in batches]) for name in ("image", "target", "index")}
    assert joined["target"].tolist() == [0, 0, 0, 2, 2, 2]
    assert joined["index"].tolist() == [0, 1, 2, 0, 1, 2]
    assert joined["image"].dtype == torch.uint8
    expected = (255 * module.sample(joined["target"], joined["index"])).round()
    assert (joined["image"].float() - expected).abs().max() <= 1


def test_predict_without_a_request_for_images(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="images that are asked for: give its evaluation"):
        trainer(tmp_path).predict(diffusion(), datamodule=images())


def own_features() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6))


@pytest.mark.parametrize("evaluation", [judge, lambda: GenerationEvaluator(1, features=own_features())])
def test_what_judges_is_neither_trained_nor_masked_nor_saved(tmp_path: Path, evaluation: Any) -> None:
    module, callback = diffusion(evaluation=evaluation(), method=Remap()), SaliencyMasking(RATIO)
    runner = trainer(tmp_path, max_epochs=1, callbacks=[callback])
    runner.fit(module, datamodule=images())
    runner.save_checkpoint(tmp_path / "last.ckpt")
    network = dict(module.network.named_parameters())
    assert set(callback.mask) == set(network)
    optimized = [weight for group in runner.optimizers[0].param_groups for weight in group["params"]]
    assert {id(weight) for weight in optimized} == {id(weight) for weight in network.values()}
    saved_keys = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"].keys()
    assert saved_keys == {f"network.{name}" for name in module.network.state_dict()}


def test_retained_classes_are_those_not_forgotten_whole(tmp_path: Path) -> None:
    found = []
    for request in (ForgetClasses([2, 0]), ForgetRandom(count=3)):
        module = diffusion()
        module.on_test_start = lambda module=module: found.append(module.retained_classes.tolist())  # type: ignore[misc]
        trainer(tmp_path).test(module, datamodule=images(forget=request), verbose=False)
    assert found == [[1], [0, 1, 2]]


def test_a_transformer_drops_no_labels_of_its_own() -> None:
    """It would drop the class in the part that is to be forgotten as well, in each block by itself."""
    module = diffusion(transformer()).train()
    samples = some_samples(4, size=8)
    first, second = (module.denoise(samples.inputs, torch.full((4,), 3), samples.targets) for _ in range(2))
    assert torch.equal(first, second)
