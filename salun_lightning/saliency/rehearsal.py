"""A training step rehearsed: its gradients come out, and nothing else changes."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from salun_lightning.weights import local_of

_PARTS = {"_parameters", "_buffers", "_modules"}
_CONTAINERS = (list, dict, set, deque)


@contextmanager
def undisturbed(module: LightningModule, weights: bool = False) -> Iterator[Callable[[], None]]:
    """Eval mode, no gradients and no logging inside; everything as it was outside.

    That is: gradients, random state, and of every submodule the mode, the buffers, which parameters and submodules it has, and
    attributes that are tensors, numbers, strings, references, or lists, dictionaries and sets of those.

    Args:
        module: The module.
        weights: Whether weights are written to inside, so that they have to be copied and put back.

    Yields:
        What puts back all but gradients and random state, for use in between.
    """
    gradients = {parameter: parameter.grad for parameter in module.parameters()}
    modes = [(child, child.training) for child in module.modules()]
    try:
        module.eval()
        module.zero_grad()
        with isolate_rng(), _replaced(module, {"log": _ignore, "log_dict": _ignore}), _no_loggers(module):
            put_back = _snapshot(module, weights)
            try:
                yield put_back
            finally:
                put_back()
    finally:
        for child, mode in modes:
            child.training = mode
        for parameter, gradient in gradients.items():
            parameter.grad = gradient


def _snapshot(module: nn.Module, weights: bool) -> Callable[[], None]:
    tensors = [*module.buffers(), *(module.parameters() if weights else ())]
    tensors += [value for child in module.modules() for value in vars(child).values() if isinstance(value, Tensor)]
    values = [(tensor, tensor.detach(), tensor.detach().clone()) for tensor in tensors]
    restorers = [_restorer(child) for child in module.modules()]

    def put_back() -> None:
        for restore in restorers:
            restore()
        with torch.no_grad():
            for tensor, storage, value in values:
                if tensor.layout == torch.strided and local_of(tensor).data_ptr() != local_of(storage).data_ptr():
                    tensor.data = storage
                storage.copy_(value)

    return put_back


def _restorer(child: nn.Module) -> Callable[[], None]:
    attributes = {name: value for name, value in vars(child).items() if name not in _PARTS}
    contents = [snapshot for value in attributes.values() for snapshot in _snapshots(value)]
    contents += [(part, _items(part)) for name in _PARTS if isinstance(part := vars(child).get(name), dict)]

    def restore() -> None:
        for name in vars(child).keys() - attributes.keys() - _PARTS:
            del vars(child)[name]
        vars(child).update(attributes)
        for container, items in contents:
            _refill(container, items)

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
def _replaced(module: LightningModule, stand_ins: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
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


def _ignore(*_: Any, **__: Any) -> None:
    """Stand in for a method whose effects must not outlive the rehearsal."""
