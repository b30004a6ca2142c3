"""Sensitivity: zeros go where the loss feels the errors that they make least.

Damage of a matrix at sparsity s, to second order and with inputs and gradients taken as independent:
``d(s) = sum_i f_i dW_i G dW_iᵀ / (2 tokens)``, where f_i is the mean over tokens of the squared gradient of the loss at
output i (labels drawn from the model's own distribution: the diagonal of the Fisher information), G the Gram matrix
of the inputs, and dW what Wanda removes at s. The sum of all damages is made as small as the budget allows.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.core import scores
from secateur.core.gram import Gram, full_precision
from secateur.core.needs import OutputGradients
from secateur.core.patterns import NM, Pattern, Unstructured
from secateur.core.problem import Problem, at_least, with_options
from secateur.plans.allocation import Allocation, Measured, levels, spread
from secateur.plans.dlp import relative_importance

LEVELS = 7


@with_options
def sensitivity(*, offset: float = 0.05, below: float = 0.4, above: float = 1 / 3) -> Allocation:
    """Sparsities that make the sum of all damages smallest, and then those of deeper blocks up to 2 * `offset` higher.

    No sparsity lies more than `below` under the mean one, or removes more than the share `above` of what the mean one
    keeps: curves say nothing of what lies outside. The offset is that of DLP, with the mean of the medians of a block's
    units in the place of the median of all of its scores.
    """
    at_least(0, "sensitivity", offset=offset, below=below, above=above)

    def bounds(pattern: Pattern) -> tuple[float, float]:
        return max(0.0, pattern.sparsity - below), pattern.sparsity + (1 - pattern.sparsity) * min(above, 0.99)

    def measure(problems: Sequence[Problem]) -> Tensor:
        at = levels(problems[0].pattern, bounds(problems[0].pattern), LEVELS)
        total = torch.zeros(len(at), dtype=torch.float64)
        medians = weights = 0.0
        for problem in problems:
            score = scores.wanda(problem)
            total += damages(problem, score, at)
            medians += float(score.flatten().median()) * score.numel()
            weights += score.numel()
        return torch.cat([total, torch.tensor([medians / weights], dtype=torch.float64)])

    def divide(found: Measured) -> Tensor:
        curves, medians = found.values[:, :-1], found.values[:, -1]
        at = torch.tensor(levels(found.pattern, bounds(found.pattern), LEVELS), dtype=torch.float64)
        best = least_damage(curves, at, found.weights, found.sparsity)
        blocks = torch.unique(found.blocks)
        if not offset or len(blocks) == 1:
            return best
        of_block = torch.stack([_mean(medians, found.weights, found.blocks == block) for block in blocks])
        deeper = spread(relative_importance(of_block), offset, 0.0)
        return best + deeper[torch.searchsorted(blocks, found.blocks)]

    return Allocation("sensitivity", measure, divide, frozenset({Gram, OutputGradients}), "matrix", bounds)


def damages(problem: Problem, score: Float[Tensor, "out in"], at: Sequence[float]) -> Float[Tensor, " levels"]:
    """The damage of a matrix at each sparsity, in nats per token, float64."""
    gram, gradients = problem.statistic(Gram), problem.evidence[OutputGradients]
    weight = problem.weight.to(gram.total)
    felt = (gradients.total / gradients.tokens).to(weight)
    found = []
    with full_precision():
        for sparsity in at:
            removed = torch.where(_at(problem.pattern, sparsity).mask(score), 0, weight)
            rows = (removed @ gram.total).mul_(removed).sum(dim=1)
            found.append(float((rows * felt).double().sum()) / (2 * gram.tokens))
    return torch.tensor(found, dtype=torch.float64)


def _at(pattern: Pattern, sparsity: float) -> Pattern:
    if isinstance(pattern, NM):
        return NM(pattern.m - round(sparsity * pattern.m), pattern.m)
    return Unstructured(sparsity, "matrix" if isinstance(pattern, Unstructured) and pattern.per == "matrix" else "row")


def _mean(values: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    return (values[chosen] * weights[chosen]).sum() / weights[chosen].sum()


def least_damage(
    curves: Float[Tensor, "units levels"],
    at: Float[Tensor, " levels"],
    weights: Float[Tensor, " units"],
    sparsity: float,
) -> Float[Tensor, " units"]:
    """The sparsities with the smallest sum of damages and this mean over all weights.

    Between levels the lower convex hull of each curve counts, so that going up by the smallest marginal damage first
    is exact.
    """
    steps = []
    for unit, curve in enumerate(curves.tolist()):
        corners = hull(list(zip(at.tolist(), curve, strict=True)))
        for (low, damage), (high, more) in pairwise(corners):
            steps.append(((more - damage) / ((high - low) * float(weights[unit])), unit, high - low))
    found = torch.full((len(curves),), float(at[0]), dtype=torch.float64)
    left = float((sparsity - at[0]) * weights.sum())
    for _, unit, length in sorted(steps):
        taken = min(length, max(left, 0.0) / float(weights[unit]))
        found[unit] += taken
        left -= taken * float(weights[unit])
    return found


def hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The corners of the lower convex hull of points that are sorted from left to right."""
    corners: list[tuple[float, float]] = []
    for x, y in points:
        while len(corners) > 1:
            (left_x, left_y), (middle_x, middle_y) = corners[-2:]
            if (middle_y - left_y) * (x - left_x) < (y - left_y) * (middle_x - left_x):
                break
            corners.pop()
        corners.append((x, y))
    return corners
