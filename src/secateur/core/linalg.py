"""Linear algebra of the normal equations: damping, factorisations, and solves for many output rows at once.

Written with the Gram matrix ``G = sum x xᵀ``: the squared error of a matrix is ``tr((W - W') G (W - W')ᵀ)``, so each
row of W' solves a least squares problem of its own, all with the same G and with the right-hand side ``W G``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar
from weakref import WeakKeyDictionary, ref

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secateur.core.gram import CrossGram, Gram, full_precision
from secateur.core.problem import Problem, Solution
from secateur.errors import NumericalError

T = TypeVar("T")

_TURNED = 1 << 20  # numbers that change places at once
STRIPE = 512  # columns of the Gram matrix that are multiplied at once where its symmetry halves the work
CHUNK_BYTES = 2**28  # of the small systems that are solved at once


def working_dtype(problem: Problem) -> torch.dtype:
    """The dtype to compute in: float32, or float64 where the weights or the sums of their inputs are float64.

    Half-precision checkpoints are solved in float64 where the model was run in it (`--dtype float64`).
    """
    gram = problem.evidence.get(Gram)
    wide = torch.float32 if gram is None else problem.statistic(Gram).total.dtype
    return torch.promote_types(problem.weight.dtype, torch.promote_types(wide, torch.float32))


def working_weight(problem: Problem) -> Float[Tensor, "out in"]:
    """The weight in the dtype to compute in, rows in one piece. Raises `NumericalError` when it is not finite."""
    weight = problem.weight.to(working_dtype(problem)).contiguous()
    if not bool(weight.isfinite().all()):
        bad = int((~weight.isfinite()).sum())
        raise NumericalError(f"{problem.name}: {bad} of {weight.numel()} weights are NaN or infinite.")
    return weight


def working_gram(problem: Problem) -> Float[Tensor, "in in"]:
    """``G`` where the weight is and in the dtype to compute in: the statistic's own memory, or a copy."""
    return problem.statistic(Gram).total.to(problem.weight.device, working_dtype(problem))


@full_precision()
def right_hand_side(
    problem: Problem, gram: Float[Tensor, "in in"], weight: Float[Tensor, "out in"] | None = None
) -> Float[Tensor, "out in"]:
    """The right-hand side of the normal equations ``W' G = B``: what decides which outputs a matrix is fitted to.

    ``B = W G`` fits it to its own outputs ``W X``. A problem with a `CrossGram` is fitted to the outputs ``W X_dense``
    that the dense model has: ``B = W C`` with ``C = sum x_dense xᵀ``. A problem with a `drift` makes up for it as well:
    ``B = W G + sum e xᵀ``. `weight` is the problem's `working_weight`, where it has been made already.
    """
    cross = problem.evidence.get(CrossGram)
    weight = working_weight(problem) if weight is None else weight
    right = weight @ (gram if cross is None else problem.statistic(CrossGram).total.to(gram))
    return right if problem.drift is None else right.add_(problem.drift.to(right))


@full_precision()
def outputs_target(
    problem: Problem, gram: Float[Tensor, "in in"], factor: Float[Tensor, "in in"]
) -> Float[Tensor, "out in"]:
    """The weights to prune: W itself, or where there is a `CrossGram` or a `drift` the best ones without a mask.

    The latter solve ``W' (G + d I) = B + d W``, with B of `right_hand_side` and ``Uᵀ U = (G + d I)⁻¹``, U the `factor`:
    ``W' = W + (B - W G) Uᵀ U``. Pruning them with a small ``||(W'' - W') X||²`` is the same as fitting W'' to those
    outputs.
    """
    weight = working_weight(problem)
    if CrossGram not in problem.evidence and problem.drift is None:
        return weight
    missing = right_hand_side(problem, gram, weight).sub_(weight @ gram)
    return torch.addmm(weight, missing @ factor.t(), factor)


@full_precision()
def energy(weight: Float[Tensor, "out in"], gram: Float[Tensor, "in in"]) -> float:
    """``||W X||² = tr(W G Wᵀ)``, from the upper triangle of G alone."""
    result = torch.zeros((), dtype=torch.float64, device=weight.device)
    for first in range(0, len(weight), 2 * STRIPE):
        rows = weight[first : first + 2 * STRIPE]
        for start in range(0, weight.shape[1], STRIPE):
            stop = min(start + STRIPE, weight.shape[1])
            product = rows[:, start:stop] @ gram[start:stop, start:]
            product[:, stop - start :] *= 2
            result += torch.linalg.vecdot(product, rows[:, start:]).sum(dtype=torch.float64)
    return max(float(result), 0.0)


