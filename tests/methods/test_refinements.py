"""Least squares and swaps on a given mask: against brute force; and chains of them."""

import dataclasses

import pytest
import torch

import reference_solvers
from layer_problems import PATTERNS, correlated, damped_error, every_pattern, gram_of, normal, problem, start_from
from secateur.core import linalg
from secateur.core.gram import Gram
from secateur.core.patterns import NM, Pattern, Unstructured
from secateur.core.problem import Refinement, chain
from secateur.core.statistics import SquaredNorm
from secateur.errors import PatternError
from secateur.methods import METHODS, REFINEMENTS
from secateur.methods.least_squares import least_squares
from secateur.methods.magnitude import magnitude
from secateur.methods.swaps import swaps
from secateur.methods.wanda import wanda

every_refinement = pytest.mark.parametrize("name", REFINEMENTS)


# Refinements


@pytest.mark.parametrize("pattern", [Unstructured(0.5, "matrix"), Unstructured(0.8, "row"), NM(2, 4)], ids=str)
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_exact_least_squares_is_least_squares_on_the_tokens(pattern: Pattern, damping: float) -> None:
    x = correlated(300, 48, outliers=(5,)).double()
    given = problem(normal(10, 48, 1), x, pattern, torch.float64)
    mask = magnitude().solve(given).mask.clone()
    mask[3] = False  # rows of very different counts, one of them empty
    mask[4] = True
    solution = chain(start_from(mask), least_squares(damping=damping, exact=True)).solve(given)
    expected = reference_solvers.least_squares(given.weight, x, mask, damping)
    torch.testing.assert_close(solution.weight, expected, rtol=0, atol=1e-9)
    assert torch.equal(solution.mask, mask)
    assert solution.notes["least_squares_damping"] == damping


def test_exact_least_squares_in_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(normal(10, 48, 1), correlated(300, 48), Unstructured(0.5))
    whole = chain(magnitude(), least_squares(exact=True)).solve(given)
    monkeypatch.setattr(linalg, "CHUNK_BYTES", 20000)
    torch.testing.assert_close(chain(magnitude(), least_squares(exact=True)).solve(given).weight, whole.weight)


@every_pattern
def test_conjugate_gradients_reach_exact_least_squares(pattern: Pattern) -> None:
    given = problem(normal(10, 48, 1), correlated(300, 48, outliers=(5,)), pattern, torch.float64)
    exact = chain(wanda(), least_squares(exact=True)).solve(given)
    many = chain(wanda(), least_squares(iterations=200, tolerance=0.0)).solve(given)
    assert many.notes["least_squares_iterations"] < 200, "they rest when they are there"
    torch.testing.assert_close(many.weight, exact.weight, rtol=0, atol=1e-5)
    few = chain(wanda(), least_squares()).solve(given)
    assert few.notes["least_squares_iterations"] < 32, "they stop where further steps gain next to nothing"
    assert few.notes["reconstruction_error"] < 1.002 * exact.notes["reconstruction_error"]


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "admm"])
@every_pattern
def test_each_conjugate_gradient_step_lowers_the_error_of_every_row(name: str, pattern: Pattern) -> None:
    given = problem(normal(10, 48, 1), correlated(300, 48, outliers=(5,)), pattern, torch.float64)
    before = damped_error(given, METHODS[name]().solve(given).weight, 0.01)
    for iterations in range(1, 8):
        solution = chain(METHODS[name](), least_squares(iterations=iterations, tolerance=0.0)).solve(given)
        after = damped_error(given, solution.weight, 0.01)
        assert bool((after <= before * (1 + 1e-9)).all())
        before = after


def test_least_squares_after_any_solver_is_no_worse() -> None:
    given = problem(normal(16, 64, 1), correlated(400, 64, outliers=(5,)), Unstructured(0.6))
    for name in METHODS:
        if METHODS[name]().gradient is not None:
            continue
        before, after = METHODS[name]().solve(given), chain(METHODS[name](), least_squares(exact=True)).solve(given)
        error = damped_error(given, before.weight, 0.01).sum()
        assert damped_error(given, after.weight, 0.01).sum() <= error * (1 + 1e-5), name
        assert torch.equal(before.mask, after.mask)


