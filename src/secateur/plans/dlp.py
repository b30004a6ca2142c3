"""DLP: blocks whose scores have a higher median keep fewer weights.

Source: Chen et al., "DLP: Dynamic Layerwise Pruning in Large Language Models", arXiv 2505.23807, section 3.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.core import scores
from secateur.core.problem import Problem, at_least, with_options
from secateur.core.statistics import SquaredNorm
from secateur.plans.allocation import Allocation, spread


@with_options
def dlp(*, width: float = 0.15) -> Allocation:
    """Sparsities that grow linearly with the median of the scores ``|W_ij| ||X_j||`` over all weights of a unit.

    `width` is the largest distance from the mean sparsity (alpha).
    """
    at_least(0, "dlp", width=width)

    def measure(problems: Sequence[Problem]) -> Tensor:
        return torch.tensor([median(problems)], dtype=torch.float64)

    return Allocation(
        "dlp",
        measure,
        lambda found: spread(relative_importance(found.values[:, 0]), width, found.sparsity),
        frozenset({SquaredNorm}),
    )


def median(problems: Sequence[Problem]) -> float:
    """The (lower) median of all scores of some matrices."""
    return float(torch.cat([scores.wanda(problem).flatten() for problem in problems]).median())


def relative_importance(medians: Float[Tensor, " units"]) -> Float[Tensor, " units"]:
    """``1 - m_u / sum m``: how little a unit has of all medians."""
    return 1 - medians / medians.sum()
