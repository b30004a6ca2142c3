"""SparseGPT: removes weights column by column, and makes up for each in the columns that are still to come.

Source: Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
arXiv 2301.00774, algorithm 1; published code, `fasterprune`.
"""

from jaxtyping import Float
from torch import Tensor

from secateur.core.gram import Gram
from secateur.core.linalg import finished, inverse_factor, outputs_target, working_gram
from secateur.core.patterns import with_group
from secateur.core.problem import Method, Problem, Solution, at_least, with_options
from secateur.core.sweep import choose_as_it_goes, sweep


@with_options
def sparsegpt(*, damping: float = 0.01) -> Method:
    """The method that chooses masks by ``w_ij² / U_jj²`` on weights as they are updated, and updates the others.

    ``Uᵀ U = (G + damping mean(diag G) I)⁻¹``. Masks are chosen for 128 columns at a time, comparing all their weights
    (``per="matrix"``) or each row's (``per="row"``), or for the M columns of an N:M group. Weights on inputs that are
    always zero become zero. Deviations: exact counts, and any N:M.

    Options: `damping`, relative to the mean of the diagonal, 0.01 as published; where it is too little for a Cholesky
    factorisation it is raised tenfold, up to 1. Notes: `damping` as used, `reconstruction_error`.
    """
    at_least(0, "sparsegpt", damping=damping)

    def solve(problem: Problem) -> Solution:
        gram = working_gram(problem)
        factor, used = inverse_factor(problem.name, gram, damping)
        pivots = factor.diagonal()

        def score(first: int, weight: Float[Tensor, "out some"]) -> Float[Tensor, "out some"]:
            return (weight / pivots[first : first + weight.shape[1]]).square_()

        pattern = with_group(problem.pattern, "matrix")
        choose, group = choose_as_it_goes(problem.name, pattern, len(problem.weight), score)
        target = outputs_target(problem, gram, used)
        weight, mask = sweep(target, factor, choose, live=gram.diagonal() > 0, group=group)
        return finished(problem, weight, mask, damping=used)

    return Method("sparsegpt", solve, frozenset({Gram}), per="matrix", products=6)
