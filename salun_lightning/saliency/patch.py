"""What a run changed in a network, as a file of a fraction of its size."""

import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from salun_lightning.files import whole
from salun_lightning.saliency.mask import pack
from salun_lightning.weights import bits_of, fingerprint, plain_names

_FORMAT = "salun_lightning.Patch/1"
_FIELDS = ("bits", "values")
_OTHER = (
    "The patch was made from another network, or from other weights of it. Apply it to the very model it was made from; where"
    " several patches follow each other, compose them with 'then', or apply them in that order."
)
_NO_PAIR = "The second patch was made neither from what the first one leaves, nor from what it begins with."
_NOT_KNOWN = (
    "What the first patch leaves is not known, because it was made of several. Compose the later ones first:"
    " 'first.then(second.then(third))'."
)
_OWN = ("format", "library_version", "base", "result", "differences")


class Change(NamedTuple):
    """What changed in one tensor."""

    bits: Tensor
    """One bit for each of its numbers, set where it changed, as uint8."""
    values: Tensor
    """What changed, in their order; one-dimensional."""

    @classmethod
    def of(cls, changed: Tensor, values: Tensor) -> Self:
        """From one bool for each number, and the values."""
        return cls(pack(changed), values.cpu())

    @property
    def changed(self) -> Tensor:
        """A bool for each of its numbers, and for up to seven that pad the last byte."""
        return torch.from_numpy(np.unpackbits(self.bits.numpy())).bool()

    @property
    def where(self) -> Tensor:
        """The positions that changed, ascending int64."""
        return self.changed.nonzero().flatten()


