"""Second moments of a matrix's inputs: un-normalised sums of outer products, which merge like every statistic."""

from collections.abc import Iterator, Sequence
from contextlib import _GeneratorContextManager, contextmanager
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.core.exact import ExactSum
from secateur.core.statistics import Cost, SquaredNorm, Sum, column_squares

NARROW, WIDE = 128, 256  # rows of a sum of products that are multiplied at once, up to 1,024 columns and beyond


@contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Nothing; float32 products inside the block may be TF32 on GPUs, or not; the setting is put back after it."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        # PyTorch refuses to read the old switch where somebody has set the new one.
        settings = torch.backends.cuda.matmul
        precision = settings.fp32_precision
        settings.fp32_precision = "tf32" if tf32 else "ieee"
        try:
            yield
        finally:
            settings.fp32_precision = precision
        return
    wanted = "high" if tf32 else "highest"
    if before == wanted:
        yield
        return
    torch.set_float32_matmul_precision(wanted)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def full_precision() -> _GeneratorContextManager[None]:
    """Nothing; float32 products inside the block keep all 24 bits (no TF32), and the setting is put back after it."""
    return float32_products(tf32=False)


def _panels(rows: int, columns: int) -> list[tuple[int, int]]:
    """Where the rows begin and end that are multiplied at once."""
    size = NARROW if columns <= 4 * WIDE else WIDE
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


class Products:
    """The sum over tokens of ``left rightᵀ``, (rows, columns), to the same bits in whatever order tokens come.

    Float32, or float64 from the first float64 tokens on; products keep all 24 bits. With `upper`, where left and right
    are the same, only the upper triangle is multiplied.
    """

    def __init__(self, rows: int, columns: int, device: torch.device | str = "cpu", *, upper: bool = False) -> None:
        self.shape = rows, columns
        self._panels = [(start, stop, start if upper else 0) for start, stop in _panels(rows, columns)]
        self._device, self._upper = torch.device(device), upper
        self._dtype = torch.float32
        self._sum = ExactSum(self._empty)

    def _empty(self) -> list[Tensor]:
        columns = self.shape[1]
        return [
            torch.zeros(stop - start, columns - first, dtype=torch.int64, device=self._device)
            for start, stop, first in self._panels
        ]

    @property
    def finite(self) -> bool:
        """Whether no NaN or infinity got in."""
        return self._sum.finite

    def add(self, left: Float[Tensor, "tokens rows"], right: Float[Tensor, "tokens columns"]) -> None:
        """Add tokens, of any float dtype and device."""
        wide = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
        self._dtype = torch.promote_types(self._dtype, wide)
        left, right = left.to(wide), right.to(wide)
        longest = _longest(left)
        # Exact: no entry of the product is larger (Cauchy and Schwarz).
        bound = longest * (longest if self._upper else _longest(right))
        factor = self._sum.begin(bound, wide)
        if factor is None:
            return
        # Memory: one buffer for all panels.
        largest = max((stop - start) * (right.shape[1] - first) for start, stop, first in self._panels)
        buffer = torch.empty(largest, dtype=wide, device=left.device)
        with full_precision():
            for number, (start, stop, first) in enumerate(self._panels):
                rows, columns = left[:, start:stop].t(), right[:, first:]
                panel = buffer[: (stop - start) * columns.shape[1]].view(stop - start, -1)
                self._sum.add(number, torch.addmm(panel, rows, columns, beta=0, alpha=factor, out=panel))

    def add_total(self, total: Float[Tensor, "rows columns"]) -> None:
        """Add a sum that was taken before."""
        self._dtype = torch.promote_types(self._dtype, total.dtype)
        factor = self._sum.begin(float(total.abs().amax()), total.dtype) if total.numel() else None
        for number, (start, stop, first) in enumerate(self._panels if factor is not None else ()):
            self._sum.add(number, total[start:stop, first:] * (factor or 0))

    def merge(self, other: "Products") -> None:
        """Add what another sum of this shape has."""
        self._dtype = torch.promote_types(self._dtype, other._dtype)
        self._sum.merge(other._sum)

    def take(self) -> Float[Tensor, "rows columns"]:
        """The sum; nothing can be added from then on."""
        total = torch.empty(self.shape, dtype=self._dtype, device=self._device)
        for number, (start, stop, first) in enumerate(self._panels):
            rows = total.narrow(0, start, stop - start)
            rows.narrow(1, first, self.shape[1] - first).copy_(self._sum.take(number, self._dtype))
            if self._upper:
                rest = self.shape[1] - stop
                total.narrow(0, stop, rest).narrow(1, start, stop - start).copy_(rows.narrow(1, stop, rest).t())
        return total

    def told(self) -> Any:
        """As of every `Joinable`."""
        return self._dtype, self._sum.told()

    def shared(self, told: Sequence[Any]) -> list[Tensor]:
        """As of every `Joinable`."""
        for dtype, _ in told:
            self._dtype = torch.promote_types(self._dtype, dtype)
        return self._sum.shared([own for _, own in told])


