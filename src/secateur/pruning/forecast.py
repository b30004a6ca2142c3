"""What a run would prune and cost, before it starts: memory, disk and time, from headers and a short measurement."""

import math
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from accelerate.utils import convert_file_size_to_int
from rich.filesize import decimal

from secateur.errors import CheckpointError, PatternError
from secateur.models.flow.memory import available_bytes
from secateur.models.shape.matrices import Matrix, by_block
from secateur.models.shape.skeleton import Skeleton
from secateur.plans.plan import Plan
from secateur.pruning.forecast_memory import Memory, memory_of, shortage, source_bytes
from secateur.pruning.forecast_time import (
    RunSeconds,
    allocating_note,
    allocating_seconds,
    run_seconds,
    writing_note,
    writing_seconds,
)
from secateur.pruning.named import resolved
from secateur.pruning.preparation import Prepared, output_of, prepared, solving_cost
from secateur.pruning.settings import PlanSettings
from secateur.runs.options import taking
from secateur.runs.processes import Processes, too_few
from secateur.runs.transaction import unfinished
from secateur.shown import Shown


@dataclass(frozen=True)
class KindRow:
    """All matrices of one kind: `model.layers.*.mlp.up_proj.weight`."""

    kind: str
    pattern: str | None  # None where nothing of the kind is planned
    matrices: int
    planned: int
    shape: tuple[int, int]
    weights: int


@dataclass(frozen=True)
class LeftOutRow:
    """Tensors that are not pruned, for one reason."""

    reason: str
    tensors: int
    weights: int
    example: str


@dataclass(frozen=True)
class PartRow:
    """A part of a run: its seconds in one process, and where several share it."""

    part: str
    alone: float
    shared: float


@dataclass(frozen=True, repr=False)
class Estimate(Shown):
    """The dry run. Bytes are totals at the peak; seconds are those of the run, from what the machine was tried at."""

    model: str
    architecture: str
    blocks: int
    method: str
    kinds: list[KindRow]
    left_out: list[LeftOutRow]
    plan: Plan
    planned_weights: int
    zeros: int
    all_weights: int
    tokens: int
    device: str
    dtype: str
    block_bytes: int
    states_bytes: int
    host_bytes: int
    device_bytes: int
    disk_bytes: int
    packed_bytes: int | None  # of all tensors of the output, where that will be packed
    seconds: float
    available_host_bytes: int
    run: RunSeconds
    exchanged_bytes: int  # that each process sends, where several share the run
    parts: list[PartRow]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """All fields; the plan as one object per matrix."""
        return {**asdict(self), "plan": self.plan.to_json()}


@taking(PlanSettings)
def estimate(settings: PlanSettings) -> Estimate:
    """What `prune` with the same options would do and take, without its work (a GGUF file has to be read).

    Methods and patterns are given as for `prune`: "wanda+swaps", "2:4". Raises the errors that `prune` raises before
    its work starts. With ``calibration=None`` nothing is asked of the text, and `samples` (128) and `length` (2048) say
    how many tokens there will be.

    With `processes` the time is that of so many, and `parts` says how it is made up, beside one process; each sends
    `bandwidth` bytes a second to the others ("25GB"). A note says whether one fits into `device_memory` ("80GB").
    """
    began = time.perf_counter()
    settings = resolved(settings)
    bandwidth = size_of(settings.bandwidth, "--bandwidth")
    room = None if settings.device_memory is None else size_of(settings.device_memory, "--device-memory")
    target = None if settings.output is None else output_of(settings)
    with prepared(settings, dry=True) as ready:
        found = _estimate(ready, target, opening=time.perf_counter() - began)
        if settings.processes > 1:
            found = shared_estimate(found, ready, settings.processes, bandwidth)
    if room is not None:
        found.notes.append(fits(found, room))
    return found


