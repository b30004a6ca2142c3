"""What a method may know of a matrix's inputs: un-normalised sums over tokens, with counts.

Sums (never running means) make batching, sharding and resuming exact: update in any split, merge in any order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK = 256  # tokens that are added in float32 before float64 takes over


@dataclass(frozen=True)
class Cost:
    """What a statistic takes for each input that matrices read, for estimates.

    `numbers` are what it holds, `products` the multiplications for each token, and `solving` the further numbers that a
    method holds while it solves a matrix with it.
    """

    numbers: int = 0
    products: float = 0.0
    solving: int = 0


@runtime_checkable
class Statistic(Protocol):
    """A sum over the tokens that a matrix reads. `tokens` and `samples` count what went in.

    A class may also have a class method ``cost(in_features) -> Cost``, without which estimates leave it out, and say
    ``one_sample_at_a_time = True`` where every `update` has to be one calibration sample. A method ``finish()`` is
    called when all tokens are in. Where several processes share a run, one that is `Joinable` is joined in that way,
    others by their `merge`, in the order of the processes.
    """

    tokens: int
    samples: int

    @classmethod
    def empty(cls, in_features: int, device: torch.device | str = "cpu") -> Self:
        """The statistic of no tokens at all, for a matrix with `in_features` columns."""
        ...

    def update(self, x: Float[Tensor, "tokens in"], samples: int = 0) -> None:
        """Add the tokens `x`, which came from `samples` further calibration samples."""
        ...

    def merge(self, other: Self) -> None:
        """Add everything that `other` has seen; what an all-reduce does between processes."""
        ...

    def select(self, columns: Int[Tensor, " selected"]) -> Self:
        """The statistic of these input coordinates alone, in this order."""
        ...

    def is_finite(self) -> bool:
        """Whether no NaN or infinity got in."""
        ...


def cost(kind: type[Statistic], in_features: int) -> Cost:
    """What a kind of statistic takes for an input of this width; nothing where it does not say."""
    own: Any = getattr(kind, "cost", None)
    return Cost() if own is None else own(in_features)


class Sum:
    """What the sums of this package have in common: a `total`, and how many tokens and samples went into it."""

    def __init__(self, total: Tensor, tokens: int = 0, samples: int = 0) -> None:
        self.total = total
        self.tokens = tokens
        self.samples = samples

    def merge(self, other: Self) -> None:
        """Add what `other` has seen. Raises `ValueError` for another width."""
        self._check_width(len(other.total), len(self.total))
        wide = torch.promote_types(self.total.dtype, other.total.dtype)
        self.total = self.total.to(wide).add_(other.total.to(self.total.device))
        self.tokens += other.tokens
        self.samples += other.samples

    @staticmethod
    def _check_width(other: int, own: int) -> None:
        if other != own:
            raise ValueError(f"a statistic of {other} columns cannot be merged into {own}.")

    def is_finite(self) -> bool:
        """Whether every sum is a finite number."""
        return bool(self.total.isfinite().all())


def column_squares(x: Float[Tensor, "tokens in"]) -> Float[Tensor, " in"]:
    """The sum over tokens of the square of each column, float64; `CHUNK` tokens at a time are added in float32."""
    total: Tensor
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    # Exact: down a whole column float32 loses four digits over 65536 equal tokens.
    if x.device.type == "cpu":
        # Fast: a product with ones takes a fifth of the time of a norm down the columns.
        total = torch.zeros(x.shape[1], dtype=torch.float64)
        for some in torch.split(x, CHUNK):
            total += torch.mv(some.to(wide).square().t(), torch.ones(len(some), dtype=wide))
        return total
    # Memory: the reduction casts as it reads, so that no float32 copy of x is made.
    whole = x.shape[0] - x.shape[0] % CHUNK
    total = torch.linalg.vector_norm(x[whole:], dim=0, dtype=wide).double().square()
    if whole:
        chunks = torch.linalg.vector_norm(x[:whole].view(-1, CHUNK, x.shape[1]), dim=1, dtype=wide)
        total += chunks.double().square().sum(dim=0)
    return total


class SquaredNorm(Sum):
    """Sum over tokens of the square of each input coordinate: ``total_j = sum_t x_tj ** 2``.

    Each 256 tokens are reduced in float32 and added in float64, so that a million tokens lose nothing.

    Source: Wanda (arXiv 2306.11695), section 3. The published code keeps the mean over *samples*,
    ``total_j / samples``; see `per_sample`.
    """

    total: Float[Tensor, " in"]
    _terms: list[Tensor] | None = None  # of the total, in order, where they are kept

    @classmethod
    def empty(cls, in_features: int, device: torch.device | str = "cpu") -> Self:
        """The statistic of no tokens: zeros of shape (in_features,), float64."""
        return cls(torch.zeros(in_features, dtype=torch.float64, device=device))

    def update(self, x: Float[Tensor, "tokens in"], samples: int = 0) -> None:
        """Add the squares of `x`, any float dtype and device; half precision is squared in float32."""
        term = column_squares(x)
        self.total += term.to(self.total.device)
        self.tokens += x.shape[0]
        self.samples += samples
        if self._terms is not None:
            self._terms.append(term.cpu())

    def keep_terms(self) -> None:
        """From now on keep what each update adds, for `shared`: float64 sums depend on their order."""
        self._terms = []

    def told(self) -> tuple[int, list[Tensor]]:
        """As of every `Joinable`: tokens, and the terms of the total."""
        assert self._terms is not None
        return self.tokens, self._terms

    def shared(self, told: Sequence[tuple[int, list[Tensor]]]) -> list[Tensor]:
        """As of every `Joinable`: the terms of all processes are added in the order in which one process adds them."""
        self.total.zero_()
        for _, terms in told:
            for term in terms:
                self.total += term.to(self.total.device)
        self.tokens, self._terms = sum(tokens for tokens, _ in told), None
        return []

    def select(self, columns: Int[Tensor, " selected"]) -> Self:
        """The sums of these columns."""
        return type(self)(self.total[columns.to(self.total.device)], self.tokens, self.samples)

    def norm(self) -> Float[Tensor, " in"]:
        """``||X_j||_2`` over all tokens, float32: the norm in Wanda's equation 1."""
        return self.total.sqrt().float()

    def per_sample(self) -> Float[Tensor, " in"]:
        """``total_j / samples``, float32: what the published code calls `scaler_row`."""
        return (self.total / max(self.samples, 1)).float()
