"""Sums of float tensors that are the same to the last bit in whatever order they are made, and by how many processes.

What is added is rounded to a grid that depends on it alone: `PRECISION` bits below a bound of its absolute values, for
float64 `DOUBLE_PRECISION`. From then on everything is arithmetic of integers, which is exact. The sum is rounded once
more when it is asked for.

Exact: two sums of the same values are equal because each is the exact sum of the same rounded values. They are held as
one integer on the finest of all grids where 63 bits are enough, and as several of 32 bits each where they are not.
Which of both it is follows from the grids of all values together, not from their order.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

PRECISION = 46  # bits of the largest values that are added at once
DOUBLE_PRECISION = 53  # and where they are float64
_CAPACITY = 62 - PRECISION  # bits that are left for sums of many, and of larger ones
_SPARE = 6  # bits by which the grid of a fresh sum is finer than that of its first values
_FINEST = 120  # grid, whose power of two is a float32 number
_LARGEST = 2.0**128  # bound of values, above all float32 numbers
_DIGIT = 32  # bits of each integer, where one is not enough
_CACHED = 1 << 15  # numbers that are converted at once

Grids = Counter[int]
"""What was added on each grid, in values of `PRECISION` bits; a grid is n where numbers are multiples of 2 ** -n."""


@runtime_checkable
class Joinable(Protocol):
    """A sum of which every process has a part.

    Joining takes two steps: each process tells something small, which all receive in the order of the processes; the
    tensors that `shared` then returns are added up across the processes, in place.
    """

    def told(self) -> Any:
        """Something small that can be pickled."""
        ...

    def shared(self, told: Sequence[Any]) -> list[Tensor]:
        """Be the sum of all parts, but for these integers: as many, and of the same shapes, in each process."""
        ...


@dataclass
class _Integers:
    """A sum on one grid: `parts` times ``2 ** -grid``. `added` says of which values."""

    grid: int
    parts: list[Tensor]
    added: Grids = field(default_factory=Counter)

    def takes(self, added: Grids) -> bool:
        """Whether values of these grids fit in as well; the sum is then moved to a grid on which they do."""
        both = self.added + added
        finest = max(both)
        if _bits(both, finest) > _CAPACITY:
            return False
        if not self.added:
            self.grid = finest + _SPARE
        if self.grid < finest or _bits(both, self.grid) > _CAPACITY:
            self.move(finest)
        self.added = both
        return True

    def move(self, grid: int) -> None:
        """Hold the sum on another grid, on which it is a whole number and fits."""
        if self.added:
            for part in self.parts:
                _shift(part, grid - self.grid)
        self.grid = grid

    def add(self, other: "_Integers") -> None:
        """Add a sum whose values this one takes."""
        for into, part in zip(self.parts, other.parts, strict=True):
            into.add_(_shift(part.to(into.device, copy=True), self.grid - other.grid))


class ExactSum:
    """A sum of float tensors in several parts of fixed shapes; all parts of what is added have one bound."""

    def __init__(self, empty: Callable[[], list[Tensor]]) -> None:
        """`empty` makes the parts, int64 zeros. It is called again only for values of very different size."""
        self.finite = True
        self._empty = empty
        self._sums = [_Integers(0, empty())]
        self._now, self._factor = self._sums[0], 1
        self._final = False

    @property
    def added(self) -> Grids:
        """What was added on each grid."""
        return _all(own.added for own in self._sums)

    def begin(self, bound: float, dtype: torch.dtype = torch.float32) -> float | None:
        """The factor by which values of at most `bound`, of this dtype, are multiplied before they are added to parts.

        None where there is nothing to add: they are zero, or one of them is not finite, which is remembered.
        """
        assert not self._final
        precision = DOUBLE_PRECISION if dtype == torch.float64 else PRECISION
        if not bound < _LARGEST:
            self.finite = False
        if bound == 0 or not self.finite:
            return None
        grid = min(_FINEST, precision - math.frexp(bound)[1])
        self._now = self._room(Counter({grid: 1 << (precision - PRECISION)}))
        self._factor = 1 << (self._now.grid - grid)
        return 2.0**grid

    def add(self, part: int, values: Tensor) -> None:
        """Add values times that factor to a part; they are overwritten."""
        into = self._now.parts[part]
        # Fast: a few rows at a time stay in the caches of a CPU.
        rows = max(1, _CACHED * len(values) // values.numel()) if values.device.type == "cpu" else len(values)
        for some, own in zip(torch.split(values, rows), torch.split(into, rows), strict=True):
            # Exact: a conversion alone cuts off, and many sums of squares would come out too small.
            own.add_(some.round_().to(into.device).to(torch.int64), alpha=self._factor)

    def merge(self, other: "ExactSum") -> None:
        """Add what another sum in such parts holds, which stays as it is."""
        assert not self._final
        assert not other._final
        self.finite = self.finite and other.finite
        for theirs in other._sums:
            if theirs.added:
                self._room(theirs.added).add(theirs)

    def _room(self, added: Grids) -> _Integers:
        """Integers that take values of these grids."""
        found = next((own for own in self._sums if own.takes(added)), None)
        if found is None:
            found = _Integers(0, self._empty())
            found.takes(added)
            self._sums.append(found)
        return found

    def told(self) -> tuple[dict[int, int], bool]:
        """Grids of what was added, and whether it was finite."""
        return dict(self.added), self.finite

    def shared(self, told: Sequence[tuple[dict[int, int], bool]]) -> list[Tensor]:
        """The integers, as all processes hold them."""
        self.finite = all(finite for _, finite in told)
        self._finish(_all(Counter(added) for added, _ in told))
        return [part for own in self._sums for part in own.parts] if self.finite else []

    def take(self, part: int, dtype: torch.dtype) -> Tensor:
        """The sum in a part, rounded, or NaN where something was not finite. The part is gone then."""
        self._finish(self.added)
        digits = [own.parts[part] for own in self._sums]
        for own in self._sums:
            own.parts[part] = torch.empty(0)  # Memory: the sums and what is made of them need no more
        if not self.finite:
            return torch.full(digits[0].shape, math.nan, dtype=dtype, device=digits[0].device)
        *low, high = _carried(digits)
        total = high.double()
        for digit in reversed(low):
            total.mul_(2.0**_DIGIT).add_(digit)
        return total.mul_(2.0 ** -self._sums[0].grid).to(dtype)

    def _finish(self, added: Grids) -> None:
        """Hold the sum as it is held wherever values of these grids, and perhaps further ones, were added."""
        if self._final or not self.finite:
            return
        self._final = True
        if not added:
            return
        finest = max(added)
        bits = _bits(added, finest)
        if bits <= _CAPACITY:
            # Exact: what fits in all fits in each part of it.
            first, *rest = self._sums
            first.move(finest)
            for own in rest:
                first.add(own)
            self._sums = [first]
            return
        places = range((PRECISION + bits) // _DIGIT + 1)
        digits = [_Integers(finest - _DIGIT * place, self._empty()) for place in places]
        for own in self._sums:
            own.move(min(own.grid, finest))
            place, shift = divmod(finest - own.grid, _DIGIT)
            for number, part in enumerate(own.parts):
                _spread(part, shift, [digit.parts[number] for digit in digits[place:]])
        self._sums = digits


def _all(grids: Iterable[Grids]) -> Grids:
    return sum(grids, Counter())


def _bits(added: Grids, grid: int) -> int:
    """Bits that the sum of values of these grids may have on another one, which is as fine, beyond `PRECISION`."""
    return (sum(count << (grid - own) for own, count in added.items()) - 1).bit_length()


def _shift(part: Tensor, bits: int) -> Tensor:
    """``part * 2 ** bits``, in place."""
    return part.bitwise_left_shift_(bits) if bits >= 0 else part.bitwise_right_shift_(-bits)


def _spread(part: Tensor, shift: int, digits: Sequence[Tensor]) -> None:
    """Add ``part * 2 ** shift`` to digits of 32 bits, of which the last one takes what is left."""
    mask = (1 << _DIGIT) - 1
    if len(digits) == 1:
        digits[0].add_(part << shift)
        return
    low = (part & mask) << shift
    rest = ((part >> _DIGIT) << shift).add_(low >> _DIGIT)
    digits[0].add_(low & mask)
    for digit in digits[1:-1]:
        digit.add_(rest & mask)
        rest = rest >> _DIGIT
    digits[-1].add_(rest)


def _carried(digits: Sequence[Tensor]) -> list[Tensor]:
    """The same number in digits from 0 to 2 ** 32 - 1, but for the last one."""
    made, carry = [], None
    for digit in digits[:-1]:
        digit = digit if carry is None else digit + carry
        made.append(digit & ((1 << _DIGIT) - 1))
        carry = digit >> _DIGIT
    return [*made, digits[-1] if carry is None else digits[-1] + carry]
