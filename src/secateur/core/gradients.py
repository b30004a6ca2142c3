"""What a method may know of a matrix's gradients: norms over calibration samples, entry by entry, un-normalised."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.core.choices import Granularity, Norm, Scope
from secateur.core.exact import ExactSum
from secateur.core.statistics import Sum
from secateur.errors import CalibrationError


@dataclass(frozen=True)
class GradientKind:
    """Which gradients, and how they are added up over the calibration samples.

    `norm`: "l1", the sum of ``|g_n|``, or "l2", the root of the sum of ``g_n ** 2``. `granularity`: ``g_n`` is the
    gradient of the loss of a whole "sample", as published, or of each of its "token"s by itself. `scope`: the
    gradient is that of the "model"'s loss, the mean next-token cross-entropy of the sample, or of the Euclidean norm
    of the "block"'s own output (the regional gradient of Wanda++).

    Raises `CalibrationError` for any other word.
    """

    norm: Norm = "l1"
    granularity: Granularity = "sample"
    scope: Scope = "model"

    def __post_init__(self) -> None:
        for option, known in (("norm", Norm), ("granularity", Granularity), ("scope", Scope)):
            found = getattr(self, option)
            if found not in get_args(known):
                raise CalibrationError(f'{option}: got "{found}", expected {" or ".join(get_args(known))}.')

    def __str__(self) -> str:
        return f"{self.norm} per {self.granularity}, {self.scope}"


class GradientNorm(Sum):
    """Sum over samples of the absolute or squared gradient of each weight of one (out, in) matrix.

    ``total_ij = sum_n |g_nij|`` for l1, ``sum_n g_nij ** 2`` for l2, float32 (float64 for float64 models).

    Source: GBLM-Pruner (arXiv 2311.04902), section 3.
    Paper: the published code multiplies every gradient by 100 here; that factor is the `alpha` of the method instead.
    """

    def __init__(self, kind: GradientKind, total: Float[Tensor, "out in"], tokens: int = 0, samples: int = 0) -> None:
        super().__init__(total, tokens, samples)
        self.kind = kind

    @classmethod
    def empty(
        cls,
        kind: GradientKind,
        shape: tuple[int, int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """The statistic of no samples at all: zeros of this (out, in) shape."""
        return cls(kind, torch.zeros(shape, dtype=dtype, device=device))

    def update(self, gradient: Float[Tensor, "out in"], samples: int = 1, tokens: int = 0) -> None:
        """Add the gradient of one sample."""
        wide = gradient.to(self.total.dtype)
        self.total += wide.square() if self.kind.norm == "l2" else wide.abs()
        self.samples += samples
        self.tokens += tokens

    def merge(self, other: Self) -> None:
        """Add what `other` has seen. Raises `ValueError` for another kind or shape."""
        if other.kind != self.kind or other.total.shape != self.total.shape:
            raise ValueError(
                f"gradients ({other.kind}) of a matrix {tuple(other.total.shape)} cannot be merged into ({self.kind}) "
                f"{tuple(self.total.shape)}."
            )
        super().merge(other)

    def norm(self) -> Float[Tensor, "out in"]:
        """``||G_ij||`` over samples: the total itself for l1, its square root for l2."""
        return self.total if self.kind.norm == "l1" else self.total.sqrt()

    def root_mean_square(self) -> Float[Tensor, "out in"]:
        """``sqrt(total / samples)``, for l2."""
        return (self.total / max(self.samples, 1)).sqrt()


Region = tuple[tuple[int, ...], tuple[int, ...], int]
"""Shape, stride and offset of the part of a parameter that is multiplied, such as an expert."""


class GradientSums:
    """The sums over samples of the norms of a parameter's gradients, to the same bits in whatever order samples come.

    Every part of the parameter that is multiplied has sums of its own.
    """

    def __init__(self, parameter: Float[Tensor, "..."], norm: Norm) -> None:
        self._norm = norm
        self._dtype = torch.promote_types(parameter.dtype, torch.float32)
        self._shape, self._stride, self._device = parameter.shape, parameter.stride(), parameter.device
        self._sums: dict[Region, ExactSum] = {}
        self._bad: dict[Region, tuple[int, ...]] = {}  # an entry of a gradient that is not finite

    def add(self, region: Region, powers: Float[Tensor, "..."], scale: float = 1.0) -> None:
        """Add absolute values (l1) or squares (l2) of gradients of a region, which were multiplied by `scale`."""
        scale = scale**2 if self._norm == "l2" else scale
        own = self._sum(region)
        factor = own.begin(float(powers.amax()) / scale, powers.dtype)
        if not own.finite:
            bad = (~powers.isfinite()).nonzero()
            self._bad.setdefault(region, tuple(bad[0].tolist()) if len(bad) else (0,) * powers.dim())
        if factor is None:
            return
        for number, rows in enumerate(torch.split(powers, self._rows(region))):
            own.add(number, rows * (factor / scale))

    def _sum(self, region: Region) -> ExactSum:
        def empty() -> list[Tensor]:
            whole = torch.zeros(region[0], dtype=torch.int64, device=self._device)
            return list(torch.split(whole, self._rows(region)))

        if region not in self._sums:
            self._sums[region] = ExactSum(empty)
        return self._sums[region]

    def total(self) -> Float[Tensor, "..."]:
        """The sums, laid out like the parameter, float32 (float64 for float64); nothing is left of them here."""
        total = torch.empty_strided(self._shape, self._stride, dtype=self._dtype, device=self._device).zero_()
        for region in sorted(self._sums):
            own, view = self._sums.pop(region), total.as_strided(*region)
            for number, rows in enumerate(torch.split(view, self._rows(region)) if own.finite else ()):
                rows += own.take(number, self._dtype)
            if not own.finite:
                view[self._bad[region]] = math.nan
        return total

    def told(self) -> Any:
        """As of every `Joinable`."""
        return {region: (own.told(), self._bad.get(region)) for region, own in self._sums.items()}

    def shared(self, told: Sequence[Any]) -> list[Tensor]:
        """As of every `Joinable`."""
        integers = []
        for region in sorted({region for own in told for region in own}):
            found = [own[region] for own in told if region in own]
            integers += self._sum(region).shared([sums for sums, _ in found])
            for _, bad in found:
                if bad is not None:
                    self._bad.setdefault(region, bad)
        return integers

    def _rows(self, region: Region) -> int:
        """Rows of a region that are added at once: on a CPU what its caches hold."""
        numbers = 1 << (15 if self._device.type == "cpu" else 22)
        return max(1, numbers * region[0][0] // math.prod(region[0]))