def _longest(x: Float[Tensor, "tokens columns"]) -> float:
    """The largest Euclidean norm of a column."""
    return float(column_squares(x).amax().sqrt()) if x.numel() else 0.0


class _SecondMoments(Sum):
    """What sums of outer products have in common: a `total` of shape (in, in), made of `Products`.

    Asking for the total rounds it; what is added after that adds to the rounded one.
    """

    _upper = False
    _products: Products | None
    _total: Tensor | None

    @classmethod
    def empty(cls, in_features: int, device: torch.device | str = "cpu") -> Self:
        """The statistic of no tokens: zeros of shape (in_features, in_features), float32."""
        own = cls.__new__(cls)
        own.tokens = own.samples = 0
        own._total, own._products = None, Products(in_features, in_features, device, upper=cls._upper)
        return own

    @property
    def total(self) -> Float[Tensor, "in in"]:
        """The sum."""
        if self._total is None:
            assert self._products is not None
            self._total, self._products = self._products.take(), None
        return self._total

    @total.setter
    def total(self, sums: Float[Tensor, "in in"]) -> None:
        self._total, self._products = sums, None

    def _open(self) -> Products:
        """The products, to be added to."""
        if self._products is None:
            total = self.total
            self._products = Products(len(total), len(total), total.device, upper=self._upper)
            self._products.add_total(total)
        self._total = None
        return self._products

    @property
    def _width(self) -> int:
        return self._products.shape[0] if self._products is not None else len(self.total)

    def merge(self, other: Self) -> None:
        """Add what `other` has seen. Raises `ValueError` for another width."""
        self._check_width(other._width, self._width)
        if other._products is not None:
            self._open().merge(other._products)
        else:
            self._open().add_total(other.total)
        self.tokens += other.tokens
        self.samples += other.samples

    def finish(self) -> None:
        """Round the sum: all tokens are in."""
        _ = self.total

    def told(self) -> Any:
        """As of every `Joinable`."""
        return self.tokens, self._open().told()

    def shared(self, told: Sequence[Any]) -> list[Tensor]:
        """As of every `Joinable`."""
        self.tokens = sum(tokens for tokens, _ in told)
        return self._open().shared([own for _, own in told])

    def is_finite(self) -> bool:
        """Whether every sum is a finite number."""
        return self._products.finite if self._total is None and self._products is not None else super().is_finite()

    def select(self, columns: Int[Tensor, " selected"]) -> Self:
        """The sums for these inputs among each other."""
        columns = columns.to(self.total.device)
        return type(self)(self.total[columns.unsqueeze(1), columns], self.tokens, self.samples)


class Gram(_SecondMoments):
    """Sum over tokens of ``x xᵀ``: ``total_jk = sum_t x_tj x_tk``, of shape (in, in).

    Float32, and float64 from the first float64 tokens on; half-precision tokens are widened batch by batch. The same to
    the last bit in whatever order batches come, and by how many processes. The Hessian of the squared error of one
    output row is ``2 total / samples``.

    Products are taken for the upper triangle alone, and mirrored in the `total`.

    Source: Frantar and Alistarh, SparseGPT (arXiv 2301.00774), section 3. The published code keeps the running mean
    ``2 total / samples``, in float32.
    """

    _upper = True

    def update(self, x: Float[Tensor, "tokens in"], samples: int = 0) -> None:
        """Add the outer products of `x`, any float dtype and device."""
        self._open().add(x, x)
        self.tokens += x.shape[0]
        self.samples += samples

    @classmethod
    def cost(cls, in_features: int) -> Cost:
        """A matrix, of which half is multiplied; rounding it and solving takes up to four more of its size."""
        return Cost(in_features**2, 0.6 * in_features**2, 4 * in_features**2)

    def squared_norm(self) -> SquaredNorm:
        """The diagonal, float64, as the statistic of its own that it is."""
        return SquaredNorm(self.total.diagonal().double().clone(), self.tokens, self.samples)


class CrossGram(_SecondMoments):
    """Sum over tokens of ``x_dense xᵀ``, of shape (in, in): what the dense model's inputs have to do with the own ones.

    With it a matrix is fitted to the outputs ``W X_dense`` of the dense model instead of to its own ``W X``; see
    `secateur.core.linalg.right_hand_side`. dtypes as in `Gram`.

    Source: the asymmetric targets of GPTAQ (arXiv 2504.02692), here as a sum of its own.
    """

    @classmethod
    def cost(cls, in_features: int) -> Cost:
        """A matrix; its products are counted as part of the dense model's forwards."""
        return Cost(in_features**2)

    def update(
        self,
        x: Float[Tensor, "tokens in"],
        samples: int = 0,
        *,
        dense: Float[Tensor, "tokens in"] | None = None,
    ) -> None:
        """Add the tokens `x`, which the dense model had as `dense`. Raises `ValueError` without them."""
        if dense is None or dense.shape != x.shape:
            found = "none" if dense is None else str(tuple(dense.shape))
            raise ValueError(f"the dense model's tokens must come with {tuple(x.shape)} tokens, got {found}.")
        self._open().add(dense, x)
        self.tokens += x.shape[0]
        self.samples += samples
