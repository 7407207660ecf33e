"""Sums of gradients over a set: what saliency, Fisher information and other edits of weights are made of."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, Strategy
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from salun_lightning.saliency.rehearsal import undisturbed
from salun_lightning.saliency.twins import is_a
from salun_lightning.weights import weights_of


def gradient_sums(
    module: LightningModule,
    batches: Iterable[Any],
    squared: bool = False,
    loss: Callable[[Any], Tensor] | None = None,
    strategy: Strategy | None = None,
    weights: Mapping[str, nn.Parameter] | None = None,
    absolute: bool = False,
) -> dict[str, Tensor]:
    r"""Sum the gradients of a loss over the samples of a set: :math:`\sum_i \nabla_\theta \ell(x_i)`.

    With ``squared`` the square of the gradient of **each sample** is summed: :math:`\sum_i (\nabla_\theta \ell(x_i))^2`.
    Divided by their number, this is the diagonal of the empirical Fisher information. It takes one backward pass a sample.
    (The square of the gradient of a batch would be faster, but it depends on how many samples a batch has, so that two sets of
    different size could not be compared.) With ``absolute`` it is the absolute value in the place of the square.

    The loss is ``loss``, or else ``module.forget_loss`` where the module has one, or else what ``module.training_step``
    returns. It is taken as a mean over its batch, and it counts once for each sample, so the batch size does not matter. If a
    batch is a dictionary with the part ``forget``, a loss gets that part. The network runs in eval mode and without autocast.
    Gradients, logged values, metrics, random state, train/eval mode, buffers and weights are left as they were found. (While
    ``training_step`` runs, a copy of the weights is kept, because it may move those of a momentum or target network.)

    Args:
        module: The module whose trainable weights the gradients are of.
        batches: The set, in batches of tensors. With several processes each of them iterates over all of it, and they share the
            work.
        squared: Whether the gradient of each sample is squared.
        loss: Another loss than the module's, a mean over its batch.
        strategy: The strategy the module runs under; None for a module in this process, on its own device.
        weights: These weights of the module alone, by the names that the result is to have.
        absolute: Whether the absolute value of the gradient of each sample is taken.

    Returns:
        A tensor of each weight's shape, at least float32, by plain weight name; the same on all ranks (``DTensor`` where the
        weight is one).

    Raises:
        ValueError: There is no sample, no loss or no gradient, the module is under manual optimization and has no
            ``forget_loss``, or gradients are to be both ``squared`` and ``absolute``.

    Example:
        >>> module = LightningModule()
        >>> module.slope = nn.Parameter(torch.tensor(1.0))
        >>> batches = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
        >>> gradient_sums(module, batches, loss=lambda inputs: (module.slope * inputs).mean())
        {'slope': tensor(6.)}
        >>> gradient_sums(module, batches, squared=True, loss=lambda inputs: (module.slope * inputs).mean())
        {'slope': tensor(14.)}
    """
    if squared and absolute:
        raise ValueError("Gradients can be squared or absolute, not both. Choose one.")
    of_each = torch.square if squared else torch.abs if absolute else None
    weights = weights_of(module) if weights is None else weights
    loss = loss or getattr(module, "forget_loss", None)
    if loss is None and not module.automatic_optimization:
        raise ValueError(
            f"{type(module).__name__} optimizes manually, so its training_step does not say which loss the gradients are of."
            " Give the module a forget_loss(batch) that returns a scalar tensor."
        )
    sums = _Sums(weights, of_each)
    with undisturbed(module, weights=loss is None) as put_back, torch.enable_grad():
        for batch, share in _shares(batches, of_each is not None, strategy):
            ready = _ready(module, batch, strategy)
            with _context(strategy):
                value = _loss_of(module, loss, ready)
            _backward(module, strategy, value * (share * extract_batch_size(ready)))
            sums.harvest(weights.values(), eagerly=False)
            if loss is None:
                put_back()
        sums.harvest(weights.values())
    return dict(sums.over_ranks(strategy))


def at_least_float32(tensor: Tensor) -> Tensor:
    """A tensor in no less than single precision."""
    return tensor if tensor.element_size() >= 4 else tensor.float()


class _Sums:
    """Sums of gradients, at least in float32. Float32 gradients are summed by autograd where they already lie."""

    def __init__(self, weights: Mapping[str, nn.Parameter], of_each: Callable[[Tensor], Tensor] | None) -> None:
        self.weights = weights
        self.of_each = of_each
        self.totals: dict[nn.Parameter, Tensor] = {}

    def harvest(self, parameters: Iterable[nn.Parameter], eagerly: bool = True) -> None:
        """Move gradients into the totals. Unless ``eagerly``, leave those that may stay where they are."""
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is None or not (eagerly or self.of_each or gradient.element_size() < 4):
                continue
            parameter.grad = None
            gradient = at_least_float32(gradient.to_dense() if gradient.is_sparse else gradient)
            if self.of_each is not None:
                gradient = self.of_each(gradient)
            total = self.totals.get(parameter)
            self.totals[parameter] = gradient if total is None else total.add_(gradient)

    def over_ranks(self, strategy: Strategy | None) -> Iterator[tuple[str, Tensor]]:
        """The totals of all ranks together, by weight name; zero where no gradient came."""
        if not self.totals and self.weights:
            raise ValueError(
                "No gradient of the loss reaches a trainable weight. Check that forget_loss, or training_step, uses the output"
                " of the network."
            )
        sharded = is_a(strategy, ModelParallelStrategy)
        for name, weight in self.weights.items():
            total = self.totals.pop(weight, None)
            if total is None:
                total = torch.zeros_like(weight.detach(), dtype=at_least_float32(weight.detach()).dtype)
            if strategy is not None and not isinstance(total, DTensor):  # shards were averaged in the backward pass
                total = strategy.reduce(total, reduce_op="mean" if sharded else "sum")
            yield name, total


def _shares(batches: Iterable[Any], one_by_one: bool, strategy: Strategy | None) -> Iterator[tuple[Any, float]]:
    """This rank's batches and how much each counts: equally many on every rank, because sharded passes are collective.

    Sharded gradients come out as the mean over the ranks. A square or absolute value must be of one sample's gradient, so there
    every rank looks at the same sample; sums are shared out, and multiplied by the number of ranks.
    """
    rank, world, factor = 0, 1, 1
    sharded = is_a(strategy, ModelParallelStrategy)
    if is_a(strategy, ParallelStrategy) and not (one_by_one and sharded):
        share = strategy.distributed_sampler_kwargs  # type: ignore[union-attr]
        rank, world, factor = share["rank"], share["num_replicas"], share["num_replicas"] if sharded else 1
    if one_by_one:
        batches = (sample for batch in batches for sample in _samples(batch))
    group: list[Any] = []
    found = False
    for batch in batches:
        found = True
        group.append(batch)
        if len(group) == world:
            yield group[rank], factor
            group = []
    if group:  # the ranks that are left over run along on a batch that does not count
        yield (group[rank], factor) if rank < len(group) else (group[0], 0)
    if not found:
        raise ValueError("There is no sample to take the gradient of. Check which set the batches are of.")


def _samples(batch: Any) -> Iterator[Any]:
    size = extract_batch_size(batch)
    for i in range(size):
        yield apply_to_collection(batch, Tensor, lambda t, i=i: t[i : i + 1] if t.ndim and len(t) == size else t)


def _ready(module: LightningModule, batch: Any, strategy: Strategy | None) -> Any:
    """The batch as the training loop would hand it to the module."""
    if strategy is not None:
        batch = strategy.precision_plugin.convert_input(batch)
    device = module.device if strategy is None else strategy.root_device
    return module._apply_batch_transfer_handler(module._on_before_batch_transfer(batch), device=device)


def _context(strategy: Strategy | None) -> AbstractContextManager[Any]:
    """That of the precision, but for autocast: it would make the mask depend on the training precision."""
    if strategy is None or is_a(strategy.precision_plugin, MixedPrecision):
        return nullcontext()
    return strategy.precision_plugin.forward_context()


def _backward(module: LightningModule, strategy: Strategy | None, loss: Tensor) -> None:
    if not getattr(getattr(strategy, "model", None), "static_graph", False):
        loss.backward()
        return
    # the hooks of a DistributedDataParallel with static_graph would take this for its first training step
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def _loss_of(module: LightningModule, loss: Callable[[Any], Tensor] | None, batch: Any) -> Tensor:
    """The loss of one batch: a mean over its samples."""
    if loss is not None:
        value: Any = loss(batch["forget"] if isinstance(batch, Mapping) and "forget" in batch else batch)
    else:
        output = _training_step(module, batch)
        value = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(value, Tensor):
        source = "training_step" if loss is None else "forget_loss"
        raise ValueError(
            f"{type(module).__name__}.{source} returned no loss for a batch of the forget set. Give the module a"
            " forget_loss(batch) that returns a scalar tensor."
        )
    return value


def _training_step(module: LightningModule, batch: Any) -> Any:
    with_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    try:
        return module.training_step(batch, 0) if with_index else module.training_step(batch)
    except KeyError as error:
        if error.args != ("retain",):
            raise
        raise ValueError(
            f"{type(module).__name__}.training_step needs the retain part of a batch, but saliency is that of the forget part"
            " alone. Give the module a forget_loss(batch), which is handed that part."
        ) from error
