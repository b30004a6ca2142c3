"""Allocations against transcriptions of their papers' formulas with numpy, and against brute force."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from secateur.core.gram import Gram
from secateur.core.needs import OutputGradients
from secateur.core.patterns import NM, Pattern, Unstructured
from secateur.core.problem import Problem
from secateur.core.statistics import SquaredNorm
from secateur.errors import PatternError
from secateur.plans import ALLOCATIONS
from secateur.plans.allocation import Allocation, Measured, levels
from secateur.plans.allocation import Unit as PlansUnit
from secateur.plans.alpha import alpha, exponent
from secateur.plans.dlp import dlp
from secateur.plans.owl import owl
from secateur.plans.sensitivity import hull, least_damage, sensitivity
from secateur.pruning.named import allocation_of
from secateur.pruning.settings import AllocationName, Unit

HALF = Unstructured(0.5, "row")


def problems(
    seed: int, pattern: Pattern = HALF, shapes: Sequence[tuple[int, int]] = ((6, 8), (4, 16))
) -> list[Problem]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number, (rows, columns) in enumerate(shapes):
        x = torch.randn(20, columns, generator=generator) * torch.rand(columns, generator=generator).exp()
        weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator).exp()
        gradients = torch.randn(20, rows, generator=generator)
        norm, gram, felt = SquaredNorm.empty(columns), Gram.empty(columns), OutputGradients.empty(rows)
        norm.update(x, samples=2)
        gram.update(x, samples=2)
        felt.update(gradients)
        evidence = {SquaredNorm: norm, Gram: gram, OutputGradients: felt}
        found.append(Problem(f"matrix {number}", weight, pattern, evidence))
    return found


def units(allocation: Allocation, count: int, pattern: Pattern = HALF) -> tuple[list[list[Problem]], Measured]:
    """Some units, one for each block, and what the allocation measures of them."""
    members = [problems(seed, pattern) for seed in range(count)]
    values = torch.stack([allocation.measure(own) for own in members])
    weights = torch.tensor([float(sum(one.weight.numel() for one in own)) for own in members], dtype=torch.float64)
    return members, Measured(values, weights, torch.arange(count), pattern)


def wanda_scores(own: Sequence[Problem]) -> np.ndarray:
    """All scores of a unit, on the scale of the published code (the mean over samples)."""
    return np.concatenate(
        [(np.abs(one.weight.numpy()) * np.sqrt(one.evidence[SquaredNorm].total.numpy() / 2)).reshape(-1) for one in own]
    )


def test_the_names_of_settings_are_those_of_the_table() -> None:
    assert set(get_args(AllocationName)) == {"uniform", *ALLOCATIONS}
    assert get_args(Unit) == get_args(PlansUnit)
    for name, make in ALLOCATIONS.items():
        assert make().name == name


def test_owl() -> None:
    members, found = units(owl(outlier=2.0, width=0.1), 5)
    ratio = np.array([100 * (scores > 2.0 * scores.mean()).mean() for scores in map(wanda_scores, members)])
    scaled = (ratio - ratio.min()) * (1 / (ratio.max() - ratio.min()) * 0.1 * 2)
    kept = scaled - scaled.mean() + (1 - 0.5)
    np.testing.assert_allclose(owl(outlier=2.0, width=0.1).divide(found).numpy(), 1 - kept, rtol=1e-6)


def test_dlp() -> None:
    members, found = units(dlp(width=0.15), 6)
    medians = []
    for scores in map(wanda_scores, members):
        ordered = np.sort(scores)
        medians.append(ordered[(len(ordered) - 1) // 2])
    unimportance = np.array(medians)
    importance = 1 - unimportance / unimportance.sum()
    scaled = (importance - importance.min()) / (importance.max() - importance.min()) * 0.15 * 2
    np.testing.assert_allclose(dlp().divide(found).numpy(), 0.5 - (scaled - scaled.mean()), rtol=1e-5)


def test_alpha() -> None:
    members, found = units(alpha(width=0.3), 4)
    exponents = []
    for own in members:
        each = []
        for one in own:
            values = np.linalg.eigvalsh(one.weight.double().numpy().T @ one.weight.double().numpy())
            values = np.sort(values)[::-1][: min(one.weight.shape)]
            counts, edges = np.histogram(np.log(values), bins=100)
            least = np.exp(edges[counts.argmax()])
            tail = values[values >= least * (1 - 1e-6)]
            each.append(1 + len(tail) / np.log(tail / least).sum())
        exponents.append(np.mean(each))
    np.testing.assert_allclose(found.values[:, 0].numpy(), exponents, rtol=1e-3)
    layers = np.array(exponents)
    scaled = (layers - layers.min()) / (layers.max() - layers.min()) * (1.3 - 0.7) + 0.7
    weights = found.weights.numpy()
    expected = scaled * (0.5 * weights.sum() / (scaled * weights).sum())
    np.testing.assert_allclose(alpha().divide(found).numpy(), expected, rtol=1e-3)


def test_a_spectrum_that_follows_a_power_law_has_its_exponent() -> None:
    # Eigenvalues whose density falls with the power 3, as the quantiles of that law.
    count = 800
    quantiles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    eigenvalues = (1 - quantiles) ** (-1 / (3 - 1))
    assert exponent(torch.diag(eigenvalues.sqrt())) == pytest.approx(3, abs=0.15)


@pytest.mark.parametrize("pattern", [Unstructured(0.5, "row"), Unstructured(0.5, "matrix"), NM(4, 8)])
def test_damage_is_the_felt_error_of_what_wanda_removes(pattern: Pattern) -> None:
    allocation = sensitivity(offset=0.0)
    own = problems(3, pattern)
    curve = allocation.measure(own)[:-1].numpy()
    at = levels(pattern, allocation.bounds(pattern), 7)
    assert len(curve) == len(at)
    assert at[0] == pytest.approx(0.125 if isinstance(pattern, NM) else 0.1)
    assert at[-1] == pytest.approx(0.625 if isinstance(pattern, NM) else 2 / 3)
    for level, damage in zip(at, curve, strict=True):
        expected = 0.0
        for one in own:
            weight = one.weight.double().numpy()
            gram, felt = one.evidence[Gram].total.double().numpy(), one.evidence[OutputGradients].total.numpy() / 20
            scores = np.abs(weight) * np.sqrt(np.diag(gram))
            size = {"row": scores.shape[1], "matrix": scores.size}.get(getattr(pattern, "per", ""), 8)
            groups = scores.reshape(-1, size)
            order = groups.argsort(axis=1, kind="stable")[:, : math.floor(size * Fraction(str(level)))]
            removed = np.zeros_like(groups)
            np.put_along_axis(removed, order, 1.0, axis=1)
            lost = removed.reshape(weight.shape) * weight
            expected += sum(felt[row] * lost[row] @ gram @ lost[row] for row in range(len(lost))) / 20 / 2
        assert damage == pytest.approx(expected, rel=1e-4)


def test_least_damage_is_that_of_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    at = torch.linspace(0.2, 0.8, 7, dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    curves = torch.rand(3, 7, generator=generator, dtype=torch.float64).cumsum(1)  # convex: sums of growing steps
    curves = curves.cumsum(1)

    def damage(sparsities: Tensor) -> float:
        return sum(
            float(np.interp(float(s), at.numpy(), curve.numpy())) for s, curve in zip(sparsities, curves, strict=True)
        )

    best = least_damage(curves, at, weights, 0.5)
    assert float((best * weights).sum() / weights.sum()) == pytest.approx(0.5)
    grid = np.linspace(0.2, 0.8, 61)
    for first, second in itertools.product(grid, grid):
        third = (0.5 * 6 - first - 2 * second) / 3
        if 0.2 <= third <= 0.8:
            assert damage(best) <= damage(torch.tensor([first, second, third])) + 1e-9


def test_the_hull_of_a_curve_that_bends_down() -> None:
    assert hull([(0, 0), (1, 3), (2, 4), (3, 9)]) == [(0, 0), (2, 4), (3, 9)]
    assert hull([(0, 1), (1, 0), (2, 5)]) == [(0, 1), (1, 0), (2, 5)]


def test_the_offset_goes_by_block() -> None:
    flat = Measured(
        torch.tensor([[0, 1, 2, 3, 4, 5, 6, median] for median in (1.0, 3.0, 4.0, 4.0)], dtype=torch.float64),
        torch.tensor([1.0, 3.0, 2.0, 2.0], dtype=torch.float64),
        torch.tensor([0, 0, 1, 1]),
        HALF,
    )
    without, found = sensitivity(offset=0.0).divide(flat), sensitivity(offset=0.05).divide(flat)
    # Block 0 has the mean median 2.5, block 1 has 4: its scores are higher, so that it loses more.
    assert torch.allclose(found - without, torch.tensor([-0.05, -0.05, 0.05, 0.05], dtype=torch.float64))


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_units_that_are_all_alike_get_the_same(name: str) -> None:
    allocation = ALLOCATIONS[name]()
    value = allocation.measure(problems(1))
    same = Measured(value.expand(3, -1), torch.ones(3, dtype=torch.float64) * 112, torch.arange(3), HALF)
    spread = allocation.divide(same)
    if name != "sensitivity":  # which fills units one after the other where marginal damages are equal
        assert torch.allclose(spread, torch.full((3,), 0.5, dtype=torch.float64))
    assert float(spread.mean()) == pytest.approx(0.5)


def test_options_are_read_from_text() -> None:
    assert allocation_of("owl", ["width=0.2", "outlier=7"]).options == {"width": 0.2, "outlier": 7.0}
    for text, message in (
        ("wide=0.2", "--allocation-option wide=0.2: owl has no option wide; it has outlier, width."),
        ("width", '--allocation-option width: expected NAME=VALUE, such as "damping=0.02".'),
        ("width=big", '--allocation-option width=big: got "big", expected a number.'),
        ("width=-1", "owl: width must be at least 0, got -1."),
    ):
        with pytest.raises(PatternError) as error:
            allocation_of("owl", [text])
        assert str(error.value) == message
    with pytest.raises(PatternError, match=r'unknown allocation "owls"\. Did you mean "owl"\?'):
        allocation_of("owls")
