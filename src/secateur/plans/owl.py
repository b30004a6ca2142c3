"""OWL: blocks with more outliers among their scores keep more weights.

Source: Yin et al., "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High
Sparsity", arXiv 2310.05175, section 3.2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.core import scores
from secateur.core.problem import Problem, at_least, with_options
from secateur.core.statistics import SquaredNorm
from secateur.plans.allocation import Allocation, spread


@with_options
def owl(*, outlier: float = 5.0, width: float = 0.08) -> Allocation:
    """Sparsities that fall linearly with the share of scores ``|W_ij| ||X_j||`` above `outlier` times their mean.

    Mean and share are taken over all weights of a unit. `width` is the largest distance from the mean sparsity
    (lambda); the published one depends on the model, from 0.05 to 0.2.
    """
    at_least(0, "owl", outlier=outlier, width=width)

    def measure(problems: Sequence[Problem]) -> Tensor:
        found = [scores.wanda(problem).flatten() for problem in problems]
        total, count = sum(float(own.double().sum()) for own in found), sum(own.numel() for own in found)
        above = sum(int((own > outlier * total / count).sum()) for own in found)
        return torch.tensor([above / count], dtype=torch.float64)

    return Allocation(
        "owl", measure, lambda found: spread(found.values[:, 0], width, found.sparsity), frozenset({SquaredNorm})
    )
