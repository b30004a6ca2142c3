"""AlphaPruning: matrices whose spectrum has a heavier tail keep more weights. It looks at no token.

Source: Lu et al., "AlphaPruning: Using Heavy-Tailed Self Regularization Theory for Improved Layer-wise Pruning of Large
Language Models", arXiv 2410.10912, section 3.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.core.problem import Problem, at_least, with_options
from secateur.plans.allocation import Allocation, Measured

BINS = 100


@with_options
def alpha(*, width: float = 0.3) -> Allocation:
    """Sparsities that grow linearly with the mean exponent of a unit's spectra, from 1 - `width` to 1 + `width` times.

    They are scaled together until their mean over the weights is the one asked for.
    """
    at_least(0, "alpha", width=width)

    def measure(problems: Sequence[Problem]) -> Tensor:
        exponents = [exponent(problem.weight) for problem in problems]
        return torch.tensor([sum(exponents) / len(exponents)], dtype=torch.float64)

    def divide(found: Measured) -> Tensor:
        own = found.values[:, 0]
        low, high = own.min(), own.max()
        place = torch.zeros_like(own) if high == low else 2 * (own - low) / (high - low) - 1
        factors = 1 + width * place
        return found.sparsity * factors * found.weights.sum() / (factors * found.weights).sum()

    return Allocation("alpha", measure, divide)


def exponent(weight: Float[Tensor, "out in"]) -> float:
    """The exponent of the power law that the largest eigenvalues of ``W Wᵀ`` follow, by Hill's estimate.

    ``1 + n / sum_i ln(l_i / l_min)`` over the n eigenvalues from l_min on, where l_min is the left edge of the highest
    of 100 bins of their logarithms (the fix-finger rule).
    """
    values = torch.linalg.svdvals(weight.to(torch.promote_types(weight.dtype, torch.float32))).double().square()
    logs = values[values > 0].log()
    low, high = float(logs.min()), float(logs.max())
    if low == high:
        return 1.0
    bins = torch.histc(logs, BINS, low, high)
    least = low + int(bins.argmax()) * (high - low) / BINS
    tail = logs[logs >= least]
    return 1 + len(tail) / float((tail - least).sum())
