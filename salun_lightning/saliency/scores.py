"""How salient each weight is: one pass over the forget set."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, Strategy
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torchmetrics import Metric

from salun_lightning.saliency.weights import weights_of

Score = Literal["gradient", "fisher", "snip", "magnitude", "random"]


def saliency_scores(
    module: LightningModule,
    batches: Iterable[Any],
    score: Score = "gradient",
    *,
    seed: int = 0,
    strategy: Strategy | None = None,
) -> dict[str, Tensor]:
    r"""Score every trainable weight by what the forget set says about it.

    - ``gradient``: :math:`|\sum_i \nabla_\theta \ell_f(x_i)|`, the saliency of SalUn (Fan et al., ICLR 2024, section 4): signed
      gradients are summed over the whole forget set, and the magnitude is taken last.
    - ``fisher``: :math:`\sum_i (\nabla_\theta \ell_f(x_i))^2`, the diagonal of the empirical Fisher information; one backward
      pass a sample.
    - ``snip``: :math:`|\theta \cdot \sum_i \nabla_\theta \ell_f(x_i)|` (Lee et al., ICLR 2019).
    - ``magnitude``: :math:`|\theta|`, which does not look at the data.
    - ``random``: uniform numbers, the control.

    The forget loss is ``module.forget_loss`` of the ``forget`` part of a batch where the module has one, else what
    ``module.training_step`` returns or, under manual optimization, what its optimizers would have stepped with. A loss is taken
    as a mean over its batch and counts as many times as the batch has samples, so the batch size does not matter. The network
    runs in eval mode and without autocast. Gradients, logged values, metrics, random state, train/eval mode and buffers are
    left as they were found.

    One pass serves any number of ratios: hand the result to :meth:`SaliencyMask.from_scores` once for each.

    Args:
        module: The module whose trainable weights are scored.
        batches: The forget set. With several processes each of them iterates over all of it, and they share the work.
        score: Which score.
        seed: Seed of the ``random`` score.
        strategy: The strategy the module runs under; None for a module in this process, on its own device.

    Returns:
        A non-negative tensor of each weight's shape, at least float32, by plain weight name; the same on all ranks
        (``DTensor`` where the weight is one).

    Raises:
        ValueError: The forget set is empty, or ``training_step`` returns no loss.
    """
    if score not in get_args(Score):
        raise ValueError(f"Unknown saliency score '{score}'; choose from {', '.join(get_args(Score))}.")
    weights = weights_of(module)
    if score == "random":
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.rand(weight.shape, generator=generator) for name, weight in weights.items()}
    if score == "magnitude":
        return {name: _at_least_float32(weight.detach()).abs() for name, weight in weights.items()}
    sums = _Sums(weights, squared=score == "fisher")
    with _undisturbed(module), torch.enable_grad():
        for batch, share in _shares(module, batches, sums.squared, strategy):
            _accumulate(module, batch, share, sums, strategy)
            sums.harvest(weights.values(), eagerly=False)
        sums.harvest(weights.values())
    scores = sums.over_ranks(strategy)
    if score == "snip":
        return {name: (total * weights[name].detach()).abs() for name, total in scores.items()}
    return {name: total.abs() for name, total in scores.items()}


class _Sums:
    """Sums of gradients, at least in float32. Float32 gradients are summed by autograd where they already lie."""

    def __init__(self, weights: Mapping[str, nn.Parameter], squared: bool) -> None:
        self.weights = weights
        self.squared = squared
        self.totals: dict[nn.Parameter, Tensor] = {}

    def harvest(self, parameters: Iterable[nn.Parameter], eagerly: bool = True) -> None:
        """Move gradients into the totals. Unless ``eagerly``, leave those that may stay where they are."""
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is None or not (eagerly or self.squared or gradient.element_size() < 4):
                continue
            parameter.grad = None
            gradient = _at_least_float32(gradient.to_dense() if gradient.is_sparse else gradient)
            if self.squared:
                gradient = gradient.square()
            total = self.totals.get(parameter)
            self.totals[parameter] = gradient if total is None else total.add_(gradient)

    def over_ranks(self, strategy: Strategy | None) -> dict[str, Tensor]:
        """The totals of all ranks together, by weight name; zero where no gradient came."""
        totals = {}
        for name, weight in self.weights.items():
            total = self.totals.pop(weight, None)
            if total is None:
                total = torch.zeros_like(weight.detach(), dtype=_at_least_float32(weight.detach()).dtype)
            if strategy is not None and not isinstance(strategy, ModelParallelStrategy):
                total = strategy.reduce(total, reduce_op="sum")
            totals[name] = total
        return totals


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.element_size() >= 4 else tensor.float()


def _shares(
    module: LightningModule, batches: Iterable[Any], squared: bool, strategy: Strategy | None
) -> Iterator[tuple[Any, float]]:
    """This rank's batches and how much each counts: equally many on every rank, because sharded passes are collective.

    Sharded gradients come out as the mean over the ranks. Squares must be of one sample's gradient, so there every rank looks
    at the same sample; sums are shared out, and multiplied by the number of ranks.
    """
    rank, world = (strategy.global_rank, strategy.world_size) if isinstance(strategy, ParallelStrategy) else (0, 1)
    sharded = isinstance(strategy, ModelParallelStrategy)
    if squared:
        batches = (sample for batch in batches for sample in _samples(batch))
    if squared and sharded:
        rank, world = 0, 1
    group: list[Any] = []
    found = False
    for batch in batches:
        found = True
        group.append(batch)
        if len(group) == world:
            yield _ready(module, group[rank], strategy), float(world if sharded else 1)
            group = []
    if group:  # the ranks that are left over run along on a batch that does not count
        mine = rank < len(group)
        yield _ready(module, group[rank if mine else 0], strategy), float(mine) * (world if sharded else 1)
    if not found:
        raise ValueError("The forget set is empty, so there is no saliency. Check the forget request.")


def _samples(batch: Any) -> Iterator[Any]:
    size = extract_batch_size(batch)
    for i in range(size):
        yield apply_to_collection(batch, Tensor, lambda t, i=i: t[i : i + 1] if t.ndim and len(t) == size else t)


def _ready(module: LightningModule, batch: Any, strategy: Strategy | None) -> Any:
    if strategy is None:
        return module.transfer_batch_to_device(batch, module.device, 0)
    return strategy.batch_to_device(strategy.precision_plugin.convert_input(batch))


def _accumulate(module: LightningModule, batch: Any, share: float, sums: _Sums, strategy: Strategy | None) -> None:
    """Add the gradient of one batch, summed over its samples."""
    weight = share * extract_batch_size(batch)
    context: AbstractContextManager[Any] = nullcontext()
    # autocast would make the mask depend on the training precision
    if strategy is not None and not isinstance(strategy.precision_plugin, MixedPrecision):
        context = strategy.precision_plugin.forward_context()
    forget_loss: Callable[[Any], Tensor] | None = getattr(module, "forget_loss", None)
    if forget_loss is not None:
        forget = batch["forget"] if isinstance(batch, Mapping) and "forget" in batch else batch
        with context:
            loss = forget_loss(forget)
        (loss * weight).backward()
    elif module.automatic_optimization:
        with context:
            output = _training_step(module, batch)
        loss = output["loss"] if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise ValueError(
                f"{type(module).__name__}.training_step returned no loss for a batch of the forget set; give the module a"
                " forget_loss(batch)."
            )
        (loss * weight).backward()
    else:
        _accumulate_manually(module, batch, weight, sums, context)


def _training_step(module: LightningModule, batch: Any) -> Any:
    parameters = inspect.signature(module.training_step).parameters
    return module.training_step(batch, 0) if "batch_idx" in parameters else module.training_step(batch)


def _accumulate_manually(
    module: LightningModule, batch: Any, weight: float, sums: _Sums, context: AbstractContextManager[Any]
) -> None:
    """Run a manual ``training_step`` and take the gradients that each of its optimizers would have stepped with."""
    recorders = [_Recorder(optimizer, sums) for optimizer in module.trainer.optimizers]
    stand_ins: dict[str, Callable[..., Any]] = {
        "optimizers": lambda *_, **__: recorders[0] if len(recorders) == 1 else recorders,
        "lr_schedulers": lambda: None if not module.trainer.lr_scheduler_configs else _ignored_schedulers(module),
        "manual_backward": lambda loss, *args, **kwargs: (loss * weight).backward(*args, **kwargs),
        "clip_gradients": _ignore,
    }
    with _replaced(module, stand_ins), context:
        _training_step(module, batch)
    for recorder in recorders:
        recorder.finish()


class _Recorder:
    """Stands in for an optimizer: records what it would have stepped with, and moves nothing."""

    def __init__(self, optimizer: torch.optim.Optimizer, sums: _Sums) -> None:
        self._optimizer = optimizer
        self._sums = sums
        self._stepped = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def step(self, closure: Callable[[], Any] | None = None, **_: Any) -> None:
        if closure is not None:
            closure()
        self._sums.harvest(self._parameters)
        self._stepped = True

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        yield

    def finish(self) -> None:
        """After a training step: drop what the step left behind for the next ``zero_grad`` of this optimizer."""
        if self._stepped:
            self._optimizer.zero_grad()


def _ignored_schedulers(module: LightningModule) -> Any:
    schedulers = [_IgnoredScheduler() for _ in module.trainer.lr_scheduler_configs]
    return schedulers[0] if len(schedulers) == 1 else schedulers


class _IgnoredScheduler:
    def step(self, *_: Any, **__: Any) -> None:
        """Do nothing: the saliency pass is not a training step."""


def _ignore(*_: Any, **__: Any) -> None:
    """Stand in for a method whose effects must not outlive the saliency pass."""


@contextmanager
def _replaced(module: LightningModule, stand_ins: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    attributes = vars(module)
    before = {name: attributes[name] for name in stand_ins if name in attributes}
    attributes.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del attributes[name]
        attributes.update(before)


@contextmanager
def _undisturbed(module: LightningModule) -> Iterator[None]:
    """Eval mode and no gradients inside; everything as it was outside."""
    modes = {child: child.training for child in module.modules()}
    gradients = {parameter: parameter.grad for parameter in module.parameters()}
    buffers = {buffer: buffer.detach().clone() for buffer in module.buffers()}
    metrics = {
        child: {**vars(child), **{name: _copied(state) for name, state in child.metric_state.items()}}
        for child in module.modules()
        if isinstance(child, Metric)
    }
    try:
        module.eval()
        module.zero_grad()
        with isolate_rng(), _replaced(module, {"log": _ignore, "log_dict": _ignore}):
            yield
    finally:
        for child, training in modes.items():
            child.training = training
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)
        for metric, attributes in metrics.items():
            vars(metric).update(attributes)


def _copied(state: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    return list(state) if isinstance(state, list) else state.clone()
