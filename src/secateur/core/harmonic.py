"""The statistic of Wanda's published ablations, in which early calibration samples count more; for comparison only."""

from typing import ClassVar, Self

from jaxtyping import Float
from torch import Tensor

from secateur.core.statistics import SquaredNorm
from secateur.errors import PatternError


class HarmonicNorm(SquaredNorm):
    """Sum over samples of the sum of squares of each input coordinate, in which the j-th sample counts ``1 / j``.

    Of 128 samples the first carries 18 % and the first eight 50 % of it. Every `update` has to be one sample, and there
    is no `merge`: the order matters.

    Source: published code of Wanda, `ablate.py`, where the norm is taken of inputs that were scaled by ``sqrt(2 / j)``.
    """

    one_sample_at_a_time: ClassVar[bool] = True
    _position = 0

    def update(self, x: Float[Tensor, "tokens in"], samples: int = 0) -> None:
        """Add the next sample."""
        own = SquaredNorm.empty(x.shape[1], x.device)
        own.update(x)
        self._position += 1
        self.total += own.total.to(self.total.device) / self._position
        self.tokens += own.tokens
        self.samples += samples

    def per_sample(self) -> Float[Tensor, " in"]:
        """The sum itself: each sample has its weight already."""
        return self.total

    def merge(self, other: Self) -> None:
        """Raise `ValueError`: what was added first would count twice."""
        raise ValueError("sums in which samples count by their order cannot be merged.")


def weighted(weighting: str) -> type[SquaredNorm]:
    """The statistic in which samples count alike ("equal") or by their order ("published"). Raises `PatternError`."""
    if weighting not in ("equal", "published"):
        raise PatternError(f'weighting: got "{weighting}", expected equal or published.')
    return SquaredNorm if weighting == "equal" else HarmonicNorm
