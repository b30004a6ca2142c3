"""The ablations of Wanda: a mask by one score, and the weight update of SparseGPT.

Source: Sun et al., arXiv 2306.11695, section 5 ("pruning with weight update"); published code, `ablate.py`. Sequential:
the mask of the dense weights, then the update. Iterative: the mask is chosen again in every 128 columns, or in every
group of M, on the weights as they are updated. Weights on inputs that are always zero become zero, as published.
Paper: the published ablations weight calibration sample j by 1/j in the norms. Here every sample counts alike, unless
`weighting="published"` asks for theirs.
"""

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from secateur.core.columns import BLOCK, Score, column_method, follow, update
from secateur.core.gram import Gram
from secateur.core.harmonic import weighted
from secateur.core.linalg import working_dtype
from secateur.core.problem import Method, Problem, Refinement, Solution, at_least, with_options
from secateur.core.statistics import SquaredNorm


@with_options
def obs_update(*, damping: float = 0.01) -> Refinement:
    """The refinement that prunes the dense weights once more with the same mask, by SparseGPT's loop over columns.

    ``chain(wanda(), obs_update())`` is the sequential ablation. Weights of the solution before it do not matter.
    Option: `damping`, as in `sparsegpt`. Notes: `obs_update_damping` as used, `reconstruction_error`.
    """
    at_least(0, "obs_update", damping=damping)

    def refine(problem: Problem, solution: Solution) -> Solution:
        choose = follow(solution.mask)
        return update(problem, damping, lambda pivots: (choose, BLOCK), note="obs_update_damping")

    return Refinement("obs_update", refine, frozenset({Gram}), products=6)


@with_options
def magnitude_iterative(*, damping: float = 0.01) -> Method:
    """The method with ``|W_ij|`` on weights as they are updated, compared over 128 columns (iterative ablation)."""
    return column_method("magnitude_iterative", damping, lambda problem, pivots: lambda first, weight: weight.abs())


@with_options
def wanda_iterative(*, damping: float = 0.01, weighting: str = "equal") -> Method:
    """The method with ``|W_ij| ||X_j||₂`` on weights as they are updated, compared over 128 columns (the same).

    `weighting` as in `wanda`.
    """
    kind = weighted(weighting)

    def score(problem: Problem, pivots: Float[Tensor, " in"]) -> Score:
        norm = problem.statistic(kind).per_sample().sqrt().to(problem.weight.device, working_dtype(problem))
        return lambda first, weight: weight.abs() * norm[first : first + weight.shape[1]]

    method = column_method("wanda_iterative", damping, score)
    return method if kind is SquaredNorm else replace(method, needs=method.needs | {kind})  # a Gram has its diagonal
