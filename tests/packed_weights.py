"""Packed weights by numpy, for the tests of what multiplies by them."""

from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from secateur.runtime.layout import PackedWeight, lay_out
from secateur.runtime.library import PathName


@dataclass
class Packed:
    """A matrix as a packed checkpoint holds it, and what it stands for in float64."""

    stored: Tensor  # dense, in the dtype of the values
    kept: Tensor
    scales: Tensor | None = None
    group_size: int | None = None

    @property
    def bitmask(self) -> Tensor:
        return torch.from_numpy(numpy.packbits(self.kept.numpy(), axis=1, bitorder="little"))

    @property
    def values(self) -> Tensor:
        return self.stored[self.kept]

    @property
    def exact(self) -> Tensor:
        if self.scales is None:
            return self.stored.double()
        columns = self.stored.shape[1]
        scales = self.scales.double().reshape(len(self.stored), -1)
        return self.stored.double() * scales.repeat_interleave(self.group_size or columns, dim=1)[:, :columns]

    def laid_out(self, path: PathName) -> PackedWeight:
        columns = self.stored.shape[1]
        return lay_out(self.bitmask, self.values, columns, scales=self.scales, group_size=self.group_size, path=path)


def random_packed(
    rows: int, columns: int, dtype: torch.dtype, *, density: float = 0.5, group_size: int | None = None, seed: int = 0
) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=generator) < density
    dense = torch.randn(rows, columns, generator=generator)
    if dtype != torch.int8:
        return Packed(torch.where(kept, dense, 0).to(dtype), kept)
    stored = torch.where(kept, (dense * 40).clamp(-127, 127).round(), 0).to(torch.int8)
    groups = 1 if group_size is None else -(-columns // group_size)
    scales = torch.rand(rows, groups, generator=generator) + 0.1
    return Packed(stored, kept, scales if group_size else scales[:, 0], group_size)
