"""How values spread over orders of magnitude, those of kept and of pruned weights apart, in a few integers."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

BINS = 24
PER_OCTAVE = 2  # logarithmic bins: 24 of them span a factor of 4096
CHUNK = {"cpu": 1 << 18, "cuda": 1 << 24}  # values at once: what a cache holds, what a launch is worth


def histogram(values: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"]) -> dict[str, Any]:
    """Counts of the values at kept and at removed places in 24 bins, as JSON: scale, low, high, kept, pruned.

    Values that are never negative go into logarithmic bins, two to an octave, up to the largest value; the lowest bin
    also holds everything below it, zeros included. Others go into bins of equal width between both extremes. A value
    on a bin's lower edge belongs to it, up to rounding in float32.
    """
    low, high = (float(value) for value in values.aminmax())
    logarithmic = low >= 0 and high > 0
    if logarithmic:
        low = high * 2.0 ** (-BINS / PER_OCTAVE)
    counts = torch.zeros(2 * BINS, dtype=torch.int64, device=values.device)
    rows = max(1, CHUNK.get(values.device.type, 1 << 24) // max(1, values.shape[1]))
    for start in range(0, values.shape[0], rows):  # Memory: temporaries of a few rows
        part, kept = values[start : start + rows], mask[start : start + rows]
        value = part if part.dtype.itemsize >= 4 else part.float()
        if logarithmic:
            place = value.div(high).log2_().mul_(PER_OCTAVE).add_(BINS)
        else:
            place = value.sub(low).mul_(BINS / max(high - low, torch.finfo(torch.float32).tiny))
        place = place.clamp_(0, BINS - 1).to(torch.int32).mul_(2).add_(kept)
        counts += torch.bincount(place.flatten(), minlength=2 * BINS)
    pruned, kept_counts = counts.view(BINS, 2).t().tolist()
    scale = "logarithmic" if logarithmic else "linear"
    return {"scale": scale, "low": low, "high": high, "kept": kept_counts, "pruned": pruned}


def edges(record: Mapping[str, Any]) -> list[float]:
    """The 25 edges of a histogram's bins, from low to high."""
    low, high = record["low"], record["high"]
    if record["scale"] == "linear":
        return [low + (high - low) * index / BINS for index in range(BINS + 1)]
    return [float(high * 2.0 ** ((index - BINS) / PER_OCTAVE)) for index in range(BINS + 1)]
