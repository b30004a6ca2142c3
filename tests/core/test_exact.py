"""Sums that are the same bits in any order and for any number of processes, against Python's own whole numbers."""

import math
import random
from collections.abc import Sequence
from copy import deepcopy
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.core.exact import PRECISION, ExactSum, Joinable
from secateur.core.gradients import GradientSums
from secateur.core.gram import CrossGram, Gram, Products
from secateur.core.statistics import SquaredNorm

SHAPE = (2, 3)
economical = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def empty() -> list[Tensor]:
    return [torch.zeros(SHAPE, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)]


def add(total: ExactSum, values: Tensor) -> None:
    factor = total.begin(float(values.abs().max()))
    if factor is not None:
        total.add(0, values * factor)
        total.add(1, values[0, :1] * factor)


def summed(batches: Sequence[Tensor]) -> ExactSum:
    total = ExactSum(empty)
    for values in batches:
        add(total, values)
    return total


def joined(parts: Sequence[Joinable]) -> None:
    """What processes do with their parts, one step after the other."""
    told = [part.told() for part in parts]
    shared = [part.shared(told) for part in parts]
    for tensors in zip(*shared, strict=True):
        total = torch.stack(list(tensors)).sum(0)
        for tensor in tensors:
            tensor.copy_(total)


def rounded(values: Tensor) -> list[Fraction]:
    """Every value on the grid of its batch, by the definition of the grid and without torch's arithmetic."""
    largest = max(abs(Fraction(value)) for value in values.flatten().tolist())
    if not largest:
        return [Fraction(0)] * values.numel()
    exponent = math.frexp(float(largest))[1]
    grid = Fraction(2) ** (exponent - PRECISION)
    return [round(Fraction(value) / grid) * grid for value in values.flatten().tolist()]


def batches_of(exponents: Sequence[int], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator) * 2.0**exponent for exponent in exponents]


@economical
@given(st.lists(st.integers(-40, 40), min_size=1, max_size=12), st.integers(0, 1000), st.integers(1, 4))
def test_any_order_and_any_number_of_processes(exponents: list[int], seed: int, count: int) -> None:
    """Also where the values are of very different size, so that one integer cannot hold their sum."""
    batches = batches_of(exponents, seed)
    whole = summed(batches).take(0, torch.float64)
    order = list(batches)
    random.Random(seed).shuffle(order)
    assert torch.equal(summed(order).take(0, torch.float64), whole)
    parts = [summed(order[rank::count]) for rank in range(count)]
    joined(parts)
    for part in parts:
        assert torch.equal(part.take(0, torch.float64), whole)
        assert torch.equal(part.take(1, torch.float64), whole[0, :1])
    one, other = summed(order[::2]), summed(order[1::2])
    one.merge(other)
    assert torch.equal(one.take(0, torch.float64), whole)
    assert other.added == summed(order[1::2]).added


@economical
@given(st.lists(st.integers(-60, 60), min_size=1, max_size=12), st.integers(0, 1000))
def test_the_sum_is_that_of_the_rounded_values(exponents: list[int], seed: int) -> None:
    batches = batches_of(exponents, seed)
    expected = [sum(column) for column in zip(*map(rounded, batches), strict=True)]
    found = summed(batches).take(0, torch.float64).flatten().tolist()
    for value, exact in zip(found, expected, strict=True):
        # Rounded to float64 digit by digit.
        assert abs(Fraction(value) - exact) <= abs(exact) * Fraction(1, 2**50), (value, float(exact))


@pytest.mark.parametrize("doublings", [0, 10, 15, 16, 17, 20])
def test_many_equal_values(doublings: int) -> None:
    """More than 2**16 of them need a second integer."""
    total = ExactSum(lambda: [torch.zeros(1, dtype=torch.int64)])
    factor = total.begin(1.5)
    assert factor is not None
    total.add(0, torch.tensor([1.5]) * factor)
    for _ in range(doublings):
        total.merge(deepcopy(total))
    assert total.take(0, torch.float64).item() == 1.5 * 2**doublings


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e39])
def test_what_is_not_finite_is_noted_everywhere(bad: float) -> None:
    sound, spoilt = summed(batches_of([0], 1)), summed(batches_of([0], 2))
    assert spoilt.begin(bad) is None
    assert not spoilt.finite
    joined([sound, spoilt])
    for part in (sound, spoilt):
        assert not part.finite
        assert part.take(0, torch.float32).isnan().all()