def _estimate(ready: Prepared, target: Path | None, *, opening: float) -> Estimate:
    skeleton, plan, method = ready.opened.skeleton, ready.plan, ready.method
    memory = memory_of(ready)
    free = available_bytes()
    total = source_bytes(skeleton, skeleton.source.names)
    disk = total + memory.cost.file + (ready.packed_bytes or 0)
    notes = [*ready.foreseen.unchecked, *_memory_notes(ready, memory)]
    writing = writing_seconds(skeleton, ready.foreseen) if ready.foreseen.to_write else 0.0
    if writing:
        notes.append(writing_note(skeleton, ready.foreseen, writing))
    allocating = 0.0
    if ready.settings.allocation != "uniform" and ready.allocated is None:
        allocating = allocating_seconds(ready)
        notes.append(allocating_note(ready, allocating))
    if told := shortage(ready, memory):
        notes.append(told)
    if ready.settings.permute:
        notes.append("Finding orders of channels (--permute) is not part of these times and sizes.")
    if target is not None:
        above = next(folder for folder in target.parents if folder.exists())
        room = shutil.disk_usage(above).free
        if room < disk:
            notes.append(f"This needs more disk than the {decimal(room)} that are free in {above}.")
        try:
            left = unfinished(target)
        except CheckpointError as error:
            left = None if ready.settings.overwrite else str(error)
        if left is not None:
            notes.append(left)
    seconds = run_seconds(ready, math.prod(before.passes for before in memory.cost.before))
    left_out = [LeftOutRow(**row) for row in skeleton.left_out_by_reason()]
    all_weights = sum(math.prod(skeleton.source.shape(name)) for name in skeleton.source.names)
    for row in left_out:
        if row.reason.startswith("not a linear matrix") and row.weights > all_weights / 100:
            notes.append(
                f"{row.weights / all_weights:.0%} of all weights stay dense because Secateur does not know how they "
                f"are multiplied: {row.reason}, such as {row.example}."
            )
    sizes = {matrix.name: math.prod(matrix.shape) for matrix in skeleton.matrices}
    return Estimate(
        model=str(ready.opened.origin.get("path")),
        architecture=str(ready.opened.origin["architecture"]),
        blocks=len(skeleton.blocks),
        method=method.name,
        kinds=_kinds(skeleton, plan),
        left_out=left_out,
        plan=plan,
        planned_weights=sum(sizes[name] for name in plan),
        zeros=round(sum(sizes[name] * pattern.sparsity for name, pattern in plan.items())),
        all_weights=all_weights,
        tokens=ready.extent.tokens,
        device=str(skeleton.device),
        dtype=str(skeleton.dtype).removeprefix("torch."),
        block_bytes=memory.block_stored,
        states_bytes=memory.states,
        host_bytes=memory.host,
        device_bytes=memory.device,
        disk_bytes=disk,
        packed_bytes=ready.packed_bytes,
        seconds=opening + writing + allocating + seconds.total,
        run=seconds,
        exchanged_bytes=0,
        parts=[],
        available_host_bytes=free,
        notes=notes,
    )


def _memory_notes(ready: Prepared, memory: Memory) -> list[str]:
    """What is worth saying of where memory goes."""
    notes = []
    for before in memory.cost.before:
        place = "in memory" if before.folder is None else f"in {before.folder}"
        parts = (
            f", for {before.samples} samples at a time in {before.passes} passes over the weights"
            if before.passes > 1
            else ""
        )
        notes.append(
            f"Gradients first: the inputs of all blocks take {decimal(before.saved)} {place}{parts}, and their "
            f"norms {decimal(memory.cost.file)} in a temporary file beside the output."
        )
    if memory.sums or memory.sums_elsewhere:
        elsewhere = f" on {ready.evidence.device}" if memory.sums_elsewhere else ""
        notes.append(
            f"The Gram matrices of a block take about {decimal(memory.sums + memory.sums_elsewhere)}{elsewhere}, "
            f"and solving the largest matrix {decimal(memory.solving)}."
        )
    if ready.opened.skeleton.resident:
        notes.append("The whole model is in memory: it was given as a module, or dequantised from GGUF.")
    if memory.offloaded:
        notes.append("The hidden states would not fit in half of the free memory; they go to a memory-mapped file.")
    return notes


