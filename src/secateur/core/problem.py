"""The three objects that everything is made of: a Problem, a Method that solves it, and its Solution."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secateur.core.choices import Group
from secateur.core.gradients import GradientKind, GradientNorm
from secateur.core.gram import Gram
from secateur.core.needs import Drift, Need, gradient_kind, input_statistics
from secateur.core.own_code import written_at
from secateur.core.patterns import Pattern, with_group
from secateur.core.statistics import SquaredNorm, Statistic
from secateur.errors import MethodError, NumericalError, PatternError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

S = TypeVar("S", bound=Statistic)
Parameters = ParamSpec("Parameters")
Made = TypeVar("Made", bound="DataclassInstance")


@dataclass(frozen=True)
class Problem:
    """One matrix: find W' whose zeros obey the pattern, with a small ``||(W - W') X||``.

    `evidence` is what was collected for each need of the method, and for those of the run's targets.
    """

    name: str
    weight: Float[Tensor, "out in"]
    pattern: Pattern
    evidence: Mapping[Need, Any] = field(default_factory=dict)

    def statistic(self, kind: type[S]) -> S:
        """The statistic of that kind, which the method must have listed in its `needs`.

        A `Gram` answers for a `SquaredNorm` that was not collected: it is the diagonal.
        """
        if kind is SquaredNorm and kind not in self.evidence and Gram in self.evidence:
            return cast(S, self.statistic(Gram).squared_norm())
        if kind not in self.evidence:
            raise KeyError(f"{self.name}: {kind.__name__} was not collected; list it in the needs of the method.")
        return cast(S, self.evidence[kind])

    def gradient_norm(self) -> GradientNorm:
        """The norms of its gradients, of the one kind that the method must have listed in its `needs`."""
        kind = gradient_kind(self.evidence)
        if kind is None:
            raise KeyError(f"{self.name}: no gradients were collected; list a GradientKind in the needs of the method.")
        return cast(GradientNorm, self.evidence[kind])

    @property
    def drift(self) -> Float[Tensor, "out in"] | None:
        """What the outputs are to make up for, see `Drift`: a term of the right-hand side of the normal equations."""
        return next((value for need, value in self.evidence.items() if isinstance(need, Drift)), None)

    def reordered(self, order: Int[Tensor, " in"]) -> "Problem":
        """The same problem with its columns, and all that is known of them, in another order."""
        order = order.to(self.weight.device)
        evidence = {need: _reordered(own, order) for need, own in self.evidence.items()}
        return replace(self, weight=self.weight[:, order], evidence=evidence)

    @property
    def tokens(self) -> int | None:
        """How many tokens its inputs were summed over; None where they were not looked at."""
        return max((self.evidence[kind].tokens for kind in input_statistics(self.evidence)), default=None)


def _reordered(evidence: Any, order: Int[Tensor, " in"]) -> Any:
    if isinstance(evidence, Tensor):
        return evidence[:, order.to(evidence.device)]
    if isinstance(evidence, GradientNorm):
        total = evidence.total[:, order.to(evidence.total.device)]
        return GradientNorm(evidence.kind, total, evidence.tokens, evidence.samples)
    return evidence.select(order)


@dataclass(frozen=True)
class Solution:
    """The pruned weight (dtype and shape of the problem's), its mask (True = kept), and numbers for the report.

    `score` is what the mask was chosen by, where there is one score for each weight; its distribution goes into the
    manifest.
    """

    weight: Float[Tensor, "out in"]
    mask: Bool[Tensor, "out in"]
    notes: Mapping[str, float] = field(default_factory=dict)
    score: Float[Tensor, "out in"] | None = None


@dataclass(frozen=True)
class Method:
    """How to solve a problem. `solve` is pure: it never writes to the problem.

    `needs` say what to collect beforehand, see `secateur.core.needs`; with none, the method runs without calibration
    data. `per` is the comparison group of unstructured patterns that
    leave it open. `products` is about how many products of the weights with a Gram matrix a solve takes the time of,
    for estimates. `options` are what it was made with, for the record; `with_options` fills them in. `revision` is
    raised when the same options lead to other results than before, so that kept results are not taken for new ones.
    `score` is what it chooses by, where that is one score for each weight before any is changed.
    """

    name: str
    solve: Callable[[Problem], Solution]
    needs: frozenset[Need] = frozenset()
    per: Group = "row"
    products: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    revision: int = 1
    score: Callable[[Problem], Float[Tensor, "out in"]] | None = None

    def __post_init__(self) -> None:
        gradient_kind(self.needs)

    @property
    def inputs(self) -> frozenset[type[Statistic]]:
        """The statistics of inputs among its needs."""
        return input_statistics(self.needs)

    @property
    def gradient(self) -> GradientKind | None:
        """The kind of gradients among its needs."""
        return gradient_kind(self.needs)


def select(
    name: str,
    score: Callable[[Problem], Float[Tensor, "out in"]],
    *,
    needs: frozenset[Need] = frozenset(),
    per: Group = "row",
) -> Method:
    """The method that keeps the weights with the highest scores and changes none of them.

    Exact: kept weights are bit-identical to the problem's, removed ones are +0.0.
    """

    def solve(problem: Problem) -> Solution:
        scores = score(problem)
        weight, place = problem.weight, written_at(score)
        end = "" if place is None else f" The score is computed in {place}."
        if not isinstance(scores, Tensor):
            raise MethodError(
                f"{problem.name}: {name} returned a {type(scores).__name__} as its scores, expected a tensor of "
                f"{tuple(weight.shape)}.{end}"
            )
        if scores.shape != weight.shape or scores.is_complex() or scores.device != weight.device:
            raise MethodError(
                f"{problem.name}: {name} returned {scores.dtype} scores of shape {tuple(scores.shape)} on "
                f"{scores.device}, expected real ones of {tuple(weight.shape)} on {weight.device}: one for each "
                f"weight.{end}"
            )
        if not bool(scores.isfinite().all()):
            why = "their product overflows float32." if place is None else f"they are computed in {place}."
            raise NumericalError(
                f"{problem.name}: {int((~scores.isfinite()).sum())} of {scores.numel()} {name} scores are not finite "
                f"although weights and statistics are: {why}"
            )
        mask = with_group(problem.pattern, per).mask(scores)
        return Solution(torch.where(mask, weight, 0), mask, score=scores)

    return Method(name, solve, needs, per, score=score)


@dataclass(frozen=True)
class Refinement:
    """What to do after a method: from a problem and its solution so far to a better solution.

    `refine` is pure: it writes neither to the problem nor to the solution. The rest is as for a `Method`.
    """

    name: str
    refine: Callable[[Problem, Solution], Solution]
    needs: frozenset[Need] = frozenset()
    products: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    revision: int = 1


def chain(method: Method, *refinements: Refinement) -> Method:
    """The method with the refinements after it, in this order; named "method+refinement+...".

    It needs what any of them needs. Of notes with the same name the last one counts.
    """

    def solve(problem: Problem) -> Solution:
        problem = replace(problem, pattern=with_group(problem.pattern, method.per))
        solution = method.solve(problem)
        for refinement in refinements:
            refined = refinement.refine(problem, solution)
            solution = replace(refined, notes={**solution.notes, **refined.notes})
        return solution

    name = "+".join([method.name, *(refinement.name for refinement in refinements)])
    needs = method.needs.union(*(refinement.needs for refinement in refinements))
    products = method.products + sum(refinement.products for refinement in refinements)
    options = dict(method.options)
    for refinement in refinements:
        options |= {f"{refinement.name}.{option}": value for option, value in refinement.options.items()}
    return replace(method, name=name, solve=solve, needs=needs, products=products, options=options)


def at_least(least: float, method: str, **options: float) -> None:
    """Raise `PatternError` for an option of a method that is below `least`, or no finite number."""
    for option, value in options.items():
        if not least <= value < math.inf:
            raise PatternError(f"{method}: {option} must be at least {least:g}, got {value:g}.")


def above_zero(method: str, **options: float) -> None:
    """Raise `PatternError` for an option of a method that is not above zero, or no finite number."""
    for option, value in options.items():
        if not 0 < value < math.inf:
            raise PatternError(f"{method}: {option} must be above 0, got {value:g}.")


def with_options(factory: Callable[Parameters, Made]) -> Callable[Parameters, Made]:
    """The factory of a method, refinement or allocation, which remembers its arguments in what it makes."""

    @functools.wraps(factory)
    def make(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Made:
        bound = inspect.signature(factory).bind(*args, **kwargs)
        bound.apply_defaults()
        return replace(factory(*args, **kwargs), options=dict(bound.arguments))

    return make