class Patch:
    """What changed between two states of a network, weights and buffers: where, and to what.

    It is refused by a network with other weights than it was made from, by the sum of the bits of each tensor. A patch tells
    which weights were changed, and that may help to revive what was erased (arXiv 2603.06640): hand it to those alone who may
    know.

    Args:
        changes: By plain name of the tensor, what changed in it.
        base: The fingerprint of what it is applied to.
        result: The fingerprint of what comes out, if that is known.
        differences: Whether values are added to what is there, in the place of replacing it.
        metadata: Where it comes from, saved with it.

    Example:
        >>> before, after = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> patch = Patch.between(before, after)
        >>> undo = patch.apply(before)
        >>> torch.equal(before.weight, after.weight)
        True
        >>> _ = undo.apply(before)  # as it was, bit for bit
    """

    def __init__(
        self,
        changes: Mapping[str, Change],
        base: str,
        result: str = "",
        differences: bool = False,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.changes = dict(changes)
        self.base = base
        self.result = result
        self.differences = differences
        self.metadata = {name: str(value) for name, value in (metadata or {}).items()}

    @classmethod
    def between(
        cls,
        before: nn.Module | Mapping[str, Tensor],
        after: nn.Module | Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Self:
        """What changed between two states.

        Args:
            before: A network, or its weights and buffers by name, such as ``export_state_dict`` reads from a checkpoint or a
                pipeline.
            after: Likewise.
            dtype: Keep the differences of floating-point tensors, rounded to this type, in the place of the values themselves:
                in bfloat16 they need half of the space of float32, and what comes out differs by a 256th of each change.
            metadata: Where it comes from.

        Raises:
            ValueError: The two are not of one network.
        """
        old, new = _tensors(before), _tensors(after)
        _check_same(old, new)
        changes = {}
        for name, tensor in new.items():
            changed = _flat_bits(tensor) != _flat_bits(old[name])
            values, was = (part.flatten()[changed.to(part.device)].cpu() for part in (tensor, old[name]))
            if dtype is not None:
                values = (values.float() - was.float()).to(dtype) if tensor.is_floating_point() else values - was
            if changed.any():
                changes[name] = Change.of(changed, values)
        patch = cls(changes, fingerprint(old.items()), "", dtype is not None, metadata)
        patch.result = fingerprint((name, patch._changed(name, tensor)) for name, tensor in old.items())
        return patch

    @property
    def num_changed(self) -> int:
        """How many numbers it changes."""
        return sum(len(change.values) for change in self.changes.values())

    @torch.no_grad()
    def apply(self, network: nn.Module, scale: float = 1.0) -> "Patch":
        """Change a network in place.

        Args:
            network: The network that it was made from, with the same weights.
            scale: How far to go: 0 changes nothing, 1 all the way. Whole numbers go all the way.

        Returns:
            The patch that takes everything back, bit for bit, as long as nothing else changes the network.

        Raises:
            ValueError: It was made from another network, or from other weights.
        """
        tensors = _tensors(network)
        before = fingerprint(tensors.items())
        if before != self.base:
            raise ValueError(_OTHER)
        was = {
            name: change._replace(values=tensors[name].flatten()[change.where.to(tensors[name].device)].cpu())
            for name, change in self.changes.items()
        }
        once = {tensors[name].data_ptr(): name for name in self.changes}  # of tied weights, one name
        for name in once.values():
            tensors[name].copy_(self._changed(name, tensors[name], scale))
        after = fingerprint(tensors.items())
        if scale == 1 and self.result not in ("", after):
            Patch(was, after).apply(network)
            raise ValueError("The patch is damaged: what came out is not what it was made from. The network is as it was.")
        return Patch(was, after, before)

    def _changed(self, name: str, tensor: Tensor, scale: float = 1.0) -> Tensor:
        """A tensor as it is to be."""
        if name not in self.changes or scale == 0:
            return tensor
        change, flat = self.changes[name], tensor.flatten().clone()
        where, values = change.where.to(tensor.device), change.values.to(tensor.device)
        old = flat[where]
        if not tensor.is_floating_point():
            flat[where] = old + values if self.differences else values
        elif self.differences or scale != 1:
            wide = torch.promote_types(tensor.dtype, torch.float32)
            step = values.to(wide) if self.differences else values.to(wide) - old.to(wide)
            flat[where] = (old.to(wide) + scale * step).to(tensor)
        else:
            flat[where] = values
        return flat.view_as(tensor)

    def then(self, other: "Patch") -> "Patch":
        """One patch for two: of runs that followed each other, or that began with one network and changed different weights.

        Args:
            other: The patch that comes after this one.

        Raises:
            ValueError: They do not belong together, or both changed the same weights of one network.
        """
        follows = bool(self.result) and other.base == self.result
        if not follows and other.base != self.base:
            raise ValueError(_NO_PAIR if self.result else _NOT_KNOWN)
        if self.differences != other.differences:
            raise ValueError("One patch holds values, and the other differences. Make both in the same way.")
        changes = dict(self.changes)
        for name, change in other.changes.items():
            mine = changes.get(name)
            if mine is None:
                changes[name] = change
                continue
            values, either, both = _merged(mine, change, self.differences)
            if both and not follows:
                raise ValueError(
                    f"Both patches change {both} weights of '{name}', and neither was made on what the other leaves. Let the"
                    " second run start from the result of the first one."
                )
            changes[name] = Change.of(either, values)
        result = other.result if follows and not self.differences else ""  # sums of differences are rounded anew
        return Patch(changes, self.base, result, self.differences, {**self.metadata, **other.metadata})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write safetensors: a bit for each number of a changed tensor, and the values. It appears whole or not at all."""
        tensors = {f"{name}.{field}": getattr(change, field) for name, change in self.changes.items() for field in _FIELDS}
        header = {
            **self.metadata,
            "format": _FORMAT,
            "library_version": version("salun_lightning"),
            "base": self.base,
            "result": self.result,
            "differences": str(int(self.differences)),
        }
        with whole(path) as unfinished:
            save_file(tensors, unfinished, metadata=header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a patch. Nothing in the file is executed.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is damaged, or no patch.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no patch at '{path}'.")
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
            if header.get("format") != _FORMAT:
                raise ValueError("it was not written by Patch.save")
            changes = {
                key.removesuffix(".bits"): Change(bits, tensors[key.removesuffix("bits") + "values"])
                for key, bits in tensors.items()
                if key.endswith(".bits")
            }
            for name, change in changes.items():
                if len(change.where) != len(change.values):
                    raise ValueError(f"'{name}' has {len(change.where)} places and {len(change.values)} values")
        except Exception as error:
            raise ValueError(f"'{path}' cannot be read as a patch, so it is damaged or of another kind: {error}") from error
        metadata = {key: text for key, text in header.items() if key not in _OWN}
        return cls(changes, header["base"], header["result"], header["differences"] == "1", metadata)


def _merged(first: Change, second: Change, differences: bool) -> tuple[Tensor, Tensor, int]:
    """The values of two changes of one tensor, the later one last; where any of them lies, and how many lie in both."""
    one, other = first.changed, second.changed
    values = torch.zeros(len(one), dtype=first.values.dtype)
    values[one] = first.values
    values[other] = values[other] + second.values if differences else second.values
    either = one | other
    return values[either], either, int((one & other).sum())


def _check_same(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> None:
    kinds = [{name: (tuple(tensor.shape), tensor.dtype) for name, tensor in part.items()} for part in (old, new)]
    if kinds[0] != kinds[1]:
        name = next(name for name in {**old, **new} if kinds[0].get(name) != kinds[1].get(name))
        theirs = " and ".join(str(kind.get(name, "not there")) for kind in kinds)
        raise ValueError(f"The two are not states of one network: '{name}' is {theirs}.")


def _tensors(state: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights and buffers by plain name, in the order of their names."""
    found = state.state_dict() if isinstance(state, nn.Module) else state
    tensors = {plain: found[name] for name, plain in plain_names(found).items()}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            raise ValueError(f"'{name}' is sharded. Gather the weights first: make the patch from files.")
    return dict(sorted(tensors.items()))


def _flat_bits(tensor: Tensor) -> Tensor:
    return bits_of(tensor.contiguous().view(-1)).cpu()
