"""How much row and column structure a mask has, compared with chance.

A mask is bool, True = kept. Notation: R rows, C columns, ``z_r`` the fraction of zeros in row r, ``Z_c`` the number of
zeros in column c.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor


@dataclass(frozen=True)
class Structure:
    """The structure of a mask along one of its sides: how the zeros of its lines (columns, or rows) vary.

    `lines` is how many there are and `length` how many weights each has. `observed` is the variance of the number of
    zeros over the lines, and `expected` the variance by chance. `degrees` are the degrees of freedom of
    `observed`. `empty` counts lines that are zero from end to end.
    """

    lines: int
    length: int
    observed: float
    expected: float
    degrees: int
    empty: int

    @property
    def ratio(self) -> float | None:
        """`observed` over `expected`: about 1 for a mask without structure; None where chance leaves no choice."""
        return self.observed / self.expected if self.expected > 0 else None

    @property
    def ratio_error(self) -> float:
        """The standard deviation of `ratio` among random masks, ``sqrt(2 / degrees)``; it shrinks with the lines."""
        return math.sqrt(2 / self.degrees) if self.degrees > 0 else math.inf

    @property
    def excess(self) -> float:
        """The standard deviation of the lines' sparsity beyond chance, between 0 and 0.5, whatever the matrix's size.

        ``sqrt(max(0, observed - expected)) / length``: what is left of the spread when the part that chance explains
        is taken away. 0.1 means that lines differ in sparsity by about ten percentage points.
        """
        return math.sqrt(max(0.0, self.observed - self.expected)) / self.length


def columns(mask: Bool[Tensor, "out in"], group: int | None = None) -> Structure:
    """The structure of a mask's columns, given how many zeros each of its rows has.

    Chance: the zeros of every row lie anywhere in it, independently of the other rows. Entry (r, c) is then zero with
    probability ``z_r``, entries of one column are independent, and

        expected = sum over r of z_r (1 - z_r)

    exactly. `observed` is the mean over columns of ``(Z_c - mean Z)^2``; the mean of ``Z`` is the same for all such
    masks, so that nothing is lost by estimating it.

    With `group` (the M of N:M) the zeros stay within their group of that many consecutive columns: ``z`` and the mean
    are those of the group, and each group takes one degree of freedom. For an exact N:M this is ``R n/m (1 - n/m)``,
    the hypergeometric variance of a draw of ``m - n`` places among m. Raises `ValueError` when groups do not divide
    the columns.
    """
    rows, width = mask.shape
    group = width if group is None else group
    if width % group:
        raise ValueError(f"groups of {group} do not divide {width} columns")
    zeros = rows - mask.sum(dim=0)
    shares = 1 - mask.view(rows, width // group, group).sum(dim=2).double() / group
    means = zeros.view(-1, group).double().mean(dim=1, keepdim=True)
    return Structure(
        lines=width,
        length=rows,
        observed=float((zeros.view(-1, group) - means).square().mean()),
        expected=float((shares * (1 - shares)).sum()) * group / width,
        degrees=width - width // group,
        empty=int((zeros == rows).sum()),
    )


def rows(mask: Bool[Tensor, "out in"]) -> Structure:
    """The structure of a mask's rows, given how many zeros each of its columns has: `columns` of the transposed mask.

    Where a pattern fixes the zeros of each row (per row, N:M) `observed` is 0: rows are more even than chance.
    """
    return columns(mask.t())


def pooled(parts: Sequence[Structure]) -> Structure:
    """Several matrices as one: their lines together, weighted by how many there are.

    Variances are averaged as variances of sparsity (over ``length`` squared) before chance is taken away, so that
    the excess of many small matrices is not biased upwards. `length` becomes 1 and `observed` and `expected` are
    variances of sparsity.
    """
    lines = sum(part.lines for part in parts)

    def mean(values: Sequence[float]) -> float:
        weighted = zip(parts, values, strict=True)
        return math.fsum(part.lines * value / part.length**2 for part, value in weighted) / max(lines, 1)

    return Structure(
        lines=lines,
        length=1,
        observed=mean([part.observed for part in parts]),
        expected=mean([part.expected for part in parts]),
        degrees=sum(part.degrees for part in parts),
        empty=sum(part.empty for part in parts),
    )
