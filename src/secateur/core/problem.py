"""The three objects that everything is made of: a Problem, a Method that solves it, and its Solution."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.core.patterns import Group, Pattern, with_group
from secateur.core.statistics import Statistic
from secateur.errors import NumericalError

S = TypeVar("S", bound=Statistic)


@dataclass(frozen=True)
class Problem:
    """One matrix: find W' whose zeros obey the pattern, with a small ``||(W - W') X||``."""

    name: str
    weight: Float[Tensor, "out in"]
    pattern: Pattern
    statistics: Mapping[type[Statistic], Statistic] = field(default_factory=dict)

    def statistic(self, kind: type[S]) -> S:
        """The statistic of that kind, which the method must have listed in its `needs`."""
        if kind not in self.statistics:
            raise KeyError(f"{self.name}: {kind.__name__} was not collected; list it in the needs of the method.")
        return cast(S, self.statistics[kind])


@dataclass(frozen=True)
class Solution:
    """The pruned weight (dtype and shape of the problem's), its mask (True = kept), and numbers for the report."""

    weight: Float[Tensor, "out in"]
    mask: Bool[Tensor, "out in"]
    notes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """How to solve a problem. `solve` is pure: it never writes to the problem.

    `needs` are the statistics to collect beforehand; with none, the method runs without calibration data. `per` is
    the comparison group of unstructured patterns that leave it open.
    """

    name: str
    solve: Callable[[Problem], Solution]
    needs: frozenset[type[Statistic]] = frozenset()
    per: Group = "row"


def select(
    name: str,
    score: Callable[[Problem], Float[Tensor, "out in"]],
    *,
    needs: frozenset[type[Statistic]] = frozenset(),
    per: Group = "row",
) -> Method:
    """The method that keeps the weights with the highest scores and changes none of them.

    Exact: kept weights are bit-identical to the problem's, removed ones are +0.0.
    """

    def solve(problem: Problem) -> Solution:
        scores = score(problem)
        if not bool(scores.isfinite().all()):
            raise NumericalError(
                f"{problem.name}: {int((~scores.isfinite()).sum())} of {scores.numel()} {name} scores are not finite "
                "although weights and statistics are: their product overflows float32."
            )
        mask = with_group(problem.pattern, per).mask(scores)
        return Solution(torch.where(mask, problem.weight, torch.zeros_like(problem.weight)), mask)

    return Method(name, solve, needs, per)
