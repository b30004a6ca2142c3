"""RIA: relative importance and activations. A weight matters as much as its share of its column and of its row.

Source: Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", ICLR 2024,
section 4.1. The published code compares over the whole matrix unless told otherwise. The channel permutation of the
same paper is not part of this.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.core import scores
from secateur.core.problem import Method, Problem, at_least, select, with_options
from secateur.core.statistics import SquaredNorm


@with_options
def ria(*, exponent: float = 0.5) -> Method:
    """The method with ``S_ij = (|W_ij| / sum_k |W_kj| + |W_ij| / sum_k |W_ik|) * sqrt(s_j) ** exponent``.

    A share is 0 where its sum is 0, and ``s_j`` is as in `wanda`.
    Option: `exponent`, 0.5 as published; it damps the norm of the input.
    """
    at_least(0, "ria", exponent=exponent)

    def score(problem: Problem) -> Float[Tensor, "out in"]:
        weight = scores.absolute(problem.weight)
        column, row = weight.sum(dim=0, keepdim=True), weight.sum(dim=1, keepdim=True)
        tiny = torch.finfo(weight.dtype).tiny
        share = (weight / column.clamp(min=tiny)).add_(weight / row.clamp(min=tiny))
        return share.mul_(problem.statistic(SquaredNorm).per_sample().sqrt().pow(exponent).to(weight))

    return select("ria", score, needs=frozenset({SquaredNorm}), per="matrix")
