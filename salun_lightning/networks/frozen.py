"""Networks that stand beside a trained one."""

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn
from typing_extensions import override


class Frozen(nn.Module):
    """Holds a network that is used and never trained, such as the original model, a judge, or the VAE of a pipeline.

    It is in eval mode and without gradients. It follows the module that it is a part of to devices and precisions, and is
    otherwise no part of it: its weights are in no checkpoint, no optimizer and no process group. Copies share it, because
    nothing changes it.

    Args:
        network: The network, which is changed in place.

    Example:
        >>> holder = Frozen(nn.Linear(2, 1))
        >>> list(holder.state_dict()), holder.double().network.weight.dtype
        ([], torch.float64)
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._held = [network.eval().requires_grad_(False)]  # in a list, where torch does not look for parts

    @property
    def network(self) -> nn.Module:
        """The network."""
        return self._held[0]

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # of to, cuda, double and the like
        self.network._apply(fn, recurse)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self.network)] = self.network  # also where else the copied object names it
        return self
