"""SparseGPT: removes weights column by column, and makes up for each in the columns that are still to come.

Source: Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
arXiv 2301.00774, algorithm 1; published code, `fasterprune`.
"""

from jaxtyping import Float
from torch import Tensor

from secateur.core.columns import Score, column_method
from secateur.core.problem import Method, Problem, with_options


@with_options
def sparsegpt(*, damping: float = 0.01) -> Method:
    """The method that chooses masks by ``w_ij² / U_jj²`` on weights as they are updated, and updates the others.

    ``Uᵀ U = (G + damping mean(diag G) I)⁻¹``. Masks are chosen for 128 columns at a time, comparing all their weights
    (``per="matrix"``) or each row's (``per="row"``), or for the M columns of an N:M group. Weights on inputs that are
    always zero become zero. Deviations: exact counts, and any N:M.

    Options: `damping`, relative to the mean of the diagonal, 0.01 as published; where it is too little for a Cholesky
    factorisation it is raised tenfold, up to 1. Notes: `damping` as used, `reconstruction_error`.
    """

    def score(problem: Problem, pivots: Float[Tensor, " in"]) -> Score:
        return lambda first, weight: (weight / pivots[first : first + weight.shape[1]]).square_()

    return column_method("sparsegpt", damping, score)
