"""Where zeros may lie: a pattern turns scores into a mask, with exact counts and stable ties."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.core.choices import Group
from secateur.errors import NumericalError, PatternError


@runtime_checkable
class Pattern(Protocol):
    """A rule where zeros may lie in one (out, in) matrix."""

    @property
    def sparsity(self) -> float:
        """The fraction of zeros asked for."""
        ...

    def mask(self, score: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        """True where a weight is kept: the highest scores that the pattern admits."""
        ...

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Raise `PatternError` when a matrix of this (out, in) shape cannot hold the pattern."""
        ...

    def violation(self, mask: Bool[Tensor, "out in"]) -> str | None:
        """What is wrong with a mask, in words, or None when it obeys the pattern exactly."""
        ...

    def to_json(self) -> dict[str, Any]:
        """A JSON object from which `pattern_from_json` makes an equal pattern."""
        ...


def removed_count(entries: int, sparsity: float) -> int:
    """The number of entries to remove: floor(entries * sparsity).

    Exact: the sparsity counts as the decimal it was written as (0.29 of 100 is 29), where the floating-point
    product is sometimes one less.
    """
    return math.floor(entries * Fraction(str(sparsity)))


def lowest(score: Float[Tensor, "rows columns"], count: int) -> Bool[Tensor, "rows columns"]:
    """True at the `count` lowest scores of each row; among equal scores the lower column goes first.

    The same entries that a stable ascending sort would put first, found by selection instead of sorting.
    """
    if count <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    threshold, tied = _threshold(score, count)
    removed = score <= threshold
    if bool(tied.any()):
        rows = tied.nonzero().squeeze(1)
        # Exact: of the entries that equal the threshold, the first ones by column fill the count.
        equal = score[rows] == threshold[rows]
        below = removed[rows] & ~equal
        room = count - below.sum(dim=1, keepdim=True)
        removed[rows] = below | (equal & (equal.cumsum(dim=1) <= room))
    return removed


def _threshold(
    score: Float[Tensor, "rows columns"], count: int
) -> tuple[Float[Tensor, "rows 1"], Bool[Tensor, " rows"]]:
    """The `count`-th lowest score of each row, and whether another that is not among the lowest equals it."""
    if score.device.type != "cpu":
        threshold = score.topk(count, dim=1, largest=False, sorted=False).values.amax(dim=1, keepdim=True)
        return threshold, (score <= threshold).sum(dim=1) > count
    # Fast: numpy selects on CPUs in less than half the time that torch takes. It has no bfloat16.
    wide = torch.promote_types(score.dtype, torch.float32)
    ordered = np.partition(score.to(wide).numpy(), count - 1, axis=1)
    last, higher = ordered[:, count - 1 : count].copy(), ordered[:, count:]
    tied = higher.min(axis=1, keepdims=True, initial=np.inf) == last
    return torch.from_numpy(last).to(score.dtype), torch.from_numpy(tied[:, 0])


