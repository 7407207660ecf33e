"""What a run costs, in passes of one sample: counted by hand on a linear network."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from salun_lightning.comparison.observers import Passes


class Wrapped(nn.Module):
    """A network that answers with a dictionary, as those of other packages do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, images: Tensor) -> dict[str, Any]:
        return {"name": "logits", "logits": self.layer(images)}


def counted(module: Any) -> Passes:
    passes = Passes()
    passes.on_train_start(SimpleNamespace(), module)  # type: ignore[arg-type]
    return passes


def module() -> Any:
    reference = Wrapped().requires_grad_(False)
    return SimpleNamespace(network=Wrapped(), reference=reference, _reference=reference)


def test_a_forward_pass_counts_1_and_each_backward_pass_through_it_2() -> None:
    trained, images = module(), torch.rand(5, 3)
    passes = counted(trained)
    with torch.no_grad():
        trained.network(images)
        trained.reference(images)
    assert passes.number == 2 * 5
    loss = trained.network(images)["logits"].sum()
    assert passes.number == 3 * 5
    loss.backward()
    assert passes.number == 5 * 5
    one, other = trained.network(images)["logits"].unbind(1)  # as MUNBa does: two gradients of one answer
    one.sum().backward(retain_graph=True)
    other.sum().backward()
    assert passes.number == (5 + 1 + 2 + 2) * 5


def test_where_images_are_moved_a_backward_pass_through_a_frozen_network_counts_1() -> None:
    trained, images = module(), torch.rand(4, 3, requires_grad=True)
    passes = counted(trained)
    torch.autograd.grad(trained.reference(images)["logits"].sum(), images)
    assert passes.number == 2 * 4


@pytest.mark.parametrize("end", ["on_train_end", "on_exception"])
def test_after_the_training_nothing_is_counted(end: str) -> None:
    trained = module()
    passes = counted(trained)
    rest = [SimpleNamespace(), trained, *([ValueError()] if end == "on_exception" else [])]
    getattr(passes, end)(*rest)
    trained.network(torch.rand(2, 3))["logits"].sum().backward()
    assert passes.number == 0
