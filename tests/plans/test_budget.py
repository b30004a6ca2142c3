"""Budgets: a plan that is made of wanted sparsities removes as many weights as the uniform one, and none too many."""

from __future__ import annotations

import re
from fractions import Fraction
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.core.patterns import NM, Pattern, Unstructured, removed_count
from secateur.errors import PatternError
from secateur.plans.budget import on_budget, shortest
from secateur.plans.plan import Plan
from secateur.plans.uniform import uniform

# As in SmolLM2-135M: every number of rows is a multiple of the smallest.
SHAPES = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576), "up": (1536, 576), "down": (576, 1536)}
FULL = (0.0, 0.99)


def zeros(plan: Plan, shapes: dict[str, tuple[int, int]]) -> int:
    """Counted by the definition of each pattern."""
    total = 0
    for name, pattern in plan.items():
        rows, columns = shapes[name]
        if isinstance(pattern, NM):
            total += rows * columns // pattern.m * (pattern.m - pattern.n)
        elif pattern.per == "matrix":
            total += removed_count(rows * columns, pattern.sparsity)
        else:
            total += rows * removed_count(columns, pattern.sparsity)
    return total


# Far enough from the bounds that no shift of theirs puts the smallest matrices there: those make up the exact number.
@given(
    wanted=st.lists(st.floats(0.4, 0.6), min_size=6, max_size=6),
    sparsity=st.sampled_from([0.5, 0.6, 0.7, 0.33]),
)
def test_as_many_zeros_as_the_uniform_plan_per_row(wanted: list[float], sparsity: float) -> None:
    even = uniform(SHAPES, Unstructured(sparsity))
    plan = on_budget(even, SHAPES, dict(zip(SHAPES, wanted, strict=True)), FULL)
    assert zeros(plan, SHAPES) == zeros(even, SHAPES)


@given(wanted=st.lists(st.floats(0.0, 1.0), min_size=6, max_size=6), sparsity=st.floats(0.3, 0.8))
def test_to_one_weight_where_whole_matrices_are_compared(wanted: list[float], sparsity: float) -> None:
    even = uniform(SHAPES, Unstructured(sparsity, "matrix"))
    plan = on_budget(even, SHAPES, dict(zip(SHAPES, wanted, strict=True)), FULL)
    assert zeros(plan, SHAPES) == zeros(even, SHAPES)


@given(wanted=st.lists(st.floats(0.2, 0.9), min_size=6, max_size=6), m=st.sampled_from([4, 8, 16]))
def test_n_of_m(wanted: list[float], m: int) -> None:
    even = uniform(SHAPES, NM(m // 2, m))
    plan = on_budget(even, SHAPES, dict(zip(SHAPES, wanted, strict=True)), FULL)
    lacking = zeros(even, SHAPES) - zeros(plan, SHAPES)
    may_lose_more = [prod(SHAPES[name]) // m for name, own in plan.items() if isinstance(own, NM) and own.n > 1]
    assert 0 <= lacking < min(may_lose_more)
    assert {pattern.m for pattern in plan.values() if isinstance(pattern, NM)} == {m}


@pytest.mark.parametrize("pattern", [Unstructured(0.6), Unstructured(0.6, "matrix"), NM(3, 8)])
def test_sparsities_that_are_all_alike_are_the_uniform_plan(pattern: Pattern) -> None:
    even = uniform(SHAPES, pattern)
    plan = on_budget(even, SHAPES, dict.fromkeys(SHAPES, 0.2), FULL)
    for name in SHAPES:
        assert zeros(Plan({name: plan[name]}), SHAPES) == zeros(Plan({name: even[name]}), SHAPES)


def test_the_order_of_what_is_wanted_stays_and_bounds_hold() -> None:
    even = uniform(SHAPES, Unstructured(0.6))
    wanted = {"q": 0.95, "k": 0.1, "v": 0.3, "o": 0.6, "up": 0.65, "down": 0.55}
    plan = on_budget(even, SHAPES, wanted, (0.3, 0.75))
    found = {name: removed_count(SHAPES[name][1], plan[name].sparsity) / SHAPES[name][1] for name in plan}
    assert sorted(found, key=lambda name: found[name]) == sorted(wanted, key=lambda name: wanted[name])
    assert all(0.3 <= sparsity <= 0.75 for sparsity in found.values())
    assert found["q"] == pytest.approx(0.75, abs=1 / 576)


def test_matrices_that_were_not_measured_keep_their_pattern() -> None:
    even = uniform(SHAPES, Unstructured(0.5))
    plan = on_budget(even, SHAPES, {"q": 0.7, "o": 0.3}, FULL)
    assert {name: plan[name] for name in ("k", "v", "up", "down")} == {
        name: even[name] for name in ("k", "v", "up", "down")
    }
    assert zeros(plan, SHAPES) == zeros(even, SHAPES)
    assert plan["q"].sparsity > 0.69


@given(entries=st.integers(2, 200_000_000), data=st.data())
def test_the_decimal_of_a_count_stands_for_that_count(entries: int, data: st.DataObject) -> None:
    removed = data.draw(st.integers(0, entries - 1))
    sparsity = shortest(removed, entries)
    assert int(entries * Fraction(str(sparsity))) == removed


def test_bounds_never_rule_the_uniform_plan_out() -> None:
    even = uniform(SHAPES, NM(2, 4))
    assert dict(on_budget(even, SHAPES, dict.fromkeys(SHAPES, 0.9), (0.6, 0.4))) == dict(even)


def test_what_is_not_counted_is_refused() -> None:
    even = uniform(SHAPES, Unstructured(0.5, "search"))
    message = (
        "q: an allocation divides weights by number, and 0.5 unstructured per search has none. Use an N:M pattern, or "
        "an unstructured one per row or per matrix."
    )
    with pytest.raises(PatternError, match=f"^{re.escape(message)}$"):
        on_budget(even, SHAPES, dict.fromkeys(SHAPES, 0.5), FULL)
