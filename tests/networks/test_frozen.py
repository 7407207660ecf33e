"""The holder of networks that stand beside a trained one."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from salun_lightning.networks.frozen import Frozen


class Module(nn.Module):
    """A trained layer, and a network beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(3, 3)
        self.beside = Frozen(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout()))


def test_it_is_in_eval_mode_and_without_gradients_whatever_is_done_to_the_module() -> None:
    module = Module().train().requires_grad_(True)
    assert module.network.training
    assert not any(part.training for part in module.beside.network.modules())
    assert not any(weight.requires_grad for weight in module.beside.network.parameters())


def test_it_is_no_part_of_the_module() -> None:
    """Neither of a checkpoint, nor of an optimizer, nor of what processes synchronise."""
    module = Module()
    assert list(module.state_dict()) == ["network.weight", "network.bias"]
    assert [name for name, _ in module.named_parameters()] == ["network.weight", "network.bias"]
    assert not list(module.buffers())
    module.load_state_dict(Module().state_dict())


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_it_follows_to_devices_and_precisions(device: str) -> None:
    module = Module().to(device, torch.float64)
    tensors = [*module.beside.network.parameters(), *module.beside.network.buffers()]
    assert {tensor.device.type for tensor in tensors} == {device}
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float64}
    assert module.bfloat16().beside.network[0].weight.dtype == torch.bfloat16


def test_copies_share_it() -> None:
    module = Module()
    copy = deepcopy(module)
    assert copy.network is not module.network
    assert copy.beside.network is module.beside.network


def test_it_is_called_like_the_network() -> None:
    module, inputs = Module(), torch.rand(4, 3)
    assert torch.equal(module.beside(inputs), module.beside.network(inputs))