@pytest.mark.parametrize("group", [None, 4, 6])
def test_swaps_are_the_best_ones_by_brute_force(group: int | None) -> None:
    width = 12
    x, weight = correlated(50, width).double(), normal(5, width, 1).double()
    pattern: Pattern = NM(group // 2, group) if group else Unstructured(0.5, "row")
    given = problem(weight, x, pattern, torch.float64)
    masks = magnitude().solve(given).mask
    for limit in (1, 2, 3):
        solution = chain(start_from(masks), swaps(limit=limit, candidates=0)).solve(given)
        for row in range(5):
            expected = masks[row]
            for _ in range(limit):
                expected, lowest = reference_solvers.best_swap(weight[row], x, expected, group or width)
            assert torch.equal(solution.mask[row], expected)
            found = float(((weight[row] - solution.weight[row]) @ x.T).square().sum())
            assert found == pytest.approx(lowest)
    finished = chain(start_from(masks), swaps(candidates=0)).solve(given)
    assert chain(start_from(finished.mask), swaps(candidates=0)).solve(given).notes["swaps"] == 0
    assert torch.equal(finished.weight, weight * finished.mask)


@pytest.mark.parametrize("pattern", [*PATTERNS, Unstructured(0.5, "search")], ids=str)
def test_swaps_lower_the_error_of_every_row_and_keep_pattern_and_weights(pattern: Pattern) -> None:
    given = problem(normal(10, 48, 1), correlated(300, 48, outliers=(5,)), pattern)
    start = wanda().solve(given)
    first = before = damped_error(given, start.weight, 0)
    for limit in (1, 5, 100):
        solution = chain(wanda(), swaps(limit=limit, candidates=8)).solve(given)
        after = damped_error(given, solution.weight, 0)
        assert bool((after <= before * (1 + 1e-6)).all())
        before = after
        assert torch.equal(solution.mask.sum(dim=1), start.mask.sum(dim=1))
        assert pattern.violation(solution.mask) is None
        assert torch.equal(solution.weight, given.weight * solution.mask)
    assert float(before.sum()) < 0.9 * float(first.sum())


def test_swaps_in_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur.core import exchange

    given = problem(normal(10, 48, 1), correlated(300, 48), Unstructured(0.5))
    whole = chain(wanda(), swaps()).solve(given)
    monkeypatch.setattr(exchange, "CHUNK_BYTES", 3 * 4 * 48 * 48 * 3)
    assert torch.equal(chain(wanda(), swaps()).solve(given).mask, whole.mask)


def test_swaps_refuse_a_pattern_that_they_do_not_know() -> None:
    given = problem(normal(4, 8, 1), correlated(30, 8), NM(2, 4))
    solution = wanda().solve(given)

    class Strange:
        sparsity = 0.5

        def __str__(self) -> str:
            return "strange"

    strange = dataclasses.replace(given, pattern=Strange())  # type: ignore[arg-type]
    with pytest.raises(
        PatternError, match=r"^model\.layers\.0\.w: swaps needs an unstructured or N:M pattern, got stra"
    ):
        swaps().refine(strange, solution)


def test_least_squares_on_the_best_mask_is_the_optimum_by_brute_force() -> None:
    x, weight = correlated(60, 7).double(), normal(6, 7, 1).double()
    total = {"sparsegpt": 0.0, "alps": 0.0, "best": 0.0}
    given = problem(weight, x, Unstructured(4 / 7 + 1e-9, "row"), torch.float64)
    for row in range(6):
        total["best"] += reference_solvers.best_row_error(weight[row], x, 3, refit=True)
    for name in ("sparsegpt", "alps"):
        method = chain(METHODS[name](), least_squares(damping=0.0, exact=True))
        total[name] = float(damped_error(given, method.solve(given).weight, 0).sum())
        assert total[name] >= total["best"] * (1 - 1e-9)
    assert total["alps"] <= 1.35 * total["best"]


# chain


def test_chain_unites_names_needs_and_notes() -> None:
    method = chain(wanda(), swaps(), least_squares())
    assert (method.name, method.per) == ("wanda+swaps+least_squares", "row")
    assert method.needs == {SquaredNorm, Gram}
    solution = method.solve(problem(normal(4, 16, 1), correlated(60, 16), Unstructured(0.5)))
    assert {"swaps", "least_squares_damping", "least_squares_iterations", "reconstruction_error"} == set(solution.notes)
    assert chain(magnitude()).name == "magnitude"
    assert chain(magnitude(), least_squares()).per == "matrix"


def test_chain_is_each_step_by_hand() -> None:
    given = problem(normal(4, 16, 1), correlated(60, 16), Unstructured(0.5))
    by_hand = least_squares().refine(given, swaps().refine(given, wanda().solve(given)))
    solution = chain(wanda(), swaps(), least_squares()).solve(given)
    assert torch.equal(solution.weight, by_hand.weight)
    assert torch.equal(solution.mask, by_hand.mask)


@every_refinement
@pytest.mark.parametrize("shape", [(6, 24), (1, 24), (24, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_refinement_is_made_under_its_own_name_and_is_pure(
    name: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    refinement = REFINEMENTS[name]()
    assert isinstance(refinement, Refinement)
    assert refinement.name == name
    assert REFINEMENTS[name].__doc__
    given = problem(normal(*shape, 1), correlated(90, shape[1]), NM(2, 4), dtype)
    start = wanda().solve(given)
    before = [tensor.clone() for tensor in (given.weight, gram_of(given), start.weight, start.mask)]
    first, second = refinement.refine(given, start), REFINEMENTS[name]().refine(given, start)
    assert torch.equal(first.weight, second.weight)
    first.weight.zero_()
    first.mask.zero_()
    for tensor, copy in zip((given.weight, gram_of(given), start.weight, start.mask), before, strict=True):
        assert torch.equal(tensor, copy)
    assert second.weight.dtype == dtype
    assert NM(2, 4).violation(second.mask) is None
    assert not bool(second.weight[~second.mask].any())
