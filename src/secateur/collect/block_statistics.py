"""What a method needs to know of one block, collected while the calibration samples run through it."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from secateur.collect.gradient_pass import check_gradient
from secateur.core.gradients import GradientKind, GradientNorm
from secateur.core.gram import CrossGram, add_product
from secateur.core.statistics import Statistic
from secateur.errors import CalibrationError
from secateur.models.flow.backward import GradientTap, regional_gradient
from secateur.models.flow.residual import ResidualRecorder, Writer
from secateur.models.flow.stream import HiddenStates, Stream
from secateur.models.flow.tap import Enough, InputRecorder, Inputs, InputStatistics, InputTap
from secateur.models.shape.matrices import Matrix, tapped
from secateur.models.shape.structure import Block


@dataclass(frozen=True)
class First:
    """What went into a block for the first batch, and what came out of it while it was dense."""

    input: Tensor
    output: Tensor


@dataclass(frozen=True)
class Collected:
    """Statistics of the inputs of some matrices, their regional gradients and drifts by name, and the first batch."""

    inputs: InputStatistics
    gradients: Mapping[str, GradientNorm]
    drifts: Mapping[str, Tensor]
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
        parameters, _ = tapped(self._block, matrices)
        recorder = InputRecorder(parameters)
        with recorder:
            self._run(batch)
        return recorder.inputs

    def residuals(self, batch: int, places: Set[str | None]) -> dict[str | None, Tensor]:
        """What goes into some submodules of the dense block for a batch, and what comes out (None)."""
        assert self._block is not None
        assert self._after is not None
        if None in places and len(places) == 1 and batch < self._done:
            return {None: self._after.get(batch, self.stream.device)}
        recorder = ResidualRecorder(self._block.module, (place for place in places if place is not None))
        with recorder:
            output = self._run(batch)
        return {**recorder.seen, None: output}

    def _run(self, batch: int) -> Tensor:
        """A batch through the dense block; batches come in order, and may come again."""
        assert self._block is not None
        assert self._after is not None
        output = self.stream.run(self._block, batch, aside=batch < self._done)
        if batch >= self._done:
            self._after.put(batch, output)
            self._done = batch + 1
        return output

    def leave(self, block: Block) -> None:
        """Move on behind the block, also with batches that nobody asked for."""
        assert self._after is not None
        for batch in range(self._done, len(self.stream.batches)):
            self._run(batch)
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
    writers: Mapping[str, Writer] = MappingProxyType({}),
    device: torch.device | None = None,
    keep_outputs: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Collected:
    """The statistics of these matrices of a loaded block, from all batches of the stream.

    `gradient` are regional gradients to take as well. With a `twin`, statistics that want the dense model's inputs
    get them, and the matrices that are `writers` their drift: the sum over tokens of ``e xᵀ``, where e is by how much
    the dense model's residual stream differs from this one behind the matrix, divided by the writer's factor.
    `device` is where statistics are kept, if not where the inputs are. With `keep_outputs` the block's outputs take
    the place of the stream's states; without, a forward ends at the last input of interest.

    Raises `ModelStructureError` for a matrix that saw no token, `CalibrationError` for inputs that are not finite.
    """
    parameters, layout = tapped(block, matrices)
    tap = InputTap(parameters, needs, device)
    wanted = gradient if matrices else None
    gradient_tap = GradientTap(parameters, [wanted.norm], wanted.granularity) if wanted is not None else None
    drift = _Drift(block, matrices, writers, device)
    first: First | None = None
    for batch, ids in enumerate(stream.batches):
        dense = twin.inputs(batch, matrices) if twin is not None and CrossGram in needs else None
        whole = batch == 0 or keep_outputs or gradient_tap is not None
        tap.begin(len(ids), whole=whole or bool(drift.places), dense=dense)
        with suppress(Enough), tap, drift.watch(stop=not whole):
            output = regional_gradient(stream, block, batch, gradient_tap)
            drift.see(output)
            if batch == 0:
                first = First(stream.states.get(0, stream.device), output)
            if keep_outputs:
                stream.states.put(batch, output)
        tap.end()
        if drift.places:
            assert twin is not None
            drift.add(twin.residuals(batch, drift.places))
        progress(batch + 1, len(stream.batches))
    assert first is not None
    samples = sum(len(ids) for ids in stream.batches)
    if needs:
        tap.check(matrices, samples)
    gradients: dict[str, GradientNorm] = {}
    tokens = sum(ids.numel() for ids in stream.batches)
    if wanted is not None and gradient_tap is not None:
        for matrix in matrices:
            total = matrix.of_parameter(gradient_tap.totals[matrix.parameter, wanted.norm], layout[matrix.parameter])
            check_gradient(matrix.name, total, samples)
            gradients[matrix.name] = GradientNorm(wanted, total, tokens, samples)
    return Collected(tap.taken, gradients, drift.finished(), first)


class _Drift:
    """How far the residual stream behind some matrices is from the dense model's, multiplied with their inputs."""

    def __init__(
        self, block: Block, matrices: Sequence[Matrix], writers: Mapping[str, Writer], device: torch.device | None
    ) -> None:
        self._block, self._writers, self._device = block, writers, device
        self._matrices = [matrix for matrix in matrices if matrix.name in writers]
        self._parameters, _ = tapped(block, self._matrices)
        self._totals: dict[str, Tensor] = {}
        self._inputs: Inputs = {}
        self._seen: dict[str | None, Tensor] = {}
        self.places = {writers[matrix.name].at for matrix in self._matrices}
        # A matrix that writes elsewhere may be multiplied later.
        self._may_stop = None not in self.places and len(self._matrices) == len(matrices)

    @contextmanager
    def watch(self, *, stop: bool) -> Iterator[None]:
        """Record one forward; with `stop` it may end where nothing more is to be seen."""
        if not self._matrices:
            yield
            return
        inputs = InputRecorder(self._parameters)
        inside = (place for place in self.places if place is not None)
        places = ResidualRecorder(self._block.module, inside, stop=stop and self._may_stop)
        self._inputs, self._seen = inputs.inputs, places.seen
        with inputs, places:
            yield

    def see(self, output: Tensor) -> None:
        """Record what comes out of the block."""
        self._seen[None] = output

    def add(self, dense: Mapping[str | None, Tensor]) -> None:
        """Add the batch of the recorded forward, of which the dense model's residual stream is given."""
        for matrix in self._matrices:
            writer, (x,) = self._writers[matrix.name], self._inputs[matrix.parameter, None]
            stream = self._seen[writer.at]
            x = x if matrix.columns is None else x[:, matrix.columns.to(x.device)]
            wide = torch.promote_types(stream.dtype, torch.float32)
            ahead = (dense[writer.at].to(wide) - stream.to(wide)).flatten(0, -2) / writer.factor
            if matrix.name not in self._totals:
                self._totals[matrix.name] = torch.zeros(matrix.shape, device=self._device or x.device)
            self._totals[matrix.name] = add_product(self._totals[matrix.name], ahead, x)

    def finished(self) -> dict[str, Tensor]:
        """The sums by matrix. Raises `CalibrationError` for one that is not finite."""
        for name, total in self._totals.items():
            if not bool(total.isfinite().all()):
                raise CalibrationError(
                    f"{name}: the residual stream behind it contains NaN or infinity on the calibration samples. Is "
                    "the model itself sound? Try --dtype float32, or --targets pruned."
                )
        return self._totals


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
