"""Pruner-Zero: the score that a genetic search over expressions of weight, input and gradient found.

Source: Dong et al., "Pruner-Zero: Evolving Symbolic Pruning Metric from Scratch for Large Language Models",
arXiv 2406.02924; the expression that its repository publishes.
"""

from jaxtyping import Float
from torch import Tensor

from secateur.core import scores
from secateur.core.choices import Norm
from secateur.core.gradients import GradientKind
from secateur.core.problem import Method, Problem, select, with_options


@with_options
def pruner_zero(norm: Norm = "l2") -> Method:
    """The method with ``S_ij = W_ij ** 2 (||G_ij|| - min ||G||) / (max ||G|| - min ||G||)``, compared within rows.

    The minimum and the maximum are those of the whole matrix. Where all gradients are equal the score is 0.
    """

    def score(problem: Problem) -> Float[Tensor, "out in"]:
        gradient = problem.gradient_norm().norm()
        low, high = gradient.aminmax()
        scaled = (gradient - low).div_((high - low).clamp(min=1e-38))
        return scores.absolute(problem.weight).square_().mul_(scaled)

    return select("pruner_zero", score, needs=frozenset({GradientKind(norm)}))
