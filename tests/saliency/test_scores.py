"""Scores of a module with a ``forget_loss``, against sums of per-sample gradients."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from salun_lightning.data import DigitsDataModule, ForgetRandom, Samples
from salun_lightning.modules import ImageClassifier
from salun_lightning.networks import SmallResNet
from salun_lightning.saliency import SaliencyMask, saliency_scores
from salun_lightning.weights import weights_of

RATIOS = (0.05, 0.3, 0.5, 0.9)
FORGOTTEN = 71  # odd, and a multiple of none of the batch sizes


@pytest.fixture(scope="module")
def digits() -> DigitsDataModule:
    datamodule = DigitsDataModule(forget=ForgetRandom(count=FORGOTTEN, seed=4), batch_size=64)
    datamodule.setup()
    return datamodule


def classifier(dtype: torch.dtype = torch.float32) -> ImageClassifier:
    """The digits network with the statistics of BatchNorm as after some training; by default they do nothing."""
    torch.manual_seed(0)
    module = ImageClassifier(SmallResNet(10, width=4))
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.2)
            layer.running_var.uniform_(0.5, 2)
    return module.to(dtype)


def batches(datamodule: DigitsDataModule, size: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Samples]]:
    """The forget set as its loader hands it out, in batches of another size."""
    (whole,) = [joined(list(datamodule.forget_dataloader()))]
    inputs = whole.inputs.to(dtype)
    fields = zip(inputs.split(size), whole.targets.split(size), whole.indices.split(size), strict=True)
    return [{"forget": Samples(*parts)} for parts in fields]


def joined(parts: list[dict[str, Samples]]) -> Samples:
    return Samples(*(torch.cat(fields) for fields in zip(*(part["forget"] for part in parts), strict=True)))


def per_sample_gradients(module: ImageClassifier, datamodule: DigitsDataModule) -> dict[str, list[Tensor]]:
    """The reference: one sample at a time, straight from the data, in float64."""
    network = classifier(torch.float64).network
    network.load_state_dict(module.network.state_dict())
    network.eval()
    images, targets = datamodule._train[datamodule.forget_indices]
    names, weights = zip(*network.named_parameters(), strict=True)
    gradients = [
        torch.autograd.grad(functional.cross_entropy(network((image[None] / 255).double()), target[None]), weights)
        for image, target in zip(images, targets, strict=True)
    ]
    return {name: list(column) for name, column in zip(names, zip(*gradients, strict=True), strict=True)}


@pytest.fixture(scope="module")
def reference(digits) -> dict[str, list[Tensor]]:
    return per_sample_gradients(classifier(), digits)


def stable_sort_mask(scores: dict[str, Tensor], ratio: float) -> dict[str, Tensor]:
    flat = torch.cat([score.flatten() for score in scores.values()])
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[flat.sort(descending=True, stable=True).indices[: int(ratio * len(flat))]] = True
    parts = chosen.split([score.numel() for score in scores.values()])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def test_the_gradient_score_is_the_magnitude_of_the_sum_of_per_sample_gradients(digits, reference):
    module = classifier(torch.float64)
    scores = saliency_scores(module, batches(digits, 64, torch.float64))
    expected = {name: sum(gradients).abs() for name, gradients in reference.items()}
    assert list(scores) == list(expected)
    for ratio in RATIOS:
        mask, by_sorting = SaliencyMask.from_scores(scores, ratio), stable_sort_mask(expected, ratio)
        assert all(torch.equal(mask[name], by_sorting[name]) for name in expected), ratio
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_the_batch_size_matters_up_to_summation_error_at_the_threshold(size, digits, reference):
    """A sum over float32 gradients is off by some roundings (2**-24 each) of the largest sum of magnitudes in its tensor.

    The largest because within one sample a weight of a convolution already sums terms of both signs. 16 roundings are allowed
    (5 were seen). So weights may change sides only where their exact score lies that close to the threshold.
    """
    scores = saliency_scores(classifier(), batches(digits, size))
    exact = {name: sum(gradients).abs() for name, gradients in reference.items()}
    error = {n: 16 * 2**-24 * sum(g.abs() for g in gradients).max() for n, gradients in reference.items()}
    assert all(((scores[name] - exact[name]).abs() <= error[name]).all() for name in exact)
    for ratio in RATIOS:
        mask, expected = SaliencyMask.from_scores(scores, ratio), stable_sort_mask(exact, ratio)
        threshold = min(exact[name][expected[name]].min() for name in exact if expected[name].any())
        differing = {name: mask[name] ^ expected[name] for name in exact}
        for name, differs in differing.items():
            assert ((exact[name] - threshold).abs() <= error[name] + max(error.values()))[differs].all()
        assert sum(int(differs.sum()) for differs in differing.values()) <= 4


def test_the_sign_of_the_loss_does_not_matter(digits, monkeypatch):
    module = classifier()
    ascending = saliency_scores(module, batches(digits, 32))
    monkeypatch.setattr(module, "forget_loss", lambda samples: -module.task_loss(samples), raising=False)
    descending = saliency_scores(module, batches(digits, 32))
    assert all(torch.equal(ascending[name], descending[name]) for name in ascending)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_the_fisher_score_is_the_sum_of_squares(size, digits, reference):
    scores = saliency_scores(classifier(torch.float64), batches(digits, size, torch.float64), "fisher")
    expected = {name: sum(gradient.square() for gradient in gradients) for name, gradients in reference.items()}
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-12)


def test_the_snip_score_is_the_magnitude_of_weight_times_gradient(digits, reference):
    module = classifier(torch.float64)
    scores = saliency_scores(module, batches(digits, 64, torch.float64), "snip")
    weights = weights_of(module)
    expected = {name: (weights[name].detach() * sum(gradients)).abs() for name, gradients in reference.items()}
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_magnitude_score_does_not_look_at_the_data(dtype):
    module = classifier(dtype)
    scores = saliency_scores(module, (), "magnitude")
    for name, weight in weights_of(module).items():
        assert torch.equal(scores[name], weight.detach().abs())
        assert scores[name].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    before = {name: score.clone() for name, score in scores.items()}
    for score in scores.values():
        score.zero_()
    assert all(torch.equal(weight.detach().abs(), before[name]) for name, weight in weights_of(module).items())


def test_the_random_score_follows_its_seed_alone():
    module = classifier()
    torch.manual_seed(1)
    first = saliency_scores(module, (), "random", seed=3)
    torch.manual_seed(2)
    again, other = (saliency_scores(module, (), "random", seed=seed) for seed in (3, 4))
    assert {name: score.shape for name, score in first.items()} == {n: w.shape for n, w in weights_of(module).items()}
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_gradients_of_bf16_weights_are_summed_in_float32(digits):
    """Samples are summed one by one: in bf16 (8 bits) later samples would be rounded away, in float32 they are not."""
    module = classifier(torch.bfloat16)
    scores = saliency_scores(module, batches(digits, 1, torch.bfloat16))
    weights = weights_of(module)
    total = {name: torch.zeros(weight.shape) for name, weight in weights.items()}
    module.eval()
    for batch in batches(digits, 1, torch.bfloat16):
        gradients = torch.autograd.grad(module.forget_loss(batch["forget"]), list(weights.values()))
        for name, gradient in zip(weights, gradients, strict=True):
            total[name] += gradient.float()
    assert all(score.dtype == torch.float32 for score in scores.values())
    assert all(torch.equal(scores[name], total[name].abs()) for name in total)
    assert any(not torch.equal(score, score.bfloat16().float()) for score in scores.values())


def test_one_pass_serves_any_ratio(digits):
    scores = saliency_scores(classifier(), digits.forget_dataloader())
    sizes = {ratio: SaliencyMask.from_scores(scores, ratio) for ratio in RATIOS}
    assert [mask.num_kept for mask in sizes.values()] == [int(ratio * mask.num_weights) for ratio, mask in sizes.items()]
    assert sizes[0.3] & sizes[0.9] == sizes[0.3]


def test_weights_that_cannot_be_trained_have_no_score_and_unused_ones_have_0(digits):
    module = classifier()
    module.network.head.weight.requires_grad_(False)
    module.network.unused = nn.Linear(2, 2)
    scores = saliency_scores(module, batches(digits, 64))
    assert "head.weight" not in scores
    assert scores["head.bias"].any()
    assert not scores["unused.weight"].any()


def test_only_the_forget_part_of_a_batch_counts(digits):
    module = classifier()
    given = batches(digits, 32)
    retained = digits.train_dataloader().dataset[digits.retain_indices[:50].tolist()]["retain"]
    with_others = [{"retain": retained, **batch} for batch in given] + [{"retain": retained}]
    for score in ("gradient", "fisher"):
        alone, among = saliency_scores(module, given, score), saliency_scores(module, with_others, score)
        assert all(torch.equal(alone[name], among[name]) for name in alone)


@pytest.mark.parametrize("score", ["gradient", "fisher", "snip"])
@pytest.mark.parametrize("given", [[], [{"retain": torch.ones(2, 1)}]])
def test_an_empty_forget_set_is_refused(score, given):
    with pytest.raises(ValueError, match="forget set is empty, so there is no saliency"):
        saliency_scores(classifier(), given, score)


def test_a_loss_that_no_weight_has_a_part_in_is_refused(digits, monkeypatch):
    module = classifier()
    monkeypatch.setattr(module, "forget_loss", lambda samples: torch.ones((), requires_grad=True) * 1, raising=False)
    with pytest.raises(ValueError, match="No gradient of the loss reaches a trainable weight"):
        saliency_scores(module, batches(digits, 64))


def test_a_forget_loss_that_returns_none_is_refused(digits, monkeypatch):
    module = classifier()
    monkeypatch.setattr(module, "forget_loss", lambda samples: None, raising=False)
    with pytest.raises(ValueError, match=r"ImageClassifier\.forget_loss returned no loss"):
        saliency_scores(module, batches(digits, 64))


def test_a_loss_that_is_not_finite_is_refused_with_the_name_of_a_weight(digits, monkeypatch):
    module = classifier()
    monkeypatch.setattr(module, "forget_loss", lambda samples: module.task_loss(samples) * float("inf"), raising=False)
    scores = saliency_scores(module, batches(digits, 64))
    with pytest.raises(ValueError, match=r"saliency of 'stem\.0\.weight' contains NaN or infinity"):
        SaliencyMask.from_scores(scores, 0.5)


def test_an_unknown_score_is_refused():
    with pytest.raises(ValueError, match="Unknown saliency score 'hessian'; choose from gradient, fisher"):
        saliency_scores(classifier(), (), "hessian")
