"""What an allocation is: it measures units of the dense model, and divides the zeros of a uniform plan among them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.core.needs import Need
from secateur.core.patterns import NM, Pattern
from secateur.core.problem import Problem

Unit = Literal["block", "matrix", "kind"]  # what has one sparsity: a block, a matrix, or all matrices of a kind
FULL = (0.0, 0.99)


@dataclass(frozen=True)
class Measured:
    """What is known of the units among which the zeros of a pattern are divided."""

    values: Float[Tensor, "units numbers"]  # what `measure` returned
    weights: Float[Tensor, " units"]  # how many each has
    blocks: Int[Tensor, " units"]  # which block each lies in; -1 where a unit spans them all
    pattern: Pattern  # of the uniform plan

    @property
    def sparsity(self) -> float:
        """Of the uniform plan."""
        return self.pattern.sparsity


@dataclass(frozen=True)
class Allocation:
    """How zeros are divided among the matrices of a model.

    `measure` returns a few numbers (float64) of the problems of one block that belong to one unit: `needs` are what it
    looks at, in the dense model. Problems carry the pattern of the uniform plan. `divide` makes a sparsity for each
    unit of them; what lies outside of `bounds` is never used. Neither has to meet the budget, see
    `secateur.plans.budget.on_budget`. `unit` is the one that is meant where none is asked for.
    """

    name: str
    measure: Callable[[Sequence[Problem]], Float[Tensor, " numbers"]]
    divide: Callable[[Measured], Float[Tensor, " units"]]
    needs: frozenset[Need] = frozenset()
    unit: Unit = "block"
    bounds: Callable[[Pattern], tuple[float, float]] = lambda pattern: FULL
    options: Mapping[str, Any] = field(default_factory=dict)


def spread(importance: Float[Tensor, " units"], width: float, sparsity: float) -> Float[Tensor, " units"]:
    """Sparsities that fall with the importance of a unit: the most and the least important are 2 * `width` apart.

    ``s_u = s + mean(d) - d_u`` with ``d_u = (I_u - min I) / (max I - min I) * 2 * width``; the mean over the units is
    the sparsity s. Source: the mapping that OWL (arXiv 2310.05175) and DLP (arXiv 2505.23807) share.
    """
    low, high = importance.min(), importance.max()
    scaled = torch.zeros_like(importance) if high == low else (importance - low) / (high - low) * (2 * width)
    return sparsity + scaled.mean() - scaled


def levels(pattern: Pattern, bounds: tuple[float, float], count: int) -> list[float]:
    """`count` sparsities from bound to bound; for N:M those between them that whole numbers of weights make."""
    if isinstance(pattern, NM):
        return [n / pattern.m for n in range(pattern.m) if bounds[0] <= n / pattern.m <= bounds[1]]
    return [bounds[0] + (bounds[1] - bounds[0]) * number / (count - 1) for number in range(count)]
