"""Products of the dense model's inputs with those of the pruned one: `CrossGram`, for ``targets="dense"``."""

from torch import Tensor

from secateur.collect.collector import Cost, Extent
from secateur.collect.input_sums import InputSums
from secateur.core.gram import CrossGram
from secateur.core.statistics import Statistic
from secateur.errors import ModelStructureError
from secateur.models.flow.tap import Inputs, Key


class DenseProducts(InputSums):
    """The products of the two models' inputs, in the forwards of the other statistics and one more of the dense block.

    The dense block runs again for every site.
    """

    beside_dense = True
    _dense: Inputs

    def cost(self, extent: Extent) -> Cost:
        """A dense copy of the block, the states before and after it, and its forwards."""
        return super().cost(extent) + Cost(states=2, block_copies=1, forwards=4.0 if extent.by_site else 1.0)

    def begin(self, batch: int, *, stop: bool) -> None:
        """Run the batch through the dense block first."""
        super().begin(batch, stop=stop)
        assert self.place.twin is not None
        self._dense = self.place.twin.inputs(batch, self.place.matrices)

    def add(self, statistic: Statistic, key: Key, number: int, x: Tensor) -> None:
        """Add the inputs of a product, with those of the same product in the dense model."""
        assert isinstance(statistic, CrossGram)
        seen = self._dense.get(key, [])
        if number >= len(seen) or seen[number].shape != x.shape:
            raise ModelStructureError(
                f"{key[0]}: multiplies {x.shape[0]} tokens after the pruned blocks, and "
                f"{seen[number].shape[0] if number < len(seen) else 'none'} in the dense model: tokens are routed "
                "differently there. Use --targets pruned for this model, or leave its experts out with --skip."
            )
        statistic.update(x, dense=seen[number])

    def end(self, batch: int, output: Tensor | None) -> None:
        """Count the samples of the batch, and let go of the dense model's inputs."""
        super().end(batch, output)
        self._dense = {}
