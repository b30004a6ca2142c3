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
    """The method with ``S_ij = |W_ij| (sqrt(s_j) + alpha sqrt(mean_n g_nij ** 2))``, compared within each output row.

    ``g_n`` is the gradient of ``||f(X_n)||_2``, the norm of the block's output for sample n.

    Paper: writes ``||X_j||_2`` and leaves open over which tokens. ``sqrt(s_j)``, its root mean square over samples, is
    the counterpart of the gradient's, so that `alpha` means the same for any number of samples.
    """

    def score(problem: Problem) -> Float[Tensor, "out in"]:
        regional = problem.gradient_norm().root_mean_square()
        return scores.wanda(problem).add_(scores.absolute(problem.weight).mul_(regional).mul_(alpha))

    kind = GradientKind("l2", scope="block")
    return select("wanda_plus", score, needs=frozenset({SquaredNorm}), gradient=kind)
