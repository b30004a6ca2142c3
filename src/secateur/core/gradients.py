"""What a method may know of a matrix's gradients: norms over calibration samples, entry by entry, un-normalised."""

from dataclasses import dataclass
from typing import Self, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.core.choices import Granularity, Norm, Scope
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
        add_gradient(self.total, self.kind.norm, gradient.to(self.total.dtype, copy=True))
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


def add_gradient(total: Float[Tensor, "..."], norm: Norm, gradient: Float[Tensor, "..."], scale: float = 1.0) -> None:
    """Add ``|gradient / scale|`` (l1) or ``(gradient / scale) ** 2`` (l2) to `total`, in place.

    Memory: for l1, `gradient` is overwritten with its absolute value, so that no copy of it is made.
    """
    if norm == "l2":
        total.addcmul_(gradient, gradient, value=scale**-2)
    else:
        total.add_(gradient.abs_(), alpha=1 / scale)
