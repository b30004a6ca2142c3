"""Pictures of masks: the exact number of kept weights in every cell of a grid, small enough for a page."""

import base64
import math
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int32, Int64, Shaped
from torch import Tensor

# One weight, and then multiples of common groups, so that the cells of an N:M mask hold whole groups.
SIDES = (
    1,
    2,
    4,
    *range(8, 64, 8),
    *range(64, 256, 16),
    *range(256, 1024, 64),
    *(1 << power for power in range(10, 20)),
)


@dataclass(frozen=True)
class Picture:
    """A mask on a grid of square cells of `side` weights; at the right and lower edge cells may be smaller.

    `kept` are the numbers of kept weights in the cells. `columns` and `rows` are the lowest and the highest number of
    zeros among the single columns (rows) that one column (row) of cells spans, of shape (2, cells).
    """

    shape: tuple[int, int]
    side: int
    kept: Int64[Tensor, "down across"]
    columns: Int64[Tensor, "2 across"]
    rows: Int64[Tensor, "2 down"]

    @cached_property
    def code(self) -> str:
        """All counts, cells first, then columns, then rows, as base64 of zlib.

        Each count is four bytes, least significant first, laid out as four planes: all first bytes, all second
        bytes, and so on. Most of the upper planes are zero and cost nothing.
        """
        counts = torch.cat([self.kept.flatten(), self.columns.flatten(), self.rows.flatten()]).numpy().astype("<u4")
        planes = counts.view(np.uint8).reshape(-1, 4).T
        return base64.b64encode(zlib.compress(planes.tobytes(), 9)).decode()

    def shares(self) -> np.ndarray[Any, Any]:
        """The share of kept weights in each cell, float64 of shape (down, across)."""
        height, width = (_lengths(length, self.side) for length in self.shape)
        return np.asarray(self.kept.numpy() / np.outer(height, width))


def draw(mask: Bool[Tensor, "out in"], side: int) -> Picture:
    """The picture of a mask (True = kept) in cells of `side` by `side` weights."""
    height, width = mask.shape
    bands = _fold(mask.contiguous().view(torch.uint8), side)
    zeros_of_columns = height - bands.sum(dim=0)
    zeros_of_rows = width - mask.view(torch.uint8).sum(dim=1, dtype=torch.int32).long()
    cells = _fold(bands.t().contiguous(), side).t().long()
    return Picture((height, width), side, cells, _extremes(zeros_of_columns, side), _extremes(zeros_of_rows, side))


def draw_within(mask: Bool[Tensor, "out in"], size: int) -> Picture:
    """The finest picture of a mask whose code takes at most `size` characters."""
    height, width = mask.shape
    # Counts of a mask without structure take about log2(4 sigma) bits, and base64 writes 6 bits to a character.
    fitting = (side for side in SIDES if height / side * width / side * math.log2(2 + 2 * side) / 6 <= size)
    for side in fitting:
        picture = draw(mask, side)
        if len(picture.code) <= size or side >= max(height, width):
            return picture
    raise AssertionError(f"no cell is large enough for {height} x {width} weights in {size} characters")


def _fold(counts: Shaped[Tensor, "lines width"], side: int) -> Int32[Tensor, "cells width"]:
    """Sums of `side` consecutive lines; the last sum may be of fewer."""
    if side == 1:
        return counts.int()
    return torch.stack([part.sum(dim=0, dtype=torch.int32) for part in torch.split(counts, side)])


def _extremes(zeros: Int64[Tensor, " lines"], side: int) -> Int64[Tensor, "2 cells"]:
    return torch.stack([torch.stack(part.aminmax()) for part in torch.split(zeros, side)], dim=1)


def _lengths(length: int, side: int) -> list[int]:
    """How many lines each cell spans."""
    return [min(side, length - start) for start in range(0, length, side)]
