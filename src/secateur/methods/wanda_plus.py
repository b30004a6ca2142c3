"""Wanda++'s score: Wanda's, plus the gradient of the output norm of the block that the matrix is in.

Source: Yang et al., "Wanda++: Pruning Large Language Models via Regional Gradients", arXiv 2503.04992, section 4.1.
The score alone: the paper's regional optimiser changes weights and is not part of it.
"""

from jaxtyping import Float
from torch import Tensor

from secateur.core import scores
from secateur.core.gradients import GradientKind
from secateur.core.problem import Method, Problem, select, with_options
from secateur.core.statistics import SquaredNorm


@with_options
def wanda_plus(alpha: float = 100.0) -> Method:
    """The method with ``S_ij = |W_ij| (||X_j||_2 + alpha sqrt(mean_n g_nij ** 2))``, compared within each output row.

    ``||X_j||_2`` is over the tokens of all samples, as the formula has it, and ``g_n`` the gradient of
    ``||f(X_n)||_2``, the norm of the block's output for sample n. The first term grows as the root of the number of
    samples and the second does not: with N samples `alpha` weighs ``1 / sqrt(N)`` of what it weighs with one.
    """

    def score(problem: Problem) -> Float[Tensor, "out in"]:
        regional = problem.gradient_norm().root_mean_square()
        norm = problem.statistic(SquaredNorm).norm()
        return scores.absolute(problem.weight).mul_(regional.mul_(alpha).add_(norm.to(regional)))

    kind = GradientKind("l2", scope="block")
    return select("wanda_plus", score, needs=frozenset({SquaredNorm, kind}))