def reconstruction_error(problem: Problem, weight: Float[Tensor, "out in"]) -> float:
    """``||(W - W') X||² / ||W X||²``, from the Gram matrix; 0 when ``W X`` is zero.

    Always for the inputs that the matrix has now, also where it was fitted to other outputs.
    """
    gram, dense = working_gram(problem), problem.weight.to(working_dtype(problem))
    whole = energy(dense, gram)
    return energy(dense - weight.to(dense), gram) / whole if whole else 0.0


def finished(
    problem: Problem,
    weight: Float[Tensor, "out in"],
    mask: Bool[Tensor, "out in"],
    **notes: float,
) -> Solution:
    """The solution with these weights where the mask is True, in the problem's dtype, and its reconstruction error."""
    kept = torch.where(mask, weight, 0).to(problem.weight.dtype).contiguous()
    mask = mask.clone(memory_format=torch.contiguous_format)
    return Solution(kept, mask, {"reconstruction_error": reconstruction_error(problem, kept), **notes})


def dampings(first: float) -> Iterator[float]:
    """The ladder: `first`, then ten times as much again and again, and 1.0 at the end.

    A `first` of 0 is followed by 1e-6. Raises `ValueError` for a negative one.
    """
    if not first >= 0:
        raise ValueError(f"damping must be at least 0, got {first:g}.")
    value = first
    while value < 1:
        yield value
        value = max(value * 10, 1e-6)
    yield max(first, 1.0)


def climb(
    name: str,
    gram: Float[Tensor, "in in"],
    damping: float,
    attempt: Callable[[Float[Tensor, "in in"], float], T | None],
) -> tuple[T, float]:
    """What `attempt` makes of the damped matrix and the damping, and the damping with which it succeeded.

    ``damping * mean(diagonal)`` is added to the diagonal of `gram`, in place, and more of it while `attempt` returns
    None, up the ladder of `dampings`. Raises `NumericalError` past its end.
    """
    diagonal = gram.diagonal()
    original = diagonal.clone()
    for value in dampings(damping):
        torch.add(original, original.mean(), alpha=value, out=diagonal)
        result = attempt(gram, value)
        if result is not None:
            return result, value
    smallest, largest = float(original.min()), float(original.max())
    raise NumericalError(
        f"{name}: the Gram matrix of its inputs has no Cholesky factor, not even with {value:g} of its mean diagonal "
        f"added (diagonal from {smallest:.3g} to {largest:.3g}, {len(gram)} inputs). Its sums are damaged: check the "
        f'calibration data, compute in float32 with --dtype float32, or leave this matrix out with --skip "{name}".'
    )


