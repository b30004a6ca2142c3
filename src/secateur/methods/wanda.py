"""Wanda: a weight matters as much as its magnitude times the norm of the input that it multiplies.

Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695, equation 1;
the variant with searched row thresholds is in the published code only.
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from secateur.core import scores
from secateur.core.harmonic import HarmonicNorm
from secateur.core.problem import Method, Problem, select, with_options
from secateur.core.statistics import SquaredNorm
from secateur.errors import PatternError


@with_options
def wanda(*, weighting: str = "equal") -> Method:
    """The method with ``S_ij = |W_ij| ||X_j||_2``, compared within each output row.

    `weighting` "equal" counts every calibration sample alike. "published" counts the j-th one ``1 / j``, as the
    published ablations with weight updates do (and nothing else in that code): to compare with `wanda+obs_update`.
    """
    score, statistic = weighted(weighting)
    return select("wanda", score, needs=frozenset({statistic}), per="row")


def weighted(weighting: str) -> tuple[Callable[[Problem], Float[Tensor, "out in"]], type[SquaredNorm]]:
    """Wanda's score with samples weighted in this way, and the statistic that it needs."""
    if weighting not in ("equal", "published"):
        raise PatternError(f'weighting: got "{weighting}", expected equal or published.')
    return (scores.wanda, SquaredNorm) if weighting == "equal" else (scores.wanda_by_order, HarmonicNorm)


def wanda_variant() -> Method:
    """Wanda with row thresholds searched for each matrix, so that rows differ in sparsity (about as asked overall)."""
    return select("wanda_variant", scores.wanda, needs=frozenset({SquaredNorm}), per="search")
