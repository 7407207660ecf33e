"""Networks: sizes, stems, and what is inside."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights, resnet18, squeezenet1_1

from salun_lightning.networks import SmallResNet, TorchvisionClassifier


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


@pytest.mark.parametrize(
    ("classes", "cifar_stem", "parameters"),
    [(10, True, 11_173_962), (100, True, 11_220_132), (10, False, 11_181_642), (1000, False, 11_689_512)],
)
def test_resnet18(classes: int, cifar_stem: bool, parameters: int) -> None:
    """The paper's network for CIFAR-10 and CIFAR-100, and torchvision's as it is."""
    with torch.device("meta"):
        assert count(TorchvisionClassifier("resnet18", classes, cifar_stem)) == parameters


def test_cifar_stem_keeps_the_resolution() -> None:
    with torch.device("meta"):
        model = TorchvisionClassifier("resnet18", 10, cifar_stem=True).model
    features = nn.Sequential(model.conv1, model.maxpool, model.layer1)(torch.zeros(1, 3, 32, 32, device="meta"))
    assert features.shape == (1, 64, 32, 32)
    assert model.conv1.kernel_size == (3, 3)


def test_stem_is_initialised_like_the_other_convolutions() -> None:
    """Kaiming, fan out: the variance is 2 / (64 x 9)."""
    weight = seeded(lambda: TorchvisionClassifier("resnet18", 10, cifar_stem=True)).model.conv1.weight
    # 1,728 normal draws: their standard deviation is known to 1.7 % (one standard error), so to 9 % in any case
    assert weight.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.09)


@pytest.mark.parametrize(("name", "reference"), [("resnet18", resnet18), ("squeezenet1_1", squeezenet1_1)])
def test_any_classifier_of_torchvision_behind_a_normalisation(name: str, reference: Callable[..., nn.Module]) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    ours = seeded(lambda: TorchvisionClassifier(name, 7, mean=mean, std=std))
    theirs = seeded(lambda: reference(num_classes=7))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    normalised = torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], 1)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(normalised))


def test_arguments_of_the_model_are_passed_on() -> None:
    network = TorchvisionClassifier("squeezenet1_1", 3, model_kwargs={"dropout": 0.125})
    assert [layer.p for layer in network.modules() if isinstance(layer, nn.Dropout)] == [0.125]


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_a_training_forward_gives_logits_alone(name: str) -> None:
    with torch.device("meta"):
        network = TorchvisionClassifier(name, 3, model_kwargs={"init_weights": False})
        logits = network(torch.zeros(2, 3, 299, 299))
    assert isinstance(logits, Tensor)
    assert logits.shape == (2, 3)
    assert not [weight for weight, _ in network.named_parameters() if "aux" in weight.lower()]


@pytest.mark.parametrize("name", ["resnet19", "fcn_resnet50", "raft_small", ""])
def test_no_such_classifier(name: str) -> None:
    with pytest.raises(ValueError, match=f"torchvision has no classifier '{name}'"):
        TorchvisionClassifier(name, 10)


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_no_stem_to_replace(name: str) -> None:
    with pytest.raises(ValueError, match=f"cifar_stem replaces the first layers of a ResNet; '{name}' has none such"):
        TorchvisionClassifier(name, 10, cifar_stem=True)


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [
        # stem, stages of two 3 x 3 convolutions and two norms, with a 1 x 1 convolution and a norm from the second on, head
        ({}, 176 + 4_672 + 14_528 + 57_728 + 650),
        ({"width": 4, "stages": 1}, (9 * 4 + 8) + (2 * 9 * 16 + 16) + (4 * 10 + 10)),
        ({"in_channels": 3, "width": 4, "stages": 1, "blocks": 2}, (27 * 4 + 8) + 2 * (2 * 9 * 16 + 16) + (4 * 10 + 10)),
    ],
)
def test_small_resnet_size(arguments: dict[str, int], parameters: int) -> None:
    assert count(SmallResNet(10, **arguments)) == parameters


@pytest.mark.parametrize(("stages", "resolution"), [(1, 8), (2, 4), (3, 2)])
def test_small_resnet_halves_the_resolution_each_stage(stages: int, resolution: int) -> None:
    network = SmallResNet(10, width=4, stages=stages)
    features = network.blocks(network.stem(torch.zeros(2, 1, 8, 8)))
    assert features.shape == (2, 4 * 2 ** (stages - 1), resolution, resolution)


NETWORKS = {
    "small": lambda: SmallResNet(4, in_channels=3, width=4, stages=2),
    "resnet18": lambda: TorchvisionClassifier("resnet18", 4, cifar_stem=True),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_checkpoint_holds_no_constants(name: str) -> None:
    network = NETWORKS[name]()
    assert not [key for key in network.state_dict() if "normalize" in key]
    assert {"normalize.mean", "normalize.std"} <= {key for key, _ in network.named_buffers()}


def test_normalisation_is_inside_the_small_network() -> None:
    plain = seeded(lambda: SmallResNet(4, width=4, stages=1, mean=(0.0,), std=(1.0,)))
    normalising = seeded(lambda: SmallResNet(4, width=4, stages=1, mean=(0.25,), std=(0.5,)))
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(normalising(images), plain((images - 0.25) / 0.5))


@pytest.mark.parametrize("name", NETWORKS)
def test_channels_last_gives_the_same_result(name: str) -> None:
    network, images = seeded(NETWORKS[name]), torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network(images)
        last = network.to(memory_format=torch.channels_last)(images.contiguous(memory_format=torch.channels_last))
    # the same sums of at most 4,608 terms in another order: float32 keeps about 6 digits
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_weight_gets_a_gradient(name: str) -> None:
    network = NETWORKS[name]()
    network(torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_weights_of_torchvision_bring_their_own_preparation(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a download: random weights of the right names and shapes."""
    offered = get_model_weights("squeezenet1_1")["DEFAULT"]
    made = seeded(squeezenet1_1)
    monkeypatch.setattr(type(offered), "get_state_dict", lambda *_, **__: made.state_dict())
    network = TorchvisionClassifier("squeezenet1_1", weights="DEFAULT").eval()
    images = torch.rand(2, 3, 300, 250)
    expected = made.eval()(offered.transforms()(images))
    assert expected.shape == (2, 1000)
    torch.testing.assert_close(network(images), expected)
    with pytest.raises(ValueError, match=r"torchvision has no weights 'V9' of squeezenet1_1\. It has: IMAGENET1K_V1, DEFAULT"):
        TorchvisionClassifier("squeezenet1_1", weights="V9")
    with pytest.raises(ValueError, match="Give num_classes: without weights, the number of classes is not known"):
        TorchvisionClassifier("resnet18")
