"""GBLM-Pruner: Wanda's norm of the input, plus the norm of the weight's own gradient over the calibration samples.

Source: Das et al., "Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models", arXiv 2311.04902,
section 3 and algorithm 1; `gradient` and `gblm_inverse` are its ablations.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.core import scores
from secateur.core.choices import Norm
from secateur.core.gradients import GradientKind
from secateur.core.problem import Method, Problem, select, with_options
from secateur.core.statistics import SquaredNorm


@with_options
def gblm(norm: Norm = "l1", alpha: float = 100.0) -> Method:
    """The method with ``S_ij = |W_ij| (sqrt(s_j) + alpha ||G_ij||)``, compared within each output row.

    ``s_j`` is the sum of squares of input j over a sample, averaged over samples, and ``||G_ij||`` the un-normalised
    norm over samples. At 0 this is Wanda, and far above the default it is `gradient`.

    Paper: the formula has ``||X_j||_2 = sqrt(samples * s_j)`` in the place of ``sqrt(s_j)``; with its `alpha` set to
    this one times ``sqrt(samples)`` the ranking is the same. The published code is followed here, with its default of
    100. In both, the balance moves with the number of samples: for l1 the second term
    grows as their number, for l2 as its root, and the first stays.
    """

    def score(problem: Problem) -> Float[Tensor, "out in"]:
        pull = scores.absolute(problem.weight).mul_(problem.gradient_norm().norm()).mul_(alpha)
        return scores.wanda(problem).add_(pull)

    return select("gblm", score, needs=frozenset({SquaredNorm, GradientKind(norm)}))


@with_options
def gblm_inverse(norm: Norm = "l1", alpha: float = 100.0) -> Method:
    """The ablation with ``S_ij = |W_ij| sqrt(s_j) / (alpha ||G_ij|| + 1e-8)``: weights with a gradient go first.

    Paper: the published code makes the 1e-8 in half precision, where it is 0; here it is what it says.
    """

    def score(problem: Problem) -> Float[Tensor, "out in"]:
        return scores.wanda(problem).div_(problem.gradient_norm().norm().mul(alpha).add_(1e-8))

    return select("gblm_inverse", score, needs=frozenset({SquaredNorm, GradientKind(norm)}))


@with_options
def gradient(norm: Norm = "l1") -> Method:
    """The ablation with ``S_ij = |W_ij| ||G_ij||``, which needs no inputs."""

    def score(problem: Problem) -> Float[Tensor, "out in"]:
        weight = scores.absolute(problem.weight)
        return torch.mul(weight, problem.gradient_norm().norm().to(weight))

    return select("gradient", score, needs=frozenset({GradientKind(norm)}))
