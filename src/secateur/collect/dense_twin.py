"""The dense model beside the pruned one: its hidden states, and a dense copy of the block at hand."""

from collections.abc import Sequence, Set
from copy import deepcopy
from pathlib import Path

from torch import Tensor

from secateur.models.flow.residual import first_inputs
from secateur.models.flow.stream import HiddenStates, Stream
from secateur.models.flow.tap import InputRecorder, Inputs
from secateur.models.shape.matrices import Matrix, tapped
from secateur.models.shape.structure import Block


class DenseTwin:
    """The dense model's hidden states beside those of the pruned one, and a dense copy of the block at hand."""

    _block: Block  # a dense copy of the one at hand
    _after: HiddenStates  # what comes out of it

    def __init__(self, stream: Stream, folder: Path | None) -> None:
        """`folder` is where hidden states go, if not into memory."""
        self.stream = stream
        self._folder = folder
        self._after = stream.states

    def reach(self, block: Block) -> None:
        """Get ready for a block."""
        self.stream.reach(block)

    def enter(self, block: Block) -> None:
        """Copy a loaded block before anything in it changes."""
        # Memory: a second block on the device, for as long as the first one is there.
        self._block = Block(block.index, block.path, deepcopy(block.module))
        self._after = HiddenStates(len(self.stream.batches), self._folder, pin=self.stream.device.type == "cuda")
        self._done = 0

    def inputs(self, batch: int, matrices: Sequence[Matrix]) -> Inputs:
        """What the matrices multiply for a batch in the dense model, in the order of the products."""
        parameters, _ = tapped(self._block, matrices)
        recorder = InputRecorder(parameters)
        with recorder:
            self._run(batch)
        return recorder.inputs

    def residuals(self, batch: int, places: Set[str | None]) -> dict[str | None, Tensor]:
        """What goes into some submodules of the dense block for a batch, and what comes out (None)."""
        if None in places and len(places) == 1 and batch < self._done:
            return {None: self._after.get(batch, self.stream.device)}
        inside = [place for place in places if place is not None]
        with first_inputs(self._block.module, inside) as found:
            found[None] = self._run(batch)
        return found

    def _run(self, batch: int) -> Tensor:
        """A batch through the dense block; batches come in order, and may come again."""
        output = self.stream.run(self._block, batch, aside=batch < self._done)
        if batch >= self._done:
            self._after.put(batch, output)
            self._done = batch + 1
        return output

    def leave(self, block: Block) -> None:
        """Move on to the next block, also with batches that nobody asked for."""
        for batch in range(self._done, len(self.stream.batches)):
            self._run(batch)
        self.stream.states.close()
        self.stream.states = self._after
        self.stream.release(block)
        del self._block  # Memory: the copy goes with the block

    def close(self) -> None:
        """Drop all hidden states."""
        self.stream.close()
        self._after.close()