@dataclass(frozen=True)
class Unstructured:
    """Zeros anywhere: exactly floor(n * sparsity) of every comparison group of n weights.

    `per` is the comparison group: "row" (each output row by itself), "matrix", "search" (one row threshold searched
    for each matrix: the published variant of Wanda), or None for the default of the method.
    """

    sparsity: float
    per: Group | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            hint = f" Did you mean {self.sparsity / 100:g}?" if 2 <= self.sparsity < 100 else ""
            raise PatternError(f"sparsity must be at least 0 and below 1, got {self.sparsity:g}.{hint}")
        if self.per not in (None, "row", "matrix", "search"):
            raise PatternError(f"per must be row, matrix or search, got {self.per!r}.")

    def mask(self, score: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        """True at the kept weights; exact counts for "row" (also for None) and "matrix", close for "search"."""
        if self.per == "search":
            return search_rows(score, self.sparsity)
        groups = score.reshape(1, -1) if self.per == "matrix" else score
        return ~lowest(groups, removed_count(groups.shape[1], self.sparsity)).view(score.shape)

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Every matrix can hold an unstructured pattern."""

    def violation(self, mask: Bool[Tensor, "out in"]) -> str | None:
        """A sentence when a group holds fewer zeros than asked for, else None.

        More zeros are no violation: a weight that was kept may have been zero in the source. With `per` left open
        the matrix must hold what all its rows together would lose.
        """
        if self.per == "search":
            return None
        if self.per is None:
            total, least = int((~mask).sum()), mask.shape[0] * removed_count(mask.shape[1], self.sparsity)
            return f"the matrix has {total} zeros, expected at least {least}" if total < least else None
        groups = mask.reshape(1, -1) if self.per == "matrix" else mask
        expected = removed_count(groups.shape[1], self.sparsity)
        zeros = groups.shape[1] - groups.sum(dim=1)
        if int(zeros.min()) < expected:
            row = int(zeros.argmin())
            where = "the matrix" if self.per == "matrix" else f"row {row}"
            return f"{where} has {int(zeros[row])} zeros, expected at least {expected}"
        return None

    def to_json(self) -> dict[str, Any]:
        """`{"sparsity": 0.5, "per": "row"}`."""
        return {"sparsity": self.sparsity, "per": self.per}

    def __str__(self) -> str:
        group = f" per {self.per}" if self.per else ""
        return f"{self.sparsity:.6g} unstructured{group}"


@dataclass(frozen=True)
class NM:
    """N:M sparsity: at most `n` non-zeros in each `m` consecutive inputs of a row.

    Paper: the published code of Wanda and SparseGPT counts `prune_n` *zeros*; the two agree for 2:4 and 4:8 only.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n <= self.m:
            raise PatternError(
                f"N:M keeps N of every M weights, so 1 <= N <= M; got {self.n}:{self.m}."
                + (f" Did you mean {self.m}:{self.n}?" if self.n > self.m > 0 else "")
            )

    @property
    def sparsity(self) -> float:
        """1 - n / m."""
        return 1 - self.n / self.m

    def mask(self, score: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        """True at the n highest scores of every m; of equal scores the lower column is removed first.

        Raises `PatternError` when the width does not divide by M: groups never cross from one row into the next.
        """
        if score.shape[1] % self.m:
            raise PatternError(f"{self} needs a width divisible by {self.m}, got {score.shape[1]}.")
        if self.m > 8:
            return ~lowest(score.reshape(-1, self.m), self.m - self.n).view(score.shape)
        # Exact: the rank in a stable ascending sort, by comparing all pairs, without sorting millions of tiny rows.
        positions = score.reshape(-1, self.m).t().contiguous()  # (m, groups): every comparison runs along memory
        rank = torch.zeros_like(positions, dtype=torch.int8)
        for left in range(self.m):
            for right in range(left + 1, self.m):
                left_is_lower = positions[left] <= positions[right]
                rank[right] += left_is_lower
                rank[left] += ~left_is_lower
        return (rank >= self.m - self.n).t().reshape(score.shape)

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Raise `PatternError` when the width does not divide by M."""
        if shape[1] % self.m:
            raise PatternError(
                f"{name}: {self} needs in_features divisible by {self.m}, got {shape[1]}. "
                f'Skip it with --skip "{name}" or choose an unstructured pattern.'
            )

    def violation(self, mask: Bool[Tensor, "out in"]) -> str | None:
        """A sentence that names the first group with more than N non-zeros, or None."""
        if mask.shape[1] % self.m:
            return f"{mask.shape[1]} columns do not divide into groups of {self.m}"
        kept = mask.view(mask.shape[0], -1, self.m).sum(dim=2)
        if int(kept.max()) > self.n:
            row, group = (kept > self.n).nonzero()[0].tolist()
            start = group * self.m
            return (
                f"row {row}, columns {start} to {start + self.m - 1}: "
                f"{int(kept[row, group])} non-zeros, expected at most {self.n}"
            )
        return None

    def to_json(self) -> dict[str, Any]:
        """`{"n": 2, "m": 4}`."""
        return {"n": self.n, "m": self.m}

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def search_rows(score: Float[Tensor, "out in"], sparsity: float) -> Bool[Tensor, "out in"]:
    """True at the kept weights of Wanda's published variant: a different sparsity for every row.

    With the scores of a row sorted ascending, ``c`` their running sum and ``T`` their total, a row loses every score
    up to the last one with ``c <= alpha T``. One alpha for the whole matrix is bisected, from 0.4 in [0, 0.8], until
    the sparsity of the matrix is within 0.001 of the one asked for or the bracket is narrower than 0.001.

    A sparsity that alpha = 0.8 does not reach is not reached. Raises `NumericalError` when a row's total overflows.

    Paper: the published code fails when no score of a row lies under the threshold; here such a row loses nothing.
    Source: Wanda, published code, `--use_variant`.
    """
    if sparsity == 0:
        return torch.ones_like(score, dtype=torch.bool)
    ascending = score.sort(dim=1, stable=True).values
    running = ascending.cumsum(dim=1)
    total = score.sum(dim=1)
    if not bool(total.isfinite().all()):
        raise NumericalError(
            f"the scores of row {int(total.isfinite().int().argmin())} add up to more than {score.dtype} holds; "
            "use fixed counts per row or per matrix."
        )
    low, high = 0.0, 0.8
    while True:
        alpha = (low + high) / 2
        under = (running <= (total * alpha).unsqueeze(1)).sum(dim=1, keepdim=True)
        removed = (score <= ascending.gather(1, (under - 1).clamp(min=0))) & (under > 0)
        achieved = float(removed.sum()) / removed.numel()
        if abs(achieved - sparsity) <= 0.001 or high - low < 0.001:
            return ~removed
        low, high = (low, alpha) if achieved > sparsity else (alpha, high)


def parse_pattern(text: str) -> NM:
    """The pattern that a string such as "2:4" names (keep 2 of every 4). Raises `PatternError`."""
    parts = text.split(":")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise PatternError(
            f'pattern must be N:M, such as 2:4 (keep 2 of every 4), got "{text}". '
            "For unstructured pruning use --sparsity 0.5."
        )
    return NM(int(parts[0]), int(parts[1]))


def pattern_from_json(value: Mapping[str, Any]) -> Pattern:
    """The pattern that `to_json` wrote. Raises `PatternError` for anything else."""
    keys = set(value) if isinstance(value, Mapping) else None
    if keys == {"n", "m"} and type(value["n"]) is type(value["m"]) is int:
        return NM(value["n"], value["m"])
    if keys == {"sparsity", "per"} and type(value["sparsity"]) in (int, float):
        return Unstructured(value["sparsity"], value["per"])
    raise PatternError(f'a pattern is {{"n": 2, "m": 4}} or {{"sparsity": 0.5, "per": "row"}}, got {value!r}.')


def with_group(pattern: Pattern, per: Group) -> Pattern:
    """The pattern, compared per `per` where it is unstructured and leaves that open."""
    return replace(pattern, per=per) if isinstance(pattern, Unstructured) and pattern.per is None else pattern


def gradual_mask(pattern: Pattern, score: Float[Tensor, "out in"], sparsity: float) -> Bool[Tensor, "out in"]:
    """The mask of a pattern that is reached step by step, at a `sparsity` below the final one: True = kept.

    An unstructured pattern has fewer zeros. Any other keeps what it would keep in the end, and of the rest the highest
    scores of the matrix, so that every zero is one that the pattern allows.

    Source: Boža (arXiv 2401.02938), section 3.4, and its published code for N:M.
    """
    if sparsity >= pattern.sparsity:
        return pattern.mask(score)
    if isinstance(pattern, Unstructured):
        return replace(pattern, sparsity=sparsity).mask(score)
    last = pattern.mask(score)
    rest = score.masked_fill(last, torch.inf).view(1, -1)
    return ~lowest(rest, min(removed_count(score.numel(), sparsity), int((~last).sum()))).view(score.shape)