def _kinds(skeleton: Skeleton, plan: Plan) -> list[KindRow]:
    kinds: dict[str, list[Matrix]] = {}
    for matrix in skeleton.matrices:
        kinds.setdefault(matrix.kind, []).append(matrix)
    rows = []
    for kind, own in kinds.items():
        patterns = [str(plan[matrix.name]) for matrix in own if matrix.name in plan]
        weights = sum(math.prod(matrix.shape) for matrix in own)
        rows.append(KindRow(kind, next(iter(patterns), None), len(own), len(patterns), own[-1].shape, weights))
    return rows


def size_of(text: str, option: str) -> int:
    """The bytes that a size such as 80GB says. Raises `PatternError` for what is none."""
    try:
        found = int(convert_file_size_to_int(text))
    except ValueError:
        found = 0
    if found <= 0:
        raise PatternError(f'{option}: got "{text}", expected a size such as 80GB, 512MB or 24GiB.')
    return found


def shared_estimate(alone: Estimate, ready: Prepared, processes: int, bandwidth: int) -> Estimate:
    """The estimate of a run that so many processes share, each on a device of its own.

    A process has whole batches, and the matrices of a block (of a site) are dealt out by cost. Joining sums takes twice
    what they hold, less a share, as in a ring; a solved matrix is sent once. Reading is what each process does.
    """
    extent, planned = ready.extent, by_block(ready.extent.matrices)
    batches = max(1, math.ceil(extent.samples / extent.chosen_batch_size))
    if batches < processes and extent.samples:
        raise too_few(batches, processes, f"more samples, a smaller --batch-size (now {extent.chosen_batch_size})")
    samples = math.ceil(batches / processes) / batches
    if extent.by_site and extent.samples:  # the first sample runs along in all of them
        samples += 2 / extent.samples
    dealer, most, whole = Processes(0, processes), 0.0, 0.0
    for own in planned.values():
        sites: dict[str, dict[str, float]] = {}
        for matrix in own:
            place = matrix.site if extent.by_site else ""
            sites.setdefault(place, {})[matrix.name] = solving_cost(ready.method, matrix)
        for costs in sites.values():
            loads = [0.0] * processes
            for name, rank in dealer.deal(costs).items():
                loads[rank] += costs[name]
            most, whole = most + max(loads), whole + sum(costs.values())
    solved = sum(
        math.prod(matrix.shape) * extent.skeleton.source.dtype(matrix.tensor).itemsize for matrix in extent.matrices
    )
    exchanged = int(2 * (processes - 1) / processes * ready.evidence.cost(extent).joined + solved)
    run = alone.run.shared(samples, most / whole)
    exchanging = exchanged / bandwidth
    parts = [
        PartRow("forwards", alone.run.forwards, run.forwards),
        PartRow("products of statistics", alone.run.products, run.products),
        PartRow("choosing and solving", alone.run.solving, run.solving),
        PartRow("reading and converting", *(each.hashing_model + each.converting for each in (alone.run, run))),
        PartRow("exchange", 0.0, exchanging),
        PartRow("in all", alone.seconds, alone.seconds - alone.run.total + run.total + exchanging),
    ]
    return replace(alone, run=run, seconds=parts[-1].shared, exchanged_bytes=exchanged, parts=parts)


def fits(found: Estimate, room: int) -> str:
    """Whether a process fits into so much memory of a device, in a sentence."""
    needed = found.device_bytes or found.host_bytes
    verdict = "fits" if needed <= room else "does not fit"
    less = "" if needed <= room else ": use fewer or shorter samples, --batch-size 1, or --statistics-device cpu"
    return f"A process takes about {decimal(needed)}, which {verdict} into {decimal(room)}{less}."
