"""Exact global top-k over many tensors, without sorting or concatenating them.

The bits of a non-negative float, read as an integer, grow with its value. So the k-th largest score is found digit by digit: a
histogram of the highest bits tells in which bin it lies, and a histogram of the next bits within that bin tells more, until
every bit is known. Time is linear in the number of scores, however many tensors they lie in; the extra memory is one chunk.
"""

from collections.abc import Iterator, Mapping
from fractions import Fraction

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_CHUNK = 1 << 20  # scores looked at together, of a large tensor or of many small ones: 4 MiB, a size for caches
_DIGIT = 16  # bits settled in one pass: two passes for float32, four for float64


def num_kept(ratio: float, num_weights: int) -> int:
    """``floor(ratio * num_weights)``, where ``ratio`` means the decimal number that was written.

    Example:
        >>> int(0.29 * 100), num_kept(0.29, 100)
        (28, 29)
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio must lie between 0 (nothing may move) and 1 (everything may move), got {ratio}.")
    return int(Fraction(repr(float(ratio))) * num_weights)


def top_k_masks(scores: Mapping[str, Tensor], k: int) -> Iterator[tuple[str, Tensor]]:
    """Select exactly the ``k`` largest scores of all tensors together.

    Equal scores are taken by position: first tensor first, then row by row. The same call on every rank, with sharded
    (``DTensor``) scores, gives the same masks on every rank: a chunk, or one tensor if it is larger, is gathered at a time.

    Args:
        scores: Non-negative floating-point tensors of any shapes, by name.
        k: How many scores are selected.

    Yields:
        For each tensor, in the order of ``scores``, its name and a bool tensor of its whole shape that is true where selected.

    Raises:
        ValueError: A score is negative, NaN or infinite, or there are fewer than ``k`` scores.
    """
    width = _width(scores)
    total = sum(score.numel() for score in scores.values())
    if not 0 <= k <= total:
        raise ValueError(f"{k} of {total} scores cannot be selected.")
    signed = _check(scores, width)
    bound, ties = _kth_largest(scores, k, width, signed)
    for group in _groups(scores):
        sizes = [score.numel() for score in group.values()]
        mask = torch.empty(sum(sizes), dtype=torch.bool, device=next(iter(group.values())).device)
        for selected, bits in zip(mask.split(_CHUNK), _chunks(group, width, signed), strict=True):
            torch.gt(bits, bound, out=selected)
            if ties:
                equal = (bits == bound).nonzero()[:ties]
                selected[equal] = True
                ties -= len(equal)
        for (name, score), part in zip(group.items(), mask.split(sizes), strict=True):
            yield name, part.view(score.shape)


def kth_smallest(scores: Mapping[str, Tensor], k: int) -> float:
    """The ``k``-th smallest score of all tensors together.

    Args:
        scores: Floating-point tensors without a sign bit, such as magnitudes. NaN counts as greater than all numbers.
        k: From 1 to the number of scores.

    Example:
        >>> kth_smallest({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([[2.0]])}, 2)
        2.0
    """
    width = _width(scores)
    bound, ties = _kth_largest(scores, sum(score.numel() for score in scores.values()) + 1 - k, width, signed=False)
    bits = torch.tensor(bound if ties else bound + 1, dtype=torch.int64 if width == 63 else torch.int32)
    return bits.view(_floats(width)).item()


def _width(scores: Mapping[str, Tensor]) -> int:
    """The number of bits without the sign."""
    return 63 if any(score.dtype == torch.float64 for score in scores.values()) else 31


def _kth_largest(scores: Mapping[str, Tensor], k: int, width: int, signed: bool) -> tuple[int, int]:
    """The bit pattern of the k-th largest score, and how many scores equal to it belong to the k largest."""
    if k == 0:
        return 2**width - 1, 0  # no finite score lies above this pattern
    prefix, above, low = 0, 0, width
    while low:
        high, low = low, max(low - _DIGIT, 0)
        digits = 1 << (high - low)
        histogram = torch.zeros(digits, dtype=torch.int64)
        for group in _groups(scores):
            for bits in _chunks(group, width, signed):
                left = bits[bits >> high == prefix] if high < width else bits
                histogram += torch.bincount((left >> low) & (digits - 1), minlength=digits).cpu()
        at_least = histogram.flip(0).cumsum(0).flip(0)  # scores whose digit is at least d
        digit = int((at_least >= k - above).nonzero().max())
        above += int(at_least[digit] - histogram[digit])
        prefix = prefix << (high - low) | digit
    if histogram[digit] == k - above:  # every score equal to the k-th is selected: no ties to break
        return prefix - 1, 0
    return prefix, k - above


def _check(scores: Mapping[str, Tensor], width: int) -> bool:
    """Refuse what cannot be ranked; tell whether there are negative zeros, whose bits order differently."""
    for name, score in scores.items():
        if not score.is_floating_point():
            raise ValueError(f"The scores of '{name}' are {score.dtype}; scores are floating-point numbers.")
    odd = [group for group in _groups(scores) if any(_is_odd(bits, width) for bits in _chunks(group, width))]
    for name, score in (item for group in odd for item in group.items()):
        for floats in (bits.view(_floats(width)) for bits in _chunks({name: score}, width)):
            if not torch.isfinite(floats).all():
                raise ValueError(
                    f"The saliency of '{name}' contains NaN or infinity, so weights cannot be ranked by it. Check that the"
                    " original model loads correctly and that its forget loss is finite."
                )
            if (floats < 0).any():
                raise ValueError(f"The saliency of '{name}' contains negative numbers; scores are magnitudes.")
    return bool(odd)


def _is_odd(bits: Tensor, width: int) -> bool:
    """Whether a score is negative (also -0.0), infinite or NaN: in one pass."""
    infinity = 0x7FF << 52 if width == 63 else 0xFF << 23
    lowest, highest = torch.aminmax(bits) if bits.numel() else (0, 0)
    return bool(lowest < 0 or highest >= infinity)


def _floats(width: int) -> torch.dtype:
    return torch.float64 if width == 63 else torch.float32


def _groups(scores: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The scores in their order, small tensors of one device together: alone, each would cost as much as a whole chunk."""
    group: dict[str, Tensor] = {}
    room, device = 0, None
    for name, score in scores.items():
        if group and (score.numel() > room or score.device != device):
            yield group
            group = {}
        if not group:
            room, device = _CHUNK, score.device
        group[name] = score
        room -= score.numel()
    if group:
        yield group


def _chunks(group: Mapping[str, Tensor], width: int, signed: bool = False) -> Iterator[Tensor]:
    """The scores as integers that order like them, in row-major order, a chunk at a time."""
    wholes = [score.full_tensor() if isinstance(score, DTensor) else score for score in group.values()]
    flat = [whole.detach().reshape(-1) for whole in wholes]
    for chunk in (flat[0] if len(flat) == 1 else torch.cat([part.to(_floats(width)) for part in flat])).split(_CHUNK):
        floats = chunk.to(_floats(width))
        yield (floats.abs() if signed else floats).view(torch.int64 if width == 63 else torch.int32)
