"""A training step rehearsed: its gradients come out, and nothing else changes."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchmetrics import Metric

Backward = Callable[..., None]
Harvest = Callable[[Iterable[nn.Parameter]], None]

_INTERNAL = vars(nn.Module()).keys() - {"training"}
_CONTAINERS = (list, dict, set, deque)


@contextmanager
def undisturbed(module: LightningModule) -> Iterator[None]:
    """Eval mode, no gradients and no logging inside; everything as it was outside.

    That is: gradients, random state, and of every submodule the mode, the buffers, the state of metrics, and attributes that
    are numbers, strings, references, or lists, dictionaries and sets of those.
    """
    gradients = {parameter: parameter.grad for parameter in module.parameters()}
    restorers = [_restorer(child) for child in module.modules()]
    try:
        module.eval()
        module.zero_grad()
        with isolate_rng(), replaced(module, {"log": _ignore, "log_dict": _ignore}), _no_loggers(module):
            yield
    finally:
        for restore in restorers:
            restore()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient


def _restorer(child: nn.Module) -> Callable[[], None]:
    attributes = {name: value for name, value in vars(child).items() if name not in _INTERNAL}
    if isinstance(child, Metric):
        attributes.update((name, state.clone()) for name, state in child.metric_state.items() if isinstance(state, Tensor))
    contents = [snapshot for value in attributes.values() for snapshot in _snapshots(value)]
    buffers = dict(child._buffers)
    values = {name: buffer.detach().clone() for name, buffer in buffers.items() if buffer is not None}

    def restore() -> None:
        vars(child).update(attributes)
        for container, items in contents:
            _refill(container, items)
        child._buffers.update(buffers)
        with torch.no_grad():
            for name, value in values.items():
                child._buffers[name].copy_(value)  # type: ignore[union-attr]

    return restore


def _snapshots(value: Any) -> Iterator[tuple[Any, list[Any]]]:
    """Every container in a value, itself first, with the references that it holds."""
    if isinstance(value, _CONTAINERS):
        items = _items(value)
        yield value, items
        for item in items:
            yield from _snapshots(item[1] if isinstance(value, dict) else item)


def _items(container: Any) -> list[Any]:
    return list(container.items() if isinstance(container, dict) else container)


def _refill(container: Any, items: list[Any]) -> None:
    now = _items(container)
    pairs = zip(now, items, strict=False)
    if isinstance(container, dict):
        unchanged = all(one[0] is other[0] and one[1] is other[1] for one, other in pairs)
    else:
        unchanged = all(one is other for one, other in pairs)
    if unchanged and len(now) == len(items):
        return  # it may be of a kind that cannot be changed at all
    container.clear()
    (container.extend if isinstance(container, list | deque) else container.update)(items)


@contextmanager
def _no_loggers(module: LightningModule) -> Iterator[None]:
    """Loggers that swallow what a training step hands them directly."""
    trainer = module._trainer
    loggers = trainer.loggers if trainer is not None else []
    if trainer is None or not loggers:
        yield
        return
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers


@contextmanager
def replaced(module: LightningModule, stand_ins: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Methods of the module replaced by others."""
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
def manual_optimization(module: LightningModule, backward: Backward, harvest: Harvest) -> Iterator[None]:
    """Inside, a manual ``training_step`` moves nothing: what its optimizers would step with is harvested instead.

    Args:
        module: The module, attached to a trainer that has its optimizers.
        backward: Called in the place of ``manual_backward``.
        harvest: Called with the parameters whose gradients are to be taken.
    """
    recorders = [_Recorder(optimizer, module, harvest) for optimizer in module.trainer.optimizers]
    schedulers = [_IdleScheduler(config.scheduler) for config in module.trainer.lr_scheduler_configs]
    stand_ins: dict[str, Callable[..., Any]] = {
        "optimizers": lambda *_, **__: recorders[0] if len(recorders) == 1 else recorders,
        "lr_schedulers": lambda: schedulers[0] if len(schedulers) == 1 else schedulers or None,
        "manual_backward": backward,
        "clip_gradients": _ignore,
    }
    with replaced(module, stand_ins):
        yield
    for recorder in recorders:
        recorder.finish()


class _Recorder:
    """Stands in for an optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer, module: LightningModule, harvest: Harvest) -> None:
        self._optimizer = optimizer
        self._module = module
        self._harvest = harvest
        self._stepped = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    @property
    def optimizer(self) -> "_Recorder":
        return self

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def step(self, closure: Callable[[], Any] | None = None, **_: Any) -> Any:
        output = closure() if closure is not None else None
        self._harvest(self._parameters)
        self._stepped = True
        return output

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        with self._module.toggled_optimizer(self):  # type: ignore[arg-type]
            yield

    def finish(self) -> None:
        """What it did not step with in this training step: the start of an accumulation, or else for ``zero_grad``."""
        if self._stepped:
            self._optimizer.zero_grad()
        else:
            self._harvest(self._parameters)


class _IdleScheduler:
    """Stands in for a learning-rate scheduler."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

    def step(self, *_: Any, **__: Any) -> None:
        """Do nothing."""


def _ignore(*_: Any, **__: Any) -> None:
    """Stand in for a method whose effects must not outlive the rehearsal."""
