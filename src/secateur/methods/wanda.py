"""Wanda: a weight matters as much as its magnitude times the norm of the input that it multiplies.

Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695, equation 1;
the variant with searched row thresholds is in the published code only.
"""

from secateur.core import scores
from secateur.core.harmonic import weighted
from secateur.core.problem import Method, select, with_options
from secateur.core.statistics import SquaredNorm


@with_options
def wanda(*, weighting: str = "equal") -> Method:
    """The method with ``S_ij = |W_ij| ||X_j||_2``, compared within each output row.

    `weighting` "equal" counts every calibration sample alike. "published" counts the j-th one ``1 / j``, as the
    published ablations with weight updates do (and nothing else in that code): to compare with `wanda+obs_update`.
    """
    kind = weighted(weighting)
    return select("wanda", lambda problem: scores.wanda(problem, kind), needs=frozenset({kind}), per="row")


def wanda_variant() -> Method:
    """Wanda with row thresholds searched for each matrix, so that rows differ in sparsity (about as asked overall)."""
    return select("wanda_variant", scores.wanda, needs=frozenset({SquaredNorm}), per="search")
