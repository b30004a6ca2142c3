"""From the sparsities that an allocation wants to a plan that removes as many weights as a uniform one."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

from secateur.core.patterns import NM, Pattern, Unstructured, removed_count
from secateur.errors import PatternError
from secateur.plans.plan import Plan, Shapes

DIGITS = 18  # after which a decimal between two neighbouring counts is no longer looked for
HALVINGS = 100  # of the interval that holds the shift


@dataclass(frozen=True)
class Counted:
    """A matrix as a pattern counts it: `groups` of `entries` weights, of which each loses the same whole number."""

    groups: int
    entries: int
    pattern: Pattern

    @property
    def weights(self) -> int:
        """Of the matrix."""
        return self.groups * self.entries

    @property
    def asked(self) -> int:
        """The weights that each group loses under the pattern."""
        if isinstance(self.pattern, NM):
            return self.pattern.m - self.pattern.n
        return removed_count(self.entries, self.pattern.sparsity)

    def losing(self, removed: int) -> Pattern:
        """The pattern under which each group loses so many weights."""
        if isinstance(self.pattern, NM):
            return NM(self.pattern.m - removed, self.pattern.m)
        assert isinstance(self.pattern, Unstructured)
        return replace(self.pattern, sparsity=shortest(removed, self.entries))


def counted(name: str, pattern: Pattern, shape: tuple[int, int]) -> Counted:
    """How a pattern counts a matrix of this (out, in) shape. Raises `PatternError` where it does not count."""
    rows, columns = shape
    if isinstance(pattern, NM):
        return Counted(rows * columns // pattern.m, pattern.m, pattern)
    if isinstance(pattern, Unstructured) and pattern.per != "search":
        return Counted(1, rows * columns, pattern) if pattern.per == "matrix" else Counted(rows, columns, pattern)
    raise PatternError(
        f"{name}: an allocation divides weights by number, and {pattern} has none. Use an N:M pattern, or an "
        "unstructured one per row or per matrix."
    )


def shortest(removed: int, entries: int) -> float:
    """The shortest decimal that makes `removed_count` remove exactly so many of `entries`."""
    for digits in range(1, DIGITS):
        sparsity = float(math.ceil(Fraction(removed, entries) * 10**digits) / 10**digits)
        if sparsity < 1 and removed_count(entries, sparsity) == removed:
            return sparsity
    raise PatternError(f"no decimal of {DIGITS} digits removes {removed} of {entries} weights.")


def on_budget(uniform: Plan, shapes: Shapes, wanted: Mapping[str, float], bounds: tuple[float, float]) -> Plan:
    """The plan that comes closest to the sparsities `wanted` and removes as many weights as the `uniform` one.

    All wanted sparsities are shifted by the same amount until their mean over the weights is that of the uniform plan,
    and none lies outside of `bounds`. Each group (a row, a matrix, M inputs) then loses a whole number of weights: the
    lower one, or the higher one for those of which most is lost by rounding. The zeros are those of the uniform plan
    exactly where the numbers of groups allow it (per row: where the smallest number of rows divides the others);
    otherwise fewer, by less than the smallest matrix has groups that may still lose a weight. Matrices that are not in
    `wanted` keep the pattern that they have.

    Raises `PatternError` where no such plan lies within the bounds.
    """
    matrices = {name: counted(name, uniform[name], shapes[name]) for name in wanted}
    budget = sum(own.groups * own.asked for own in matrices.values())
    lowest, highest = ({name: limit(own, bound) for name, own in matrices.items()} for bound, limit in _limits(bounds))
    least, most = (sum(own.groups * limit[name] for name, own in matrices.items()) for limit in (lowest, highest))
    if not least <= budget <= most:
        raise PatternError(
            f"no plan has between {least:,} and {most:,} zeros, which is what sparsities of {bounds[0]:.3g} to "
            f"{bounds[1]:.3g} allow, and {budget:,} as asked. Ask for another sparsity, or for wider bounds."
        )

    def shifted(shift: float) -> dict[str, float]:
        return {
            name: min(max((wanted[name] + shift) * own.entries, lowest[name]), highest[name])
            for name, own in matrices.items()
        }

    def zeros(counts: Mapping[str, float]) -> float:
        return math.fsum(own.groups * counts[name] for name, own in matrices.items())

    exact = shifted(bisected(lambda shift: zeros(shifted(shift)) - budget))
    counts = {name: math.floor(count) for name, count in exact.items()}
    left = budget - int(zeros(counts))
    # Rounding: once up where most was lost, and then wherever a group of weights still fits.
    order = sorted(matrices, key=lambda name: counts[name] - exact[name])
    grown = True
    while grown:
        grown = False
        for name in order:
            if matrices[name].groups <= left and counts[name] < highest[name]:
                counts[name] += 1
                left -= matrices[name].groups
                grown = True
    return Plan({name: matrices[name].losing(counts[name]) if name in counts else own for name, own in uniform.items()})


def _limits(bounds: tuple[float, float]) -> tuple[tuple[float, Callable[[Counted, float], int]], ...]:
    """The two bounds, each with how it is rounded to a number of weights: inwards, but to what is asked for at most."""
    return (
        (bounds[0], lambda own, bound: min(own.asked, math.ceil(bound * own.entries))),
        (bounds[1], lambda own, bound: min(own.entries - 1, max(own.asked, math.floor(bound * own.entries)))),
    )


def bisected(excess: Callable[[float], float]) -> float:
    """The shift, between -1 and 1, at which a function that grows with it is zero."""
    low, high = -1.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return (low + high) / 2
