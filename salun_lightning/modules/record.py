"""What a checkpoint says of the run that made it: method, seed, and how the network was made."""

import functools
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from salun_lightning.callbacks import GenerationEvaluator
from salun_lightning.data import run_seed
from salun_lightning.methods.base import Method

KEY = "made_by"
_TRUSTED = {"salun_lightning", "torch", "torchvision", "diffusers", "timm", "transformers"}


def record_of(module: LightningModule, method: Method) -> dict[str, Any]:
    """Plain data for a checkpoint: seed, method and, of a run from a configuration, the model's part of that."""
    record = what_was_run(method)
    configuration = None if module._trainer is None else _configuration(module._trainer)
    return record if configuration is None else {**record, "model": configuration}


def what_was_run(method: Method) -> dict[str, Any]:
    """The seed of this run, and its method: what a run that goes on must have, too."""
    return {"seed": run_seed(), "method": _described(method)}


def check_resumed(record: Mapping[str, Any], method: Method) -> None:
    """Refuse to go on with a run under another method or seed.

    Raises:
        MisconfigurationException: One of them differs.
    """
    if record.get("seed", run_seed()) != run_seed():
        raise MisconfigurationException(
            f"The checkpoint is of a run with seed {record['seed']}, but this one has seed {run_seed()}: they cannot be one"
            f" run. Give seed_everything {record['seed']}, or start a new run."
        )
    before, now = record.get("method", {}), _described(method)
    if not _fit(before, now):
        raise MisconfigurationException(
            f"The checkpoint is of a run with the method {_shown(before)}, but this one has {_shown(now)}: they cannot be one"
            " run. Give the same method, or start a new run with the checkpoint as original."
        )


def _described(method: Method) -> dict[str, Any]:
    given = inspect.signature(type(method)).parameters  # a list that a method fills while it trains is none of them
    arguments = {
        name: value
        for name, value in vars(method).items()
        if not name.startswith("_") and (_is_plain(value) or (name in given and _is_list(value)))
    }
    described = {"class": type(method).__name__, **arguments}
    return {**described, "inner": [_described(inner) for inner in method.inner]} if method.inner else described


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str | None)


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_plain, value))


def _fit(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two descriptions can be of one method: another version of it may know further arguments."""
    inner, others = before.get("inner", []), now.get("inner", [])
    both = (before.keys() & now.keys()) - {"inner"}
    return (
        all(before[name] == now[name] for name in both)
        and len(inner) == len(others)
        and all(_fit(one, other) for one, other in zip(inner, others, strict=True))
    )


def _shown(described: Mapping[str, Any]) -> str:
    arguments = [f"{name}={value}" for name, value in described.items() if name not in ("class", "inner")]
    inner = [_shown(one) for one in described.get("inner", [])]
    return f"{described.get('class')}({', '.join(inner + arguments)})"


def _configuration(trainer: Trainer) -> dict[str, Any] | None:
    """Class and arguments of the model, where LightningCLI made it."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SaveConfigCallback):
            return _model_in(callback)
    return None


@functools.lru_cache(maxsize=1)  # a run asks at each checkpoint, and the parser takes its time
def _model_in(callback: SaveConfigCallback) -> dict[str, Any] | None:
    of_model = Namespace(model=callback.config.model)  # type: ignore[no-untyped-call]
    model: dict[str, Any] = yaml.safe_load(callback.parser.dump(of_model))["model"]
    if "class_path" not in model:
        return None
    model.setdefault("init_args", {}).pop("original", None)  # the checkpoint has weights of its own
    return model


def made_from(kind: type[LightningModule]) -> str:
    """The argument that a module gets its network from."""
    return "pipeline" if "pipeline" in inspect.signature(kind).parameters else "network"


def arguments_from(kind: type[LightningModule], checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Make what the model of a checkpoint was made from: network, method, optimizer and so on.

    A checkpoint may come from anywhere, and to import a module executes it. So only networks, methods, optimizers and their
    schedulers are made, and only out of modules that are already imported or belong to this library, torch, torchvision,
    diffusers, timm or transformers.

    Args:
        kind: The class of the model.
        checkpoint: The content of the checkpoint.

    Raises:
        ValueError: The checkpoint does not say how its model was made, names another class, or something that is not made.
    """
    model = checkpoint.get(KEY, {}).get("model")
    if model is None:
        raise ValueError(
            "The checkpoint does not say how its network was made, because it was not trained from a configuration. Give it:"
            f" {kind.__name__}.load_from_checkpoint(path, {made_from(kind)}=...)."
        )
    for name in _names(model):
        _check_name(name)
    made = _resolved(model["class_path"])
    if made is not kind:
        raise ValueError(f"The checkpoint is of a {made.__name__}: call {made.__name__}.load_from_checkpoint.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, instantiate=False)
    try:
        return dict(vars(parser.instantiate(parser.parse_object(model["init_args"]))))
    except ArgumentError as error:  # of another version
        raise ValueError(f"What the checkpoint's model was made from does not fit its class; give network. {error}") from error


def _names(content: Any) -> Iterator[str]:
    """Whatever could name something to import."""
    if isinstance(content, Mapping):
        for value in content.values():
            yield from _names(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _names(value)
    elif isinstance(content, str) and re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", content):
        yield content


def _check_name(name: str) -> None:
    package = name.partition(".")[0]
    known = package in _TRUSTED or any(name.startswith(f"{module}.") for module in sys.modules)
    if not known:
        if find_spec(package) is None:
            return  # no module, so nothing that could be executed
        raise ValueError(
            f"The checkpoint names '{name}', which is not imported, and to import it would execute it. If you trust it, import"
            f" it before ('import {name.rpartition('.')[0]}'), or give network."
        )
    made = _resolved(name)
    if name.startswith("salun_lightning.networks."):  # also the functions that make some
        return
    bases = {base.__name__ for base in getattr(made, "__mro__", ())}
    if not (bases & {"SchedulerMixin"} or (isinstance(made, type) and issubclass(made, _MADE))):
        raise ValueError(
            f"The checkpoint names '{name}', which is no network, method, optimizer or scheduler; nothing else is made from a"
            " checkpoint. Give network."
        )


_MADE = (nn.Module, Method, GenerationEvaluator, Optimizer, LRScheduler)


def _resolved(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(sys.modules.get(module) or import_module(module), attribute)
    except (ImportError, AttributeError, ValueError):
        raise ValueError(f"The checkpoint names '{name}', which is not there. Install it, or give network.") from None
