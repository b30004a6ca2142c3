"""The loop over columns of the optimal brain surgeon: remove from left to right, and make up for it to the right."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.core.gram import Gram, full_precision
from secateur.core.linalg import factor_of_inputs, finished, outputs_target, working_gram
from secateur.core.patterns import NM, Pattern, Unstructured, lowest, removed_count, with_group
from secateur.core.problem import Method, Problem, Solution, at_least
from secateur.errors import NumericalError

BLOCK = 128  # columns, as published
LAZY = 512  # columns between two updates of all that are to the right of them
LEAF = 16  # columns that are done one by one; wider stretches go by halves

Choose = Callable[[int, Float[Tensor, "out some"]], Bool[Tensor, "out some"]]
"""(first column, the weights of some columns as they are by then) -> mask, True = kept."""

Score = Callable[[int, Float[Tensor, "out some"]], Float[Tensor, "out some"]]
"""(first column, the weights of some columns as they are by then) -> scores; the lowest go."""


def column_method(name: str, damping: float, score: Callable[[Problem, Float[Tensor, " in"]], Score]) -> Method:
    """The method that chooses its mask by a score as it goes over the columns, and updates the later ones.

    `score` is given the problem and the pivots ``U_jj``; see `choose_as_it_goes` for what is compared, and `update`.
    """
    at_least(0, name, damping=damping)

    def solve(problem: Problem) -> Solution:
        def choice(pivots: Float[Tensor, " in"]) -> tuple[Choose, int]:
            pattern = with_group(problem.pattern, "matrix")
            return choose_as_it_goes(problem.name, pattern, len(problem.weight), score(problem, pivots))

        return update(problem, damping, choice, note="damping")

    return Method(name, solve, frozenset({Gram}), per="matrix", products=6)


def update(
    problem: Problem, damping: float, choice: Callable[[Float[Tensor, " in"]], tuple[Choose, int]], *, note: str
) -> Solution:
    """The solution of `prune_columns`, with the damping as used in its `note`.

    `choice` is given the pivots ``U_jj``, and says how to choose and for how many columns at a time. Damping is
    relative to the mean of the diagonal.
    """
    gram = working_gram(problem)
    factor, used = factor_of_inputs(problem, damping)
    choose, group = choice(factor.diagonal())
    target = outputs_target(problem, gram, factor)
    weight, mask = prune_columns(target, factor, choose, live=gram.diagonal() > 0, group=group)
    return finished(problem, weight, mask, **{note: used})


@full_precision()
def prune_columns(
    weight: Float[Tensor, "out in"],
    factor: Float[Tensor, "in in"],
    choose: Choose,
    *,
    live: Bool[Tensor, " in"],
    group: int = BLOCK,
) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
    """The pruned weights and their mask: one pass over the columns, each removal made up for in all later columns.

    With ``Uᵀ U = G⁻¹`` (`factor`, upper triangular), removing ``w_ij`` causes the error ``e = w_ij / U_jj`` and moves
    the later weights of row i by ``- e U_j,j+1:``. `choose` is asked for the mask of each `group` columns when all
    columns before them are done. Columns that are not `live`, whose inputs are always zero, are zero from the start.

    Exact: the same operations as column by column, in another order. A stretch of columns is done by halves: the left
    one, its effect on the right one as one matrix product, the right one.

    Source: SparseGPT (arXiv 2301.00774), sections 3.2 to 3.4; published code, `fasterprune`.
    """
    # Memory: transposed, so that each column lies in one piece. A matrix of one row counts as both, so always a copy.
    columns = weight.t().clone(memory_format=torch.contiguous_format)
    columns.masked_fill_(~live.unsqueeze(1), 0)
    kept = torch.empty_like(columns, dtype=torch.bool)
    width = len(columns)
    block = max(LAZY // group, 1) * group
    # Of a column whose mask is known, but which is not done yet: 1 / U_jj where it goes, else 0.
    errors = columns.new_empty(min(block, width), columns.shape[1])
    pivots = factor.diagonal()

    def stretch(first: int, last: int, offset: int) -> None:
        """Do the columns from `first` to before `last`, whose errors go to row ``column - offset``."""
        if last - first > LEAF:
            # Exact: no half but the last ends inside a group, whose mask is chosen when its first column is reached.
            groups = -(-(last - first) // group)
            middle = first + (groups // 2 * group if groups > 1 else (last - first) // 2)
            stretch(first, middle, offset)
            columns[middle:last].addmm_(
                factor[first:middle, middle:last].t(), errors[first - offset : middle - offset], alpha=-1
            )
            stretch(middle, last, offset)
            return
        for column in range(first, last):
            if column % group == 0:
                stop = min(column + group, width)
                kept[column:stop] = choose(column, columns[column:stop].t()).t()
                share = errors[column - offset : stop - offset]
                torch.div(~kept[column:stop], pivots[column:stop].unsqueeze(1), out=share)
            error = errors[column - offset].mul_(columns[column])
            columns[column + 1 : last].addr_(factor[column, column + 1 : last], error, alpha=-1)
        columns[first:last].mul_(kept[first:last])

    for start in range(0, width, block):
        stop = min(start + block, width)
        stretch(start, stop, start)
        columns[stop:].addmm_(factor[start:stop, stop:].t(), errors[: stop - start], alpha=-1)
    return columns.t(), kept.t()


def follow(mask: Bool[Tensor, "out in"]) -> Choose:
    """The choice of a mask that is known beforehand."""
    return lambda first, some: mask[:, first : first + some.shape[1]]


def choose_as_it_goes(
    name: str,
    pattern: Pattern,
    rows: int,
    score: Score,
) -> tuple[Choose, int]:
    """The choice by a score of the weights as they are by then, and how many columns it takes at a time.

    N:M takes M columns. Everything else takes 128: an unstructured pattern per "matrix" pools all rows of those
    columns, as published, per "row" compares each row's weights in them. Counts are exact: up to any column, the
    floor of the sparsity's share has been removed. Other patterns are asked for the mask of those columns alone.

    The choice raises `NumericalError` for scores that are not finite.
    """
    group = pattern.m if isinstance(pattern, NM) else BLOCK

    def choose(first: int, some: Float[Tensor, "out some"]) -> Bool[Tensor, "out some"]:
        scores = score(first, some)
        if not bool(scores.isfinite().all()):
            raise NumericalError(
                f"{name}: {int((~scores.isfinite()).sum())} scores of the {some.shape[1]} columns from {first} on are "
                f"not finite. Compute in float32, use more damping, or leave this matrix out with "
                f'--skip "{name}".'
            )
        if not isinstance(pattern, Unstructured) or pattern.per == "search":
            return pattern.mask(scores)
        entries = rows if pattern.per == "matrix" else 1
        # Paper: the published code removes one more than its share in every 128 columns, and every tie.
        count = removed_count(entries * (first + some.shape[1]), pattern.sparsity)
        count -= removed_count(entries * first, pattern.sparsity)
        groups = scores.reshape(1, -1) if pattern.per == "matrix" else scores
        return ~lowest(groups, count).view(scores.shape)

    return choose, group
