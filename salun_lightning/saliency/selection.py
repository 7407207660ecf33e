"""Exact global top-k over many tensors, without sorting or concatenating them.

The bit pattern of a non-negative float grows with its value, so the k-th largest score is found digit by digit: a histogram
of the highest bits says which bin it lies in, a histogram of the next bits of that bin narrows it down, and after three
passes (float32) every bit is known. Time is linear in the number of scores; the extra memory is one chunk.
"""

from collections.abc import Iterator, Mapping
from fractions import Fraction

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_CHUNK = 1 << 22  # scores looked at together: 16 MiB, so that the temporaries stay in cache-sized pieces
_DIGIT = 11  # bits settled in one pass


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
    (``DTensor``) scores, gives the same masks on every rank: one tensor at a time is gathered.

    Args:
        scores: Non-negative floating-point tensors of any shapes, by name.
        k: How many scores are selected.

    Yields:
        For each tensor, in the order of ``scores``, its name and a bool tensor of its whole shape that is true where selected.

    Raises:
        ValueError: A score is negative, NaN or infinite, or there are fewer than ``k`` scores.
    """
    width = 63 if any(score.dtype == torch.float64 for score in scores.values()) else 31
    bound, ties = _kth_largest(scores, k, width)
    for name, score in scores.items():
        mask = torch.empty(score.shape, dtype=torch.bool, device=score.device)
        for selected, bits in zip(mask.view(-1).split(_CHUNK), _chunks(score, width), strict=True):
            torch.gt(bits, bound, out=selected)
            if ties:
                equal = (bits == bound).nonzero()[:ties]
                selected[equal] = True
                ties -= len(equal)
        yield name, mask


def _kth_largest(scores: Mapping[str, Tensor], k: int, width: int) -> tuple[int, int]:
    """The bit pattern of the k-th largest score, and how many scores equal to it belong to the k largest."""
    total = sum(score.numel() for score in scores.values())
    if not 0 <= k <= total:
        raise ValueError(f"{k} of {total} scores cannot be selected.")
    for name, score in scores.items():
        _check(name, score)
    if k == 0:
        return 2**width - 1, 0  # no finite score lies above this pattern
    prefix, above, low = 0, 0, width
    while low:
        high, low = low, max(low - _DIGIT, 0)
        digits = 1 << (high - low)
        histogram = torch.zeros(digits, dtype=torch.int64)
        for score in scores.values():
            for bits in _chunks(score, width):
                left = bits[bits >> high == prefix] if high < width else bits
                histogram += torch.bincount((left >> low) & (digits - 1), minlength=digits).cpu()
        at_least = histogram.flip(0).cumsum(0).flip(0)  # scores whose digit is at least d
        digit = int((at_least >= k - above).nonzero().max())
        above += int(at_least[digit] - histogram[digit])
        prefix = prefix << (high - low) | digit
    return prefix, k - above


def _check(name: str, score: Tensor) -> None:
    if not score.is_floating_point():
        raise ValueError(f"The scores of '{name}' are {score.dtype}; scores are floating-point numbers.")
    # of the whole tensor: a rank that refused its shard alone would leave the others waiting
    for chunk in _flat(score).split(_CHUNK):
        if not torch.isfinite(chunk).all():
            raise ValueError(
                f"The saliency of '{name}' contains NaN or infinity, so weights cannot be ranked by it. Check that the"
                " original model loads correctly and that its forget loss is finite."
            )
        if (chunk < 0).any():
            raise ValueError(f"The saliency of '{name}' contains negative numbers; scores are magnitudes.")


def _chunks(score: Tensor, width: int) -> Iterator[Tensor]:
    """The scores as integers that order like them, in row-major order, a chunk at a time."""
    floats, integers = (torch.float64, torch.int64) if width == 63 else (torch.float32, torch.int32)
    for chunk in _flat(score).split(_CHUNK):
        yield chunk.to(floats).abs().view(integers)  # abs: -0.0 counts as 0.0


def _flat(score: Tensor) -> Tensor:
    whole = score.full_tensor() if isinstance(score, DTensor) else score
    return whole.detach().reshape(-1)
