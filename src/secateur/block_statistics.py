"""What a method needs to know of one block, collected while the calibration samples run through it."""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from secateur.core.gradients import GradientKind, GradientNorm
from secateur.core.statistics import Statistic
from secateur.gradient_pass import check_gradient
from secateur.models.backward import GradientTap, regional_gradient
from secateur.models.matrices import Matrix, tapped
from secateur.models.stream import HiddenStates, Stream
from secateur.models.structure import Block
from secateur.models.tap import Enough, InputRecorder, Inputs, InputStatistics, InputTap


@dataclass(frozen=True)
class First:
    """What went into a block for the first batch, and what came out of it while it was dense."""

    input: Tensor
    output: Tensor


@dataclass(frozen=True)
class Collected:
    """The statistics of the inputs of some matrices, their regional gradients by name, and the first batch."""

    inputs: InputStatistics
    gradients: Mapping[str, GradientNorm]
    first: First

    def of(self, matrix: Matrix) -> dict[type[Statistic], Statistic]:
        """The statistics of a matrix's inputs."""
        return self.inputs.of(matrix)


class DenseTwin:
    """The dense model's hidden states beside those of the pruned one, and a dense copy of the block at hand."""

    def __init__(self, stream: Stream, folder: Path | None) -> None:
        """`folder` is where hidden states go, if not into memory."""
        self.stream = stream
        self._folder = folder
        self._block: Block | None = None
        self._after: HiddenStates | None = None
        self._done = 0

    def enter(self, block: Block) -> None:
        """Copy a loaded block before anything in it changes."""
        # Memory: a second block on the device, for as long as the first one is there.
        self._block = Block(block.index, block.path, deepcopy(block.module))
        folder = None if self._folder is None else self._folder.with_name(f"{self._folder.name}-{block.index}")
        self._after = HiddenStates(len(self.stream.batches), folder, pin=self.stream.device.type == "cuda")

    def inputs(self, batch: int, matrices: Sequence[Matrix]) -> Inputs:
        """What the matrices multiply for a batch in the dense model, in the order of the products."""
        assert self._block is not None
        assert self._after is not None
        parameters, _ = tapped(self._block, matrices)
        recorder = InputRecorder(parameters)
        with recorder:
            output = self.stream.run(self._block, batch, aside=batch < self._done)
        if batch >= self._done:
            self._after.put(batch, output)
            self._done = batch + 1
        return recorder.inputs

    def leave(self, block: Block) -> None:
        """Move on behind the block, which every batch has run through."""
        assert self._after is not None
        self.stream.states.close()
        self.stream.states = self._after
        self.stream.release(block)
        self._block, self._after, self._done = None, None, 0

    def close(self) -> None:
        """Drop all hidden states."""
        self.stream.close()
        if self._after is not None:
            self._after.close()


def collect_statistics(
    block: Block,
    matrices: Sequence[Matrix],
    stream: Stream,
    *,
    needs: frozenset[type[Statistic]],
    gradient: GradientKind | None = None,
    twin: DenseTwin | None = None,
    device: torch.device | None = None,
    keep_outputs: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Collected:
    """The statistics of these matrices of a loaded block, from all batches of the stream.

    `gradient` are regional gradients to take as well. With a `twin`, statistics that want the dense model's inputs
    get them. `device` is where statistics are kept, if not where the inputs are. With `keep_outputs` the block's
    outputs take the place of the stream's states; without, a forward ends at the last input of interest.

    Raises `ModelStructureError` for a matrix that saw no token, `CalibrationError` for inputs that are not finite.
    """
    parameters, layout = tapped(block, matrices)
    tap = InputTap(parameters, needs, device)
    wanted = gradient if matrices else None
    gradient_tap = GradientTap(parameters, [wanted.norm], wanted.granularity) if wanted is not None else None
    first: First | None = None
    for batch, ids in enumerate(stream.batches):
        dense = twin.inputs(batch, matrices) if twin is not None else None
        tap.begin(len(ids), whole=batch == 0 or keep_outputs or gradient_tap is not None, dense=dense)
        with suppress(Enough), tap:
            output = regional_gradient(stream, block, batch, gradient_tap)
            if batch == 0:
                first = First(stream.states.get(0, stream.device), output)
            if keep_outputs:
                stream.states.put(batch, output)
        tap.end()
        progress(batch + 1, len(stream.batches))
    assert first is not None
    samples = sum(len(ids) for ids in stream.batches)
    if needs:
        tap.check(matrices, samples)
    gradients: dict[str, GradientNorm] = {}
    if wanted is not None and gradient_tap is not None:
        for matrix in matrices:
            total = matrix.of_parameter(gradient_tap.totals[matrix.parameter, wanted.norm], layout[matrix.parameter])
            check_gradient(matrix.name, total, samples)
            gradients[matrix.name] = GradientNorm(wanted, total, samples * stream.batches[0].shape[1], samples)
    return Collected(tap.taken, gradients, first)


def sites(block: Block, matrices: Sequence[Matrix], stream: Stream) -> list[list[Matrix]]:
    """The matrices of a loaded block in groups that read the same input, in the order in which a forward reaches them.

    All experts of a mixture make one group for each of their inputs. Found by running the first batch.
    """
    parameters, _ = tapped(block, matrices)
    tap = InputTap(parameters, frozenset())
    tap.begin(len(stream.batches[0]), whole=True)
    with tap:
        stream.run(block, 0, aside=True)
    leaders = tap.leaders()
    site_of = {_site(parameter): _site(leader) for (parameter, _), leader in leaders.items()}
    groups: dict[str, list[Matrix]] = {site: [] for site in dict.fromkeys(site_of.values())}
    for matrix in matrices:
        # An expert that the first batch did not reach belongs where the others of its kind are.
        name = _site(matrix.parameter)
        groups.setdefault(site_of.get(name, name), []).append(matrix)
    return [group for group in groups.values() if group]


def _site(parameter: str) -> str:
    """A parameter's name, the same for all experts of a mixture."""
    return re.sub(r"(experts?\.)\d+\.", r"\1*.", parameter)