def cholesky(matrix: Float[Tensor, "*batch n n"], _damping: float = 0.0) -> Float[Tensor, "*batch n n"] | None:
    """The lower factor L of ``matrix = L Lᵀ``, or None where one is not positive definite: an attempt for `climb`."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    # A pivot that is positive by rounding alone gives a factor, and infinities soon after.
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    return factor if not bool(info.any()) and bool(pivots.isfinite().all()) else None


def cholesky_in_place(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"] | None:
    """As `cholesky`, of the transpose of a contiguous matrix and in its memory, whose numbers are lost in any case."""
    # Memory: LAPACK goes by columns; of any other matrix torch makes a copy that does.
    factor = matrix.mT
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    return factor if not bool(info) and bool(factor.diagonal().isfinite().all()) else None


@full_precision()
def invert_triangle(factor: Float[Tensor, "n n"]) -> None:
    """Invert a lower triangular matrix in place, by halves: two thirds of the work of solving for the identity."""
    size = len(factor)
    if size <= STRIPE:
        identity = torch.eye(size, dtype=factor.dtype, device=factor.device)
        factor.copy_(torch.linalg.solve_triangular(factor, identity, upper=False))
        return
    half = size // 2
    first, corner, last = factor[:half, :half], factor[half:, :half], factor[half:, half:]
    invert_triangle(first)
    invert_triangle(last)
    torch.mm(last, corner @ first, out=corner).neg_()


def turn_around(matrix: Float[Tensor, "rows columns"]) -> None:
    """Reverse both axes of a contiguous matrix, in place."""
    numbers = matrix.view(-1)
    total = len(numbers)
    for start in range(0, total // 2, _TURNED):
        stop = min(start + _TURNED, total // 2)
        front, back = numbers[start:stop], numbers[total - stop : total - start]
        kept = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(kept)


@full_precision()
def inverse_factor(name: str, gram: Float[Tensor, "in in"], damping: float) -> tuple[Float[Tensor, "in in"], float]:
    """The upper triangular U with ``Uᵀ U = (G + damping mean(diag G) I)⁻¹``, and the damping that it took.

    Inputs that are always zero count as if they had the mean norm of the others. Raises `NumericalError`, see `climb`.

    Exact: with both axes reversed a lower Cholesky factor becomes an upper one R with ``R Rᵀ = G``, and ``U = R⁻¹``.
    One factorisation less than by way of the inverse of G, and no inverse whose own rounding must be factored.
    Memory: beside G one matrix and a quarter (two if more damping is tried): all is done in the one that is returned.
    """
    reverse = gram.flip(0, 1).contiguous()
    diagonal = reverse.diagonal()
    live = diagonal > 0
    # Paper: the published code counts a dead input as 1, whatever the unit of the others is.
    diagonal[~live] = diagonal[live].mean() if bool(live.any()) else 1.0

    def attempt(matrix: Tensor, _damping: float) -> Tensor | None:
        factor = cholesky_in_place(matrix)
        if factor is None:
            matrix.copy_(gram.flip(0, 1))
        return factor

    factor, used = climb(name, reverse, damping, attempt)
    invert_triangle(factor)
    turn_around(reverse)
    return factor, used


# Of the inputs whose factor was last asked for: what it was made of, the factor and its damping.
_LAST: WeakKeyDictionary[Gram, tuple[object, tuple[Float[Tensor, "in in"], float]]] = WeakKeyDictionary()


def factor_of_inputs(problem: Problem, damping: float) -> tuple[Float[Tensor, "in in"], float]:
    """The `inverse_factor` of a problem's inputs, made once for all matrices in a row that read the same ones."""
    statistic, gram = problem.statistic(Gram), working_gram(problem)
    # Exact: a new total may lie where the last one did; a reference to the one tensor is no other's.
    made_of = damping, gram.dtype, gram.device, ref(statistic.total), statistic.total._version
    found, factor = _LAST.get(statistic, (None, None))
    if factor is None or found != made_of:
        _LAST.clear()  # Memory: the one before is gone before this one is made
        del factor
        factor = inverse_factor(problem.name, gram, damping)
        _LAST[statistic] = made_of, factor
    return factor


