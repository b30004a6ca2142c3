"""Problems of one matrix for solvers: made ones, and those of a trained model."""

import pytest
import torch
from torch import Tensor

from secateur.core.gram import Gram
from secateur.core.patterns import NM, Pattern, Unstructured
from secateur.core.problem import Method, Problem, Solution
from secateur.core.statistics import SquaredNorm, Statistic

PATTERNS: list[Pattern] = [Unstructured(0.5), Unstructured(0.7, "row"), NM(2, 4), NM(4, 8)]
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


def normal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, width: int, seed: int = 0, outliers: tuple[int, ...] = ()) -> Tensor:
    """Tokens with a power-law spectrum and partially mixed channels, some of them twenty times as large."""
    basis = torch.linalg.qr(normal(width, width, 1000)).Q
    x = normal(tokens, width, seed) * torch.arange(1, width + 1).rsqrt()
    x = x @ (0.6 * torch.eye(width) + 0.4 * basis)
    x[:, list(outliers)] *= 20
    return x


def problem(
    weight: Tensor, x: Tensor, pattern: Pattern, dtype: torch.dtype = torch.float32, name: str = "model.layers.0.w"
) -> Problem:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return Problem(name, weight.to(dtype), pattern, statistics(x.to(wide)))


def statistics(*batches: Tensor) -> dict[type[Statistic], Statistic]:
    gram, norm = Gram.empty(batches[0].shape[1]), SquaredNorm.empty(batches[0].shape[1])
    for x in batches:
        gram.update(x, samples=1)
        norm.update(x, samples=1)
    return {Gram: gram, SquaredNorm: norm}


def gram_of(given: Problem) -> Tensor:
    return given.statistic(Gram).total


def damped_error(given: Problem, weight: Tensor, damping: float) -> Tensor:
    """Each row's ``||(w - w') X||² + damping ||(w - w') N||²``, what the normalised solvers minimise, in float64."""
    gram = gram_of(given).double()
    gram = gram + damping * torch.diag(gram.diagonal())
    difference = given.weight.double() - weight.double()
    return ((difference @ gram) * difference).sum(dim=1)


def start_from(mask: Tensor) -> Method:
    """The method with the dense weights under a mask of the test's own."""
    return Method("start", lambda problem: Solution(problem.weight * mask, mask))