def test_nothing_and_zeros() -> None:
    total = ExactSum(empty)
    assert total.begin(0.0) is None
    assert not total.take(0, torch.float32).any()
    parts = [ExactSum(empty), summed(batches_of([3], 0))]
    joined(parts)
    assert torch.equal(parts[0].take(0, torch.float64), summed(batches_of([3], 0)).take(0, torch.float64))


def tokens(seed: int, scale: float = 1.0, width: int = 300, count: int = 70) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("kind", [SquaredNorm, Gram, CrossGram])
@pytest.mark.parametrize("counts", [(5,), (2, 3), (0, 1, 4), (1, 1, 1, 2)], ids=str)
def test_statistics_of_several_processes_are_those_of_one(kind: Any, counts: tuple[int, ...]) -> None:
    batches = [tokens(number, 10.0 ** (number - 2)) for number in range(5)]
    given = iter(batches)
    parts = []
    for count in counts:
        own = kind.empty(300)
        if kind is SquaredNorm:
            own.keep_terms()
        for _ in range(count):
            x = next(given)
            own.update(x, **({"dense": x.flip(0)} if kind is CrossGram else {}))
        parts.append(own)
    joined(parts)
    alone = kind.empty(300)
    for x in batches:
        alone.update(x, **({"dense": x.flip(0)} if kind is CrossGram else {}))
    for own in parts:
        assert own.tokens == 350
        assert torch.equal(own.total, alone.total)


def test_massive_activations_lose_no_more_than_float32_does() -> None:
    """Inputs whose squared norms spread over 2 ** 26, as in models with massive activations."""
    batches = [tokens(number, width=64, count=1024) for number in range(16)]
    for x in batches:
        x[:, 0] *= 2.0**13
    exact = sum(x.double().t() @ x.double() for x in batches)
    root = exact.diagonal().sqrt()
    gram, plain = Gram.empty(64), torch.zeros(64, 64)
    for x in batches:
        gram.update(x)
        plain.addmm_(x.t(), x)
    errors = [((own.double() - exact) / root / root.unsqueeze(1)).abs().max() for own in (gram.total, plain)]
    assert errors[0] < 1.5 * errors[1]


def test_products_of_any_shape_and_device_dtype() -> None:
    left, right = tokens(0, width=700), tokens(1, width=1100)
    found = Products(700, 1100)
    found.add(left, right)
    found.add(left.bfloat16(), right.bfloat16())
    expected = left.double().t() @ right.double() + left.bfloat16().double().t() @ right.bfloat16().double()
    torch.testing.assert_close(found.take().double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_gradients_of_several_processes_are_those_of_one(norm: Any, count: int) -> None:
    """Experts that only some processes have seen as well."""
    parameter = torch.zeros(4, 6, 5)
    generator = torch.Generator().manual_seed(0)
    added = []
    for sample in range(7):
        for expert in range(4):
            if (sample + expert) % 3 == 0:
                gradient = torch.randn(6, 5, generator=generator) * 10.0 ** (sample - 3)
                added.append((((6, 5), (5, 1), 30 * expert), gradient))

    def summed(own: Sequence[Any]) -> GradientSums:
        sums = GradientSums(parameter, norm)
        for region, gradient in own:
            sums.add(region, gradient.abs() if norm == "l1" else gradient.square(), 2.0)
        return sums

    whole = summed(added).total()
    expected = torch.zeros(4, 6, 5, dtype=torch.float64)
    for (_, _, offset), gradient in added:
        value = gradient.double() / 2
        expected[offset // 30] += value.abs() if norm == "l1" else value.square()
    torch.testing.assert_close(whole.double(), expected, rtol=1e-6, atol=1e-12)
    parts = [summed(added[rank::count]) for rank in range(count)]
    joined(parts)
    for part in parts:
        assert torch.equal(part.total(), whole)


def test_gradients_that_are_not_finite_keep_their_place() -> None:
    sums, other = GradientSums(torch.zeros(2, 3), "l1"), GradientSums(torch.zeros(2, 3), "l1")
    gradient = torch.ones(2, 3)
    other.add(((2, 3), (3, 1), 0), gradient)
    gradient[1, 2] = math.nan
    sums.add(((2, 3), (3, 1), 0), gradient)
    joined([other, sums])
    assert other.total().isnan().nonzero().tolist() == [[1, 2]]
