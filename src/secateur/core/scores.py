"""Importance of each weight, larger is kept. Every score is float32 (float64 for float64 weights)."""

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.core.problem import Problem
from secateur.core.statistics import SquaredNorm


def absolute(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """``|W|`` in float32 whatever the dtype of the weight, or in float64 for float64 weights."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32)).abs()


def magnitude(problem: Problem) -> Float[Tensor, "out in"]:
    """``S_ij = |W_ij|``."""
    return absolute(problem.weight)


def wanda(problem: Problem, kind: type[SquaredNorm] = SquaredNorm) -> Float[Tensor, "out in"]:
    """``S_ij = |W_ij| * sqrt(s_j)`` with ``s_j`` the sum of squares of input j over a sample, averaged over samples.

    Paper: equation 1 of Wanda has ``||X_j||_2`` over all tokens, which is ``sqrt(samples * s_j)``. One factor for the
    whole matrix changes no mask; with the published scale the scores can be compared between calibrations.
    `kind` is a `HarmonicNorm` for the norms of the published ablations.
    """
    weight = absolute(problem.weight)
    return weight.mul_(problem.statistic(kind).per_sample().sqrt().to(weight))


def ria(problem: Problem, exponent: float = 0.5) -> Float[Tensor, "out in"]:
    """``S_ij = (|W_ij| / sum_k |W_kj| + |W_ij| / sum_k |W_ik|) * sqrt(s_j) ** exponent``, 0 where a sum is 0.

    A weight's share of its column and of its row, times the damped norm of its input (``s_j`` as in `wanda`).
    """
    weight = absolute(problem.weight)
    column, row = weight.sum(dim=0, keepdim=True), weight.sum(dim=1, keepdim=True)
    tiny = torch.finfo(weight.dtype).tiny
    share = (weight / column.clamp(min=tiny)).add_(weight / row.clamp(min=tiny))
    return share.mul_(problem.statistic(SquaredNorm).per_sample().sqrt().pow(exponent).to(weight))
