"""Magnitude pruning: the smallest weights go. Needs no data.

Source: the baseline of Wanda and SparseGPT; the comparison group is the matrix.
Paper: the published code removes one weight more than asked for, and every tie; here the count is exact.
"""

from secateur.core import scores
from secateur.core.problem import Method, select


def magnitude() -> Method:
    """The method with ``S_ij = |W_ij|``, compared over the whole matrix unless the pattern says otherwise."""
    return select("magnitude", scores.magnitude, per="matrix")
