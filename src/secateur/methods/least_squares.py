"""Least squares on the kept weights: the best that a given mask can do for its matrix.

Source: the second stage of ALPS (Meng et al., arXiv 2406.07831, section 3.2), for any mask; the exact solve is the
textbook one.
"""

from secateur.core.gram import Gram, full_precision
from secateur.core.linalg import climb, conjugate_gradients, finished, normalise, solve_on_support
from secateur.core.problem import Problem, Refinement, Solution, at_least, with_options


@with_options
def least_squares(
    *, damping: float = 0.01, iterations: int = 32, tolerance: float = 1e-4, exact: bool = False
) -> Refinement:
    """The refinement that fits the kept weights of a solution to the outputs of the dense ones; its mask stays.

    Minimises ``||(W' - W) X||² + damping ||(W' - W) N||²`` over the kept weights of every row, ``N`` the norms of the
    inputs: `damping` is relative to each input's own. Kept weights on inputs that are always zero are the dense ones.

    Options: at most `iterations` of conjugate gradients from the solution's weights, none of which raises the damped
    error, until one lowers it by less than `tolerance` of what all have; with `exact` one Cholesky factorisation per
    row instead, of ``kept³ / 3`` multiply-adds each. Notes: `least_squares_damping`, `least_squares_iterations` as used
    (0 when exact), `reconstruction_error`.
    """
    at_least(0, "least_squares", damping=damping, tolerance=tolerance)
    at_least(1, "least_squares", iterations=iterations)

    @full_precision()
    def refine(problem: Problem, solution: Solution) -> Solution:
        scaled = normalise(problem)
        if exact:
            steps = 0
            weight, used = climb(
                problem.name,
                scaled.gram,
                damping,
                lambda gram, value: solve_on_support(gram, scaled.right.add(scaled.weight, alpha=value), solution.mask),
            )
        else:
            start = scaled.into(solution.weight)
            gram, right, used = scaled.damped(damping)
            weight, steps = conjugate_gradients(
                gram, right, start, solution.mask, iterations=iterations, tolerance=tolerance
            )
        notes = {"least_squares_damping": used, "least_squares_iterations": float(steps)}
        return finished(problem, scaled.back(weight), solution.mask, **notes)

    return Refinement("least_squares", refine, frozenset({Gram}), products=25 * iterations / 32)
