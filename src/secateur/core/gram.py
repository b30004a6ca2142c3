"""Second moments of a matrix's inputs: un-normalised sums of outer products, which merge like every statistic."""

from collections.abc import Iterator
from contextlib import _GeneratorContextManager, contextmanager
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.core.statistics import Cost, SquaredNorm, Sum

NARROW, WIDE = 128, 256  # rows of a Gram matrix that are multiplied at once, up to 1,024 inputs and beyond


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


class _SecondMoments(Sum):
    """What sums of outer products have in common: a `total` of shape (in, in)."""

    @classmethod
    def empty(cls, in_features: int, device: torch.device | str = "cpu") -> Self:
        """The statistic of no tokens: zeros of shape (in_features, in_features), float32."""
        return cls(torch.zeros(in_features, in_features, device=device))

    def select(self, columns: Int[Tensor, " selected"]) -> Self:
        """The sums for these inputs among each other."""
        columns = columns.to(self.total.device)
        return type(self)(self.total[columns.unsqueeze(1), columns], self.tokens, self.samples)


def _panels(width: int) -> list[tuple[int, int]]:
    """Where the rows begin and end that are multiplied at once, each from its diagonal on."""
    rows = NARROW if width <= 4 * WIDE else WIDE
    return [(start, min(start + rows, width)) for start in range(0, width, rows)]


class Gram(_SecondMoments):
    """Sum over tokens of ``x xᵀ``: ``total_jk = sum_t x_tj x_tk``, of shape (in, in).

    Sums are float32, and float64 from the first float64 tokens on; half-precision tokens are widened batch by batch.
    The Hessian of the squared error of one output row is ``2 total / samples``.

    Products are taken for the upper triangle alone, and mirrored when `total` is next asked for.

    Source: Frantar and Alistarh, SparseGPT (arXiv 2301.00774), section 3. The published code keeps the running mean
    ``2 total / samples``.
    """

    _sums: Tensor
    _mirrored: bool

    @property
    def total(self) -> Float[Tensor, "in in"]:
        """The sum, both triangles."""
        if not self._mirrored:
            for start, stop in _panels(len(self._sums)):
                self._sums[stop:, start:stop].copy_(self._sums[start:stop, stop:].t())
            self._mirrored = True
        return self._sums

    @total.setter
    def total(self, sums: Float[Tensor, "in in"]) -> None:
        self._sums, self._mirrored = sums, True

    def update(self, x: Float[Tensor, "tokens in"], samples: int = 0) -> None:
        """Add the outer products of `x`, any float dtype and device."""
        wide = torch.promote_types(x.dtype, self._sums.dtype)
        self._sums, x = self._sums.to(wide), x.to(wide)
        with full_precision():
            for start, stop in _panels(len(self._sums)):
                panel = self._sums.narrow(0, start, stop - start).narrow(1, start, len(self._sums) - start)
                columns = x[:, start:]
                if panel.device == x.device:
                    panel.addmm_(columns[:, : stop - start].t(), columns)
                else:
                    panel.add_((columns[:, : stop - start].t() @ columns).to(panel.device))
        self._mirrored = False
        self.tokens += x.shape[0]
        self.samples += samples

    @classmethod
    def cost(cls, in_features: int) -> Cost:
        """A matrix, of which half is multiplied; factorising and inverting it takes about six of its size."""
        return Cost(in_features**2, 0.6 * in_features**2, 6 * in_features**2)

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
        self.total = add_product(self.total, dense, x)
        self.tokens += x.shape[0]
        self.samples += samples


def add_product(
    total: Float[Tensor, "rows columns"], left: Float[Tensor, "tokens rows"], right: Float[Tensor, "tokens columns"]
) -> Float[Tensor, "rows columns"]:
    """``total + leftᵀ right``, in place unless the sum has to be widened; products keep all 24 bits."""
    wide = torch.promote_types(torch.promote_types(left.dtype, right.dtype), total.dtype)
    total = total.to(wide)
    left, right = left.to(wide), right.to(wide)
    with full_precision():
        if total.device == left.device:
            return total.addmm_(left.t(), right)
        return total.add_((left.t() @ right).to(total.device))