@dataclass(frozen=True)
class Normalised:
    """A problem in coordinates in which every input has norm one: min over W' of ``||(W' - W) X||²``.

    With ``n_j = sqrt(G_jj)``: `gram` is ``G_jk / (n_j n_k)``, `weight` is ``W_ij n_j`` and `right` is ``B_ij / n_j``,
    see `right_hand_side`. Damping adds ``damping ||W' - W||²`` in these coordinates, by as much in every column however
    large its input is: the minimum without a mask solves ``W' (gram + damping I) = right + damping weight``. An input
    that is always zero has weight 0 here, so that it goes first.
    """

    problem: Problem
    gram: Float[Tensor, "in in"]
    weight: Float[Tensor, "out in"]
    right: Float[Tensor, "out in"]
    norm: Float[Tensor, " in"]

    def damped(self, damping: float) -> tuple[Float[Tensor, "in in"], Float[Tensor, "out in"], float]:
        """``gram + damping I``, ``right + damping weight``, both in the memory of these, and the damping as used.

        Up the ladder of `dampings` until the matrix has a Cholesky factor. Raises `NumericalError` past its end.
        """
        _, used = climb(self.problem.name, self.gram, damping, cholesky)
        return self.gram, self.right.add_(self.weight, alpha=used), used

    def into(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """A weight of the problem's own coordinates in these."""
        return weight.to(self.norm) * self.norm

    def back(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """A weight of these coordinates in the problem's own; dense weights on inputs that are always zero."""
        live = self.norm > 0
        return torch.where(live, weight / torch.where(live, self.norm, 1), self.problem.weight.to(weight))


def normalise(problem: Problem) -> Normalised:
    """The problem with every input scaled to norm one, in memory of its own.

    Source: Boža, Fast and Effective Weight Update for Pruned LLMs (arXiv 2401.02938), section 3.3.
    """
    gram, weight = working_gram(problem), working_weight(problem)
    norm = gram.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(norm > 0, norm.reciprocal(), 0)
    right = right_hand_side(problem, gram, weight).mul_(inverse)
    gram = (gram * inverse).mul_(inverse.unsqueeze(1)).fill_diagonal_(1.0)
    return Normalised(problem, gram, weight * norm, right, norm)


def shifted_inverse(name: str, gram: Float[Tensor, "in in"], shift: float) -> Float[Tensor, "in in"]:
    """``(gram + shift I)⁻¹`` of a matrix that has a Cholesky factor. Raises `NumericalError` where it has none."""
    matrix = gram.mT.clone(memory_format=torch.contiguous_format)
    matrix.diagonal().add_(shift)
    factor = cholesky_in_place(matrix)
    if factor is None:
        raise NumericalError(
            f"{name}: the damped Gram matrix of its inputs has no Cholesky factor with {shift:g} on its diagonal. "
            "Compute in float64 with --dtype float64, or use more damping."
        )
    return torch.cholesky_inverse(factor, out=factor)


@full_precision()
def conjugate_gradients(
    gram: Float[Tensor, "in in"],
    right: Float[Tensor, "out in"],
    start: Float[Tensor, "out in"],
    mask: Bool[Tensor, "out in"],
    *,
    iterations: int,
    tolerance: float = 0.0,
) -> tuple[Float[Tensor, "out in"], int]:
    """Weights that are zero outside the mask and nearly solve ``W' gram = right`` inside it, and the steps taken.

    Every row takes its own conjugate gradient steps on its kept coordinates, all rows in one product per step. A row
    rests when its residual is below ten roundings of its right-hand side. From any start each step lowers each row's
    ``w gram wᵀ - 2 w rightᵀ``; a step that lowers the sum over rows by less than `tolerance` of what all steps have is
    the last. No preconditioner: the diagonal of a normalised Gram matrix is constant.

    Source: ALPS (arXiv 2406.07831), section 3.2.
    """
    kept = mask.to(right)
    solution = start * kept
    residual = (right - solution @ gram).mul_(kept)
    direction = residual.clone()
    square = residual.square().sum(dim=1, keepdim=True)
    enough = (right * kept).square().sum(dim=1, keepdim=True).mul_((10 * torch.finfo(right.dtype).eps) ** 2)
    lowered = torch.zeros((), dtype=torch.float64, device=right.device)
    last = torch.full_like(lowered, torch.inf)
    for step in range(iterations):
        active = square > enough
        if not bool(active.any() & (last >= tolerance * lowered)):
            return solution, step
        product = (direction @ gram).mul_(kept)
        curvature = (direction * product).sum(dim=1, keepdim=True)
        active &= curvature > 0
        length = torch.where(active, square / curvature, 0)
        last = (square * length).sum(dtype=torch.float64)
        lowered += last
        solution.addcmul_(direction, length)
        residual.addcmul_(product, length, value=-1)
        previous, square = square, residual.square().sum(dim=1, keepdim=True)
        direction.mul_(torch.where(active, square / previous, 0)).add_(residual)
    return solution, iterations


def solve_on_support(
    gram: Float[Tensor, "in in"], right: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"]
) -> Float[Tensor, "out in"] | None:
    """Weights that are zero outside the mask and solve ``W' gram = right`` inside it, each row by its own Cholesky.

    Costs ``kept³ / 3`` multiply-adds per row. None where a row's system is not positive definite.
    """
    width = mask.shape[1]
    result = torch.zeros_like(right)
    counts = mask.sum(dim=1)
    # Memory: rows of like counts go together, padded to the largest, as many at once as fit in CHUNK_BYTES.
    for rows_now in _alike(counts, gram.element_size()):
        kept = int(counts[rows_now].max())
        if kept == 0:
            continue
        columns = (~mask[rows_now]).byte().argsort(dim=1, stable=True)[:, :kept]
        there = torch.arange(kept, device=mask.device) < counts[rows_now].unsqueeze(1)
        systems = gram[columns.unsqueeze(2), columns.unsqueeze(1)]
        systems.mul_(there.unsqueeze(2)).mul_(there.unsqueeze(1))
        systems.diagonal(dim1=1, dim2=2).add_((~there).to(systems))
        factor = cholesky(systems)
        if factor is None:
            return None
        sides = right[rows_now].gather(1, columns).mul_(there)
        solved = torch.cholesky_solve(sides.unsqueeze(2), factor).squeeze(2).mul_(there)
        result[rows_now] = result.new_zeros(len(rows_now), width).scatter_(1, columns, solved)
    return result


def _alike(counts: Int[Tensor, " rows"], itemsize: int) -> Iterator[Int[Tensor, " some"]]:
    """The rows in groups of similar counts, each group's systems (twice: with their factors) within CHUNK_BYTES."""
    order = counts.argsort(descending=True, stable=True)
    start = 0
    while start < len(order):
        bytes_per_row = 2 * itemsize * max(int(counts[order[start]]), 1) ** 2
        stop = start + max(1, CHUNK_BYTES // bytes_per_row)
        yield order[start:stop]
        start = stop
