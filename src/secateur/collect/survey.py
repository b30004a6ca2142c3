"""A survey: statistics of the inputs of all blocks of the dense model, from one pass over it.

Runs that prune with ``propagate="dense"`` all see these same inputs: the first can leave them here for the others, and
plans can be made from them before anything is pruned.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from secateur.calibration.windows import Progress, Windows
from secateur.collect.collector import Place, run_batches
from secateur.collect.input_sums import InputSums, Sums
from secateur.collect.model_windows import Samples
from secateur.core.batch import Batch
from secateur.core.needs import Need, input_statistics
from secateur.core.statistics import Statistic
from secateur.errors import CalibrationError, CheckpointError
from secateur.files.checkpoint import read_header, read_tensor
from secateur.files.writer import writing
from secateur.models.flow.stream import Stream, default_batch_size
from secateur.models.flow.tap import Key
from secateur.models.opening.opened import OpenedModel
from secateur.models.shape.matrices import Matrix, by_block
from secateur.models.shape.skeleton import Skeleton, loaded
from secateur.models.shape.structure import Block
from secateur.runs.conveyor import Conveyor

Take = Callable[[Block, Sequence[Matrix], Mapping[str, Tensor], Sums], None]


@dataclass(frozen=True)
class _Kept:
    """A statistic whose tensors lie in a file: everything else of it, and the device of each tensor by attribute."""

    rest: Statistic
    devices: Mapping[str, torch.device]


class Survey:
    """Statistics of the inputs of every matrix of the dense model, of all of `kinds`, read by the matrix's name.

    They lie in `folder`, one file for each block and kind, or in memory where that is None. A survey is `complete` when
    the run that takes it is finished; it then belongs to that model and those tokens. Good for one process; `close`
    removes the folder.
    """

    def __init__(self, folder: Path | None, kinds: frozenset[type[Statistic]]) -> None:
        self.folder = folder
        self.kinds = kinds
        self.complete = False
        self.facts: Mapping[str, Any] | None = None
        self._matrices: dict[str, Matrix] = {}
        self._held: dict[tuple[int, type[Statistic]], Sums] = {}
        self._kept: dict[tuple[int, type[Statistic]], tuple[Mapping[Key, Key], dict[Key, _Kept]]] = {}
        self._last: tuple[int, Sums] | None = None

    def begin(self, needs: frozenset[type[Statistic]], facts: Mapping[str, Any]) -> None:
        """Start a run that needs these statistics and of which these `facts` hold, see `facts_of`.

        Raises `CalibrationError` when it needs others, or the survey is of other facts.
        """
        for kind in needs - self.kinds:
            raise CalibrationError(f"{kind.__name__} is not among the statistics that these runs share.")
        for name, value in facts.items():
            if self.facts is not None and value != self.facts[name]:
                raise CalibrationError(
                    f"these statistics are shared by runs with {name} {self.facts[name]}, got {value}. "
                    "Runs that differ in that need statistics of their own."
                )
        self.facts = facts
        if self.folder is not None:
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)

    def put(self, block: int, matrices: Sequence[Matrix], sums: Sums) -> None:
        """Keep the statistics of these matrices of a block. Raises `CheckpointError` when there is no room for them."""
        self._matrices |= {matrix.name: matrix for matrix in matrices}
        for kind in self.kinds:
            own = sums.only(frozenset({kind}))
            if self.folder is None:
                self._held[block, kind] = own
                continue
            self._kept[block, kind] = dict(own.leader), self._write(self._file(block, kind), own, kind)

    def block(self, block: int, kinds: frozenset[type[Statistic]]) -> Sums:
        """Those statistics of a block, on the device where they were taken."""
        found = [self._held.get((block, kind)) or self._read(block, kind) for kind in kinds]
        by_leader = {
            leader: {kind: own for part in found for kind, own in part.by_leader[leader].items()}
            for leader in found[0].by_leader
        }
        return Sums(found[0].leader, by_leader)

    def of(self, matrix: str) -> Mapping[type[Statistic], Statistic]:
        """The statistics of a matrix, by name. Those of its block stay in memory until another block is asked for.

        Raises `CalibrationError` for a matrix that is not in the survey, or before the survey is complete.
        """
        if not self.complete or matrix not in self._matrices:
            raise CalibrationError(
                f"{matrix}: is not in the survey, which holds {len(self._matrices)} matrices"
                f"{'' if self.complete else ' and is not complete'}."
            )
        found = self._matrices[matrix]
        if self._last is None or self._last[0] != found.block:
            self._last = None  # Memory: gone before the next block is read
            self._last = (found.block, self.block(found.block, self.kinds))
        return self._last[1].of(found)

    def close(self) -> None:
        """Remove what was kept."""
        self._held.clear()
        self._kept.clear()
        self._last = None
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, block: int, kind: type[Statistic]) -> Path:
        assert self.folder is not None
        return self.folder / f"block-{block}-{kind.__module__}.{kind.__qualname__}.safetensors"

    @staticmethod
    def _write(file: Path, sums: Sums, kind: type[Statistic]) -> dict[Key, _Kept]:
        """Write the tensors of these statistics, and return what is left of each.

        Only numbers lie on the disk: statistics may be of any class, and objects that are read back from a file can be
        anything that somebody has put there.
        """
        kept: dict[Key, _Kept] = {}
        tensors: dict[str, Tensor] = {}
        for number, (key, found) in enumerate(sums.by_leader.items()):
            rest, devices = copy(found[kind]), {}
            for name, value in vars(found[kind]).items():
                if isinstance(value, Tensor):
                    tensors[f"{number}.{name}"] = value.detach().cpu().contiguous()
                    devices[name] = value.device
                    delattr(rest, name)
            kept[key] = _Kept(rest, devices)
        with writing(file):
            save_file(tensors, file)
        return kept

    def _read(self, block: int, kind: type[Statistic]) -> Sums:
        leader, kept = self._kept[block, kind]
        file = self._file(block, kind)
        records = read_header(file).tensors
        by_leader: dict[Key, dict[type[Statistic], Statistic]] = {}
        for number, (key, own) in enumerate(kept.items()):
            statistic = copy(own.rest)
            for name, device in own.devices.items():
                if f"{number}.{name}" not in records:
                    raise CheckpointError(f"{file}: lacks the tensor {number}.{name}: it was changed during the run.")
                setattr(statistic, name, read_tensor(records[f"{number}.{name}"]).to(device))
            by_leader[key] = {kind: statistic}
        return Sums(leader, by_leader)


def facts_of(
    opened: OpenedModel,
    windows: Samples,
    matrices: Sequence[Matrix],
    batch_size: int,
    statistics_device: torch.device | None,
) -> dict[str, Any]:
    """What two runs must have in common for their statistics of the dense model's inputs to be the same bits."""
    return {
        "model": opened.origin,
        "tokens": windows.digest,
        "matrices": [matrix.name for matrix in matrices],
        **computing(opened.skeleton, batch_size, statistics_device),
        "on": str(opened.skeleton.device),
    }


