"""ADMM and ALPS: the published iterations."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import reference_solvers
from layer_problems import correlated, damped_error, every_pattern, gram_of, normal, problem, start_from
from secateur.core.gram import Gram
from secateur.core.patterns import NM, Pattern, Unstructured
from secateur.core.problem import Problem, chain
from secateur.methods.admm import admm
from secateur.methods.alps import alps
from secateur.methods.least_squares import least_squares
from secateur.methods.magnitude import magnitude


@pytest.mark.parametrize("kind", ["row", "matrix", (2, 4), (4, 8), (1, 4)], ids=str)
@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_admm_is_the_published_iteration(kind: Any, sparsity: float) -> None:
    pattern: Pattern = NM(*kind) if isinstance(kind, tuple) else Unstructured(sparsity, kind)
    given = problem(normal(12, 40, 1), correlated(300, 40, outliers=(3,)), pattern, torch.float64)
    solution = admm().solve(given)
    expected, mask = reference_solvers.admm(given.weight, gram_of(given), kind, pattern.sparsity)
    assert torch.equal(solution.mask, mask)
    torch.testing.assert_close(solution.weight, expected, rtol=0, atol=1e-9)
    assert (solution.notes["iterations"], solution.notes["penalty"]) == (20.0, 1.0)


def test_admm_with_a_settled_mask_ends_at_least_squares() -> None:
    given = problem(normal(6, 24, 1), correlated(200, 24), NM(2, 4), torch.float64)
    solution = admm(iterations=3000, growing=1).solve(given)
    exact = least_squares(damping=0.1, exact=True).refine(given, solution)
    torch.testing.assert_close(solution.weight, exact.weight, rtol=0, atol=1e-9)


def test_admm_with_a_settled_mask_comes_closer_with_every_step() -> None:
    """Boyd et al., 2011, section 3.3: with its convex set ``rho ||Z - Z*||² + ||U - U*||² / rho`` never grows."""
    given = problem(normal(6, 24, 1), correlated(200, 24), Unstructured(0.5), torch.float64)
    trace: list[tuple[Tensor, Tensor]] = []
    reference_solvers.admm(given.weight, gram_of(given), "matrix", 0.5, steps=2000, growing=1, trace=trace)
    last = trace[-1]
    distance = [float(sum((one - other).square().sum() for one, other in zip(at, last, strict=True))) for at in trace]
    above_rounding = [value for value in distance if value > 1e-20 * distance[0]]
    assert len(above_rounding) > 50
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(above_rounding))
    norm = gram_of(given).diagonal().sqrt()
    for steps in range(1, 8):
        solution = admm(iterations=steps, growing=1).solve(given)
        torch.testing.assert_close(solution.weight, trace[steps - 1][0] / norm, rtol=0, atol=1e-9)


@every_pattern
def test_each_step_of_the_polish_of_alps_lowers_the_error_of_every_row(pattern: Pattern) -> None:
    given = problem(normal(12, 40, 1), correlated(300, 40, outliers=(3,)), pattern, torch.float64)
    errors = [damped_error(given, alps(polish=steps).solve(given).weight, 0.01) for steps in range(8)]
    for before, after in pairwise(errors):
        assert bool((after <= before * (1 + 1e-9)).all())
    assert float(errors[-1].sum()) < float(errors[0].sum())


@pytest.mark.parametrize("kind", ["row", "matrix", (2, 4)], ids=str)
def test_alps_is_the_published_iteration(kind: Any) -> None:
    pattern: Pattern = NM(*kind) if isinstance(kind, tuple) else Unstructured(0.6, kind)
    given = problem(normal(12, 40, 1), correlated(300, 40, outliers=(3,)), pattern, torch.float64)
    solution = alps().solve(given)
    expected, mask, steps, rho = reference_solvers.alps(given.weight, gram_of(given), kind, 0.6)
    assert (solution.notes["iterations"], solution.notes["penalty"]) == (steps, pytest.approx(rho))
    assert torch.equal(solution.mask, mask)
    torch.testing.assert_close(solution.weight, expected, rtol=0, atol=1e-8)


def test_alps_begins_again_with_less_where_the_first_mask_stays() -> None:
    weight = normal(8, 32, 1)
    given = problem(weight, correlated(200, 32), Unstructured(0.5))
    solution = alps(penalty=1e4).solve(given)
    assert solution.notes["penalty"] < 1e4
    start = chain(start_from(magnitude().solve(given).mask), least_squares()).solve(given)
    assert solution.notes["reconstruction_error"] < start.notes["reconstruction_error"]
    independent = Problem("w", weight, Unstructured(0.5), {Gram: Gram(torch.eye(32), 99, 1)})
    assert torch.equal(alps().solve(independent).mask, magnitude().solve(independent).mask)
