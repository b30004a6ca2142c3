"""What a method may ask to know of a matrix: hashable values, collected under themselves.

A class that keeps the contract of a `Statistic` asks for sums over the matrix's inputs, a `GradientKind` for a
`GradientNorm`, a `Drift` for a tensor of the weight's shape. Allocations may also ask for `OutputGradients`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from secateur.core.gradients import GradientKind
from secateur.core.statistics import SquaredNorm, Statistic
from secateur.errors import MethodError

Need = Any
"""Any hashable value."""


@dataclass(frozen=True)
class Drift:
    """Asks for ``share * sum e xᵀ`` over tokens: updated weights are to make ``W x + share * e`` instead of ``W x``.

    e is by how much the dense model's residual stream, after the matrix has written to it, differs from this one's.
    """

    share: float


class OutputGradients(SquaredNorm):
    """Sum over tokens of the squared gradient of the loss with respect to each output of a matrix, float64.

    The loss is the sum of the cross-entropies of the next tokens, which are drawn from the model's own distribution.
    """


def input_statistics(needs: Iterable[Need]) -> frozenset[type[Statistic]]:
    """The needs that are statistics of a matrix's inputs."""
    return frozenset(need for need in needs if isinstance(need, type) and need is not OutputGradients)


def gradient_kind(needs: Iterable[Need]) -> GradientKind | None:
    """The kind of gradients among some needs, or None. Raises `MethodError` for more than one."""
    kinds = [need for need in needs if isinstance(need, GradientKind)]
    if len(kinds) > 1:
        raise MethodError(
            f"needs: got gradients of {len(kinds)} kinds ({'; '.join(sorted(map(str, kinds)))}), expected at most one."
        )
    return kinds[0] if kinds else None