def computing(skeleton: Skeleton, batch_size: int, statistics_device: torch.device | None) -> dict[str, Any]:
    """What sums of statistics depend on besides model and tokens, to the last bit."""
    return {
        # Which of several equal GPUs it is makes no difference.
        "device": skeleton.device.type,
        "dtype": str(skeleton.dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "statistics_device": None if statistics_device is None else statistics_device.type,
    }


@dataclass(frozen=True)
class DensePass:
    """One forward through the blocks of the dense model, up to the last of `matrices`, with the memory of one block.

    Statistics of inputs are kept on `device`, or where inputs are; hidden states lie in `states_folder`, or in memory.
    """

    opened: OpenedModel
    matrices: Sequence[Matrix]
    collector: InputSums
    device: torch.device | None = None
    states_folder: Path | None = None

    def batch_size(self, windows: Windows, asked: int | None) -> int:
        """Samples at once."""
        skeleton = self.opened.skeleton
        size = self.collector.batch_size(skeleton, windows.length, asked)
        return size or default_batch_size(windows.length, skeleton.device)

    @torch.no_grad()
    def run(self, batches: Sequence[Batch], take: Take, progress: Progress = lambda done, total: None) -> None:
        """Call `take` with each block, its matrices, their checkpoint tensors and the statistics of their inputs."""
        skeleton, of_block = self.opened.skeleton, by_block(self.matrices)
        last = max(of_block)
        skeleton.load_outside(head=False)
        stream = Stream(skeleton, batches, states_folder=self.states_folder)
        skeleton.unload_outside()

        def visit(block: Block, tensors: dict[str, Tensor]) -> None:
            own = of_block.get(block.index, [])
            stream.reach(block)
            with loaded(skeleton, block, tensors):
                here = self.collector.at(Place(block, own, stream, device=self.device))
                run_batches(here.place, [here], keep_outputs=block.index < last)
                take(block, own, tensors, here.sums)
                stream.release(block)
            progress(block.index + 1, last + 1)

        with closing(stream):
            Conveyor(skeleton).carry(visit, read=skeleton.read, blocks=skeleton.blocks[: last + 1])


def survey(
    opened: OpenedModel,
    windows: Windows,
    needs: frozenset[Need],
    *,
    matrices: Sequence[Matrix] | None = None,
    folder: Path | None = None,
    batch_size: int | None = None,
    statistics_device: torch.device | None = None,
    states_folder: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> Survey:
    """The survey of an opened model on these windows, with the statistics of inputs among `needs`.

    It takes one forward through all blocks up to the last of `matrices` (default: all prunable ones), and the memory of
    one block. `folder` and `states_folder` are where statistics and hidden states go, if not into memory.
    """
    kinds = input_statistics(needs)
    chosen = opened.skeleton.matrices if matrices is None else matrices
    one = DensePass(opened, chosen, InputSums(kinds), statistics_device, states_folder)
    size = one.batch_size(windows, batch_size)
    result = Survey(folder, kinds)
    result.begin(kinds, facts_of(opened, windows, chosen, size, statistics_device))
    one.run(windows.batches(size), lambda block, own, tensors, sums: result.put(block.index, own, sums), progress)
    result.complete = True
    return result
