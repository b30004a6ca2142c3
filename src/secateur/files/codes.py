"""Weights as whole numbers of 8 bits with a scale for each row: what int8 values of a packed matrix are.

A weight w that is kept becomes the number c = round(w / s), but never zero, so that it stays kept; the scale s of a row
is its largest weight / 127. What comes back is c s, computed in float32 and rounded to the dtype of w.
Searching for a smaller scale, which cuts off large weights, lowers the error of 8-bit numbers by nothing measurable.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

LARGEST = 127
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # that have codes
_AT_ONCE = 1 << 17  # entries, for which float32 copies are made: they stay in the cache


def codes_of(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The codes (int8, of the tensor's shape, zero exactly where it is) and the scales (float32, one for each row).

    Raises `ValueError` for entries that are not finite.
    """
    codes = torch.empty(tensor.shape, dtype=torch.int8)
    scales = torch.empty(tensor.shape[:-1], dtype=torch.float32)
    rows, out, factors = tensor.reshape(-1, tensor.shape[-1]), codes.view(-1, tensor.shape[-1]), scales.view(-1)
    for part in _parts(rows):
        weights = rows[part].float()
        largest = weights.abs().amax(dim=1)  # NaN where one is
        if not bool(largest.isfinite().all()):
            raise ValueError("it has values that are not finite")
        scale = (largest / LARGEST).clamp_(min=torch.finfo(torch.float32).tiny)
        # What is kept becomes at least one step, and what is removed none: its sign is zero.
        found = (weights / scale[:, None]).abs_().clamp_(0.51, LARGEST).round_().mul_(weights.sign())
        out[part], factors[part] = found.to(torch.int8), scale
    return codes, scales


def count_coded(tensor: Tensor) -> int:
    """How many codes of a tensor, or of a flat part of it, are not zero.

    Raises `ValueError` for entries that are not finite. Of their bits without the sign, compared as whole numbers.
    """
    kind = {2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize]
    infinite = int(torch.tensor(math.inf, dtype=tensor.dtype).view(kind))
    bits = tensor.reshape(-1).view(kind).numpy()
    count = 0
    for start in range(0, len(bits), _AT_ONCE):
        magnitudes = bits[start : start + _AT_ONCE] & np.iinfo(bits.dtype).max
        if int(magnitudes.max()) >= infinite:
            raise ValueError("it has values that are not finite")
        count += int(np.count_nonzero(magnitudes))
    return count


def values_of(codes: Tensor, scales: Tensor, out: Tensor) -> Tensor:
    """The weights that codes and scales stand for, in `out`, which is contiguous and of the codes' shape."""
    columns = out.shape[-1]
    rows, factors, result = codes.reshape(-1, columns), scales.reshape(-1, 1), out.view(-1, columns)
    for part in _parts(rows):
        result[part] = rows[part].float().mul_(factors[part]).to(out.dtype)
    return out


def relative_error(tensor: Tensor, other: Tensor) -> float:
    """The Frobenius norm of the difference of two tensors, divided by that of the first."""
    difference = square = 0.0
    rows, others = tensor.reshape(-1, tensor.shape[-1]), other.reshape(-1, tensor.shape[-1])
    for part in _parts(rows):
        weights = rows[part].double()
        difference += float((others[part].double() - weights).square().sum())
        square += float(weights.square().sum())
    return math.sqrt(difference / square) if square else 0.0


def _parts(rows: Tensor) -> Sequence[slice]:
    step = max(1, _AT_ONCE // max(1, rows.shape[1]))
    return [slice(start, start + step) for start in range(0, len(rows), step)] if rows.numel() else []
