"""How far the residual stream has drifted from the dense model's where a matrix has written to it: `Drift`."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor

from secateur.collect.collector import Collector, Cost, Evidence, Extent
from secateur.core.gram import Products
from secateur.core.needs import Drift
from secateur.errors import CalibrationError, ModelStructureError
from secateur.models.flow.residual import BLOCK_INPUT, ResidualWriter, first_inputs, residual_writers
from secateur.models.flow.stream import Stream
from secateur.models.flow.tap import InputRecorder, Inputs, Product
from secateur.models.flow.waiting import WaitingForwards
from secateur.models.shape.matrices import Matrix, by_block, tapped
from secateur.models.shape.structure import Block
from secateur.runs.processes import Processes


class ResidualDrift(Collector):
    """The drift of the matrices that write to the residual stream; the others have none."""

    beside_dense = True

    def __init__(self, need: Drift) -> None:
        self.needs = frozenset({need})
        self.need = need
        self._writers: Mapping[str, ResidualWriter] = {}

    def cost(self, extent: Extent) -> Cost:
        """Two more sets of hidden states, a dense copy of the block, its forward, the products of the writers as they
        were, and sums of the weights' size.
        """
        hidden = extent.skeleton.hidden_size
        fitting = by_block(own for own in extent.matrices if own.shape[0] == hidden and own.expert is None)
        widths = max((sum(matrix.shape[1] for matrix in own) for own in fitting.values()), default=0)
        joined = 8.0 * hidden * sum(matrix.shape[1] for own in fitting.values() for matrix in own)
        held = 2 * extent.number_bytes * hidden * widths  # sums are whole numbers of 8 bytes
        return Cost(held=held, states=2, block_copies=1, forwards=1.5, joined=joined)

    def enter(self, block: Block, matrices: Sequence[Matrix], stream: Stream) -> dict[str, Any]:
        """Find the writers among the matrices of the block; the manifest lists them."""
        every = [matrix for matrix in stream.skeleton.matrices if matrix.block == block.index]
        found = residual_writers(block, every, stream) if matrices else {}
        self._writers = {matrix.name: found[matrix.name] for matrix in matrices if matrix.name in found}
        return {"residual_writers": {name: vars(writer) for name, writer in self._writers.items()}}

    def start(self) -> None:
        """Begin with sums that are zero."""
        self._matrices = [matrix for matrix in self.place.matrices if matrix.name in self._writers]
        self._parameters, _ = tapped(self.place.block, self._matrices)
        self._places = {self._writers[matrix.name].at for matrix in self._matrices}
        self.ends = bool(self._matrices)
        # A matrix that writes elsewhere may be multiplied later.
        self.whole = self.ends and (None in self._places or len(self._matrices) < len(self.place.matrices))
        self._sums: dict[str, Products] = {}
        self._totals: dict[str, Tensor] = {}
        self._inputs: Inputs = {}
        self._seen: dict[str | None, Tensor] = {}

    def begin(self, batch: int, *, stop: bool) -> None:
        """Remember whether the forward may end."""
        self._stop = stop

    def watch(self) -> AbstractContextManager[object]:
        """Records what the writers multiply, and the residual stream after them."""
        stack = ExitStack()
        if not self._matrices:
            return stack
        inputs = InputRecorder(self._parameters)
        inside = [at for at in self._places if at is not None]
        self._inputs = stack.enter_context(inputs).inputs
        self._seen = stack.enter_context(first_inputs(self.place.block.module, inside, stop=self._stop))
        return stack

    @property
    def watched(self) -> Collection[str]:
        """What writers of this block add to."""
        return {own.base for own in self._writers.values() if own.base not in (None, BLOCK_INPUT)}

    def takes_while_waiting(self, forwards: WaitingForwards, batch: int) -> bool:
        """Where it is known what the one writer of the site adds to."""
        return not self._matrices or (len(self._matrices) == 1 and self._base(forwards, batch) is not None)

    def _base(self, forwards: WaitingForwards, batch: int) -> Tensor | None:
        base = self._writers[self._matrices[0].name].base
        if base == BLOCK_INPUT:
            return self.place.stream.states.get(batch, self.place.stream.device)
        return None if base is None else forwards.seen(batch, base)

    def take(self, forwards: WaitingForwards, batch: int, product: Product) -> None:
        """The input of the writer, and the residual stream as it would be after the matrix as it is now."""
        if not self._matrices:
            return
        writer, base = self._writers[self._matrices[0].name], self._base(forwards, batch)
        if base is None:
            raise ModelStructureError(
                f"{self._matrices[0].name}: what it adds to is overwritten in batch {batch + 1}, and was not in the "
                "first one. Use --targets pruned."
            )
        self._inputs = {(product.name, None): [product.x.reshape(-1, product.x.shape[-1])]}
        self._seen = {writer.at: base + writer.factor * forwards.multiply(batch).view_as(base)}

    def end(self, batch: int, output: Tensor | None) -> None:
        """Run the batch through the dense block, and add ``e xᵀ``, with e divided by the factor of the writer."""
        if not self._matrices:
            return
        if output is not None:
            self._seen[None] = output
        assert self.place.twin is not None
        dense = self.place.twin.residuals(batch, self._places)
        for matrix in self._matrices:
            writer, (x,) = self._writers[matrix.name], self._inputs[matrix.parameter, None]
            stream = self._seen[writer.at]
            x = x if matrix.columns is None else x[:, matrix.columns.to(x.device)]
            wide = torch.promote_types(stream.dtype, torch.float32)
            ahead = dense[writer.at].to(wide).flatten(0, -2) - stream.to(wide).flatten(0, -2)
            if matrix.name not in self._sums:
                self._sums[matrix.name] = Products(*matrix.shape, self.place.device or x.device)
            self._sums[matrix.name].add(ahead / writer.factor, x)

    def join(self, processes: Processes) -> None:
        """Join the sums. All processes have the same writers."""
        processes.join(self._sums[matrix.name] for matrix in self._matrices)

    def finished(self) -> None:
        """Take the share that was asked for. Raises `CalibrationError` for sums that are not finite."""
        for name, products in self._sums.items():
            if not products.finite:
                error = CalibrationError(
                    f"{name}: the residual stream after it contains NaN or infinity on the calibration samples. Is "
                    "the model itself sound? Try --dtype float32, or --targets pruned."
                )
                self.exempt.nonfinite(name, error)
            self._totals[name] = products.take().mul_(self.need.share)
        self._sums, self._inputs, self._seen = {}, {}, {}  # Memory: of the last batch

    def of(self, matrix: Matrix, device: torch.device) -> Evidence:
        """The drift of a writer."""
        return {self.need: self._totals[matrix.name]} if matrix.name in self._totals else {}
