"""The saliency mask: one bit a weight, and where it comes from."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from salun_lightning.files import is_of_torch, read_torch
from salun_lightning.saliency.mask_file import read_safetensors, state_in, write_state
from salun_lightning.saliency.selection import num_kept, top_k_masks
from salun_lightning.weights import plain_name, plain_names, renamings

_Packed = dict[str, tuple[Tensor, torch.Size]]  # by weight name, the bits in bytes and the shape


class SaliencyMask(Mapping[str, Tensor]):
    r"""Which weights may move: :math:`m_S = 1(|\nabla_\theta \ell_f(\theta_o)| \ge \gamma)` (Fan et al., ICLR 2024, section 4).

    A read-only mapping from the name of a weight tensor to a bool tensor of its shape, true where the weight may move. It
    holds one bit a weight; ``mask[name]`` unpacks one tensor on the CPU. Names are kept without what wrappers put around them
    (``network.``, ``module.``, ``_orig_mod.`` ...), and found with or without it.

    Args:
        masks: Bool tensors by weight name, or pairs of name and tensor.
        ratio: The ratio that was asked for; by default the fraction that is kept.
        metadata: Where the mask comes from (score, fingerprints of the network and of the data, ...), saved with it.

    Example:
        >>> mask = SaliencyMask.from_scores({"weight": torch.tensor([[3.0, 1.0], [0.0, 2.0]])}, ratio=0.5)
        >>> mask["weight"]
        tensor([[ True, False],
                [False,  True]])
        >>> mask.num_kept, mask.num_weights
        (2, 4)
    """

    def __init__(
        self,
        masks: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
        *,
        ratio: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        packed = {name: (pack(mask), mask.shape) for name, mask in (masks.items() if isinstance(masks, Mapping) else masks)}
        self._fill(packed, ratio, metadata)

    def _fill(self, packed: _Packed, ratio: float | None, metadata: Mapping[str, str] | None) -> None:
        self._packed = {plain: packed[name] for name, plain in plain_names(packed).items()}
        self.metadata = dict(metadata or {})
        self.num_weights = sum(shape.numel() for _, shape in packed.values())
        self.num_kept = sum(_count(bits) for bits, _ in packed.values())
        self.ratio = self.num_kept / max(self.num_weights, 1) if ratio is None else float(ratio)

    @classmethod
    def _of_packed(cls, packed: _Packed, ratio: float | None = None, metadata: Mapping[str, str] | None = None) -> Self:
        mask = cls.__new__(cls)
        mask._fill(packed, ratio, metadata)
        return mask

    @classmethod
    def from_scores(cls, scores: Mapping[str, Tensor], ratio: float, metadata: Mapping[str, str] | None = None) -> Self:
        """Let exactly the ``floor(ratio * d)`` highest scores of the whole network move, ties by position.

        Args:
            scores: A non-negative score for each weight, by weight name; ``DTensor`` shards are served too.
            ratio: The fraction of all weights that may move, from 0 to 1.
            metadata: Where the scores come from.

        Raises:
            ValueError: ``ratio`` is out of range, or a score is negative, NaN or infinite.
        """
        k = num_kept(ratio, sum(score.numel() for score in scores.values()))
        return cls(top_k_masks(scores, k), ratio=ratio, metadata=metadata)

    def __getitem__(self, name: str) -> Tensor:
        bits, shape = self._packed[name if name in self._packed else plain_name(name)]
        return torch.from_numpy(np.unpackbits(bits.numpy(), count=shape.numel()).view(np.bool_)).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SaliencyMask):
            return NotImplemented
        return self.shapes == other.shapes and all(
            torch.equal(bits, other._packed[name][0]) for name, (bits, _) in self._packed.items()
        )

    __hash__ = None  # type: ignore[assignment]  # equal by value

    def __repr__(self) -> str:
        return f"SaliencyMask({self.num_kept:,} of {self.num_weights:,} weights in {len(self)} tensors may move)"

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of each weight tensor, by name."""
        return {name: shape for name, (_, shape) in self._packed.items()}

    def density(self) -> dict[str, float]:
        """For each weight tensor the fraction of it that may move, between 0 and 1 (0 for an empty tensor)."""
        return {name: _count(bits) / max(shape.numel(), 1) for name, (bits, shape) in self._packed.items()}

    def __or__(self, other: "SaliencyMask") -> "SaliencyMask":
        return self._combined(other, torch.bitwise_or)

    def __and__(self, other: "SaliencyMask") -> "SaliencyMask":
        return self._combined(other, torch.bitwise_and)

    def __invert__(self) -> "SaliencyMask":
        return SaliencyMask((name, ~self[name]) for name in self)

    def iou(self, other: "SaliencyMask") -> float:
        """Overlap with another mask of the same network: kept by both / kept by either (1 if neither keeps any)."""
        either = (self | other).num_kept
        return (self & other).num_kept / either if either else 1.0

    def _combined(self, other: "SaliencyMask", operation: Callable[[Tensor, Tensor], Tensor]) -> "SaliencyMask":
        other.check_shapes(self.shapes)
        packed = {n: (operation(bits, other._packed[n][0]), shape) for n, (bits, shape) in self._packed.items()}
        return SaliencyMask._of_packed(packed)

    def fitted(self, names: Iterable[str]) -> Self:
        """The same mask under the names of a network, where one prefix of all names is all that differs.

        Args:
            names: The network's weights, by plain name.

        Raises:
            ValueError: Several prefixes fit.
        """
        ways = renamings(self, names)
        if len(ways) > 1:
            first = next(iter(self))
            raise ValueError(
                f"Weights called '{first}' fit several parts of the network: {', '.join(way[first] for way in ways[:2])}. Give"
                " the mask the full names of those that are meant."
            )
        new = ways[0] if ways else {name: name for name in self}
        return self._of_packed({new[name]: packed for name, packed in self._packed.items()}, self.ratio, self.metadata)

    def check_shapes(self, shapes: Mapping[str, torch.Size]) -> None:
        """Refuse a network that this mask was not made for.

        Args:
            shapes: The shapes of the network's weight tensors, by plain name.

        Raises:
            ValueError: A weight is missing, unknown, or of another shape.
        """
        own = self.shapes
        for name in {**own, **shapes}:
            mine, theirs = own.get(name), shapes.get(name)
            if mine != theirs:
                what = [f"is {tuple(shape)}" if shape is not None else "is not there" for shape in (mine, theirs)]
                raise ValueError(
                    f"The saliency mask belongs to another network: '{name}' {what[0]} in the mask and {what[1]} among the"
                    " trainable weights of the network. Compute the mask on this network, or load the mask made from it."
                )

    def state_dict(self) -> dict[str, Any]:
        """Everything as tensors and plain data: what a checkpoint holds and ``torch.load(weights_only=True)`` reads."""
        return {
            "bits": {name: bits for name, (bits, _) in self._packed.items()},
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "ratio": self.ratio,
            "metadata": self.metadata,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        """The mask that :meth:`state_dict` describes.

        Raises:
            ValueError: The bits do not fit the shapes.
        """
        packed: _Packed = {}
        for name, sizes in state["shapes"].items():
            shape, bits = torch.Size(sizes), state["bits"].get(name)
            if bits is None or bits.dtype != torch.uint8 or bits.shape != ((shape.numel() + 7) // 8,):
                raise ValueError(f"The bits of '{name}' do not fit its shape {tuple(shape)}: the mask is damaged.")
            packed[name] = bits, shape
        return cls._of_packed(packed, state["ratio"], state["metadata"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file of one bit a weight, with its metadata. The file appears whole or not at all."""
        write_state(path, self.state_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a mask. Nothing in the file is executed.

        Args:
            path: A file written by :meth:`save`, safetensors of 0/1 tensors (bool or uint8), a Lightning checkpoint of a masked
                run (or ``meta.pt`` in the folder of a sharded one), or a mask of the released SalUn code such as
                ``with_0.5.pt`` (a dictionary of 0/1 tensors). Its content tells which.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged or holds no saliency mask.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no saliency mask at '{path}'.")
        content = read_torch(path, "a saliency mask") if is_of_torch(path) else None  # which says itself what is wrong
        try:
            state = read_safetensors(path) if content is None else state_in(content)
            return cls.from_state_dict(state) if "shapes" in state else cls(state["masks"], metadata=state["metadata"])
        except Exception as error:
            raise ValueError(
                f"'{path}' cannot be read as a saliency mask, so it is damaged or a file of another kind: {error}"
            ) from error


def pack(mask: Tensor) -> Tensor:
    """A bool tensor as one bit for each of its elements, in bytes on the CPU."""
    return torch.from_numpy(np.packbits(mask.detach().bool().cpu().numpy()))


def _count(bits: Tensor) -> int:
    return int(np.bitwise_count(bits.numpy()).sum(dtype=np.int64))
