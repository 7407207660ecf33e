"""Names and bits of weights."""

import pytest
import torch
from torch import nn

from salun_lightning.weights import bits_of, fingerprint, plain_name, weights_of
from tests.saliency.helpers import small_network


@pytest.mark.parametrize(
    "name",
    [
        "layer1.0.weight",
        "network.layer1.0.weight",
        "model.layer1.0.weight",
        "module.layer1.0.weight",
        "_orig_mod.layer1.0.weight",
        "network._orig_mod.layer1.0.weight",
        "_orig_mod.network.layer1.0.weight",
        "module.network.layer1.0.weight",
        "network.module.layer1.0.weight",
        "model.model.layer1.0.weight",
        "network.layer1._orig_mod.0.weight",
        "network.layer1._checkpoint_wrapped_module.0.weight",
    ],
)
def test_wrappers_are_left_out_of_names(name):
    assert plain_name(name) == "layer1.0.weight"
    assert plain_name(plain_name(name)) == plain_name(name)


def test_names_that_merely_contain_a_wrapper_are_kept():
    assert plain_name("submodel.fc.weight") == "submodel.fc.weight"
    assert plain_name("encoder.model.weight") == "encoder.model.weight"


def test_only_weights_that_can_be_trained_count():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    network[0].weight.requires_grad_(False)
    assert list(weights_of(network)) == ["0.bias", "1.weight", "1.bias"]


def test_a_shared_weight_counts_once():
    network = nn.ModuleDict({"first": nn.Linear(2, 2, bias=False), "second": nn.Linear(2, 2, bias=False)})
    network["second"].weight = network["first"].weight
    assert list(weights_of(network)) == ["first.weight"]


def test_weights_that_differ_in_the_wrapper_alone_keep_their_names():
    pair = nn.ModuleDict({"network": nn.Linear(2, 2), "model": nn.Linear(2, 2)})
    assert list(weights_of(pair)) == ["network.weight", "network.bias", "model.weight", "model.bias"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_bits_share_the_storage(dtype):
    weight = nn.Parameter(torch.ones(2, 3).to(dtype))
    bits_of(weight).zero_()
    assert weight.float().eq(0).all()


def test_bits_of_a_channels_last_weight_share_the_storage():
    weight = torch.ones(2, 3, 2, 2).to(memory_format=torch.channels_last)
    bits_of(weight)[0, 1, 1, 0] = 0
    assert weight[0, 1, 1, 0] == 0
    assert weight.sum() == 23


def test_a_fingerprint_tells_values_names_and_shapes_apart():
    torch.manual_seed(0)
    network = small_network()
    digests = {fingerprint(weights_of(network).items())}
    digests.add(fingerprint((f"x{name}", weight) for name, weight in weights_of(network).items()))
    digests.add(fingerprint((name, weight.flatten()) for name, weight in weights_of(network).items()))
    with torch.no_grad():
        network[0].weight[0, 0, 0, 0] += 1e-6
    digests.add(fingerprint(weights_of(network).items()))
    assert len(digests) == 4


def test_a_fingerprint_does_not_depend_on_the_memory_layout():
    weight = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert fingerprint([("w", weight)]) == fingerprint([("w", weight.to(memory_format=torch.channels_last))])
    assert len(fingerprint([("flags", torch.ones(3, dtype=torch.bool)), ("counts", torch.arange(3))])) == 16
