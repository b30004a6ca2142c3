"""What a run would prune and cost, before it starts: memory, disk and time, from headers and a short measurement."""

import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from secateur.errors import CheckpointError
from secateur.models.flow.memory import available_bytes
from secateur.models.shape.matrices import Matrix
from secateur.models.shape.skeleton import Skeleton
from secateur.plans.plan import Plan
from secateur.pruning.forecast_memory import Memory, memory_of, shortage, source_bytes
from secateur.pruning.forecast_time import run_seconds
from secateur.pruning.named import resolved
from secateur.pruning.preparation import Prepared, output_of, prepared
from secateur.pruning.settings import PruneSettings
from secateur.runs.options import taking
from secateur.runs.transaction import unfinished


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
class Estimate:
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
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """All fields; the plan as one object per matrix."""
        return {**asdict(self), "plan": self.plan.to_json()}


@taking(PruneSettings)
def estimate(settings: PruneSettings) -> Estimate:
    """What `prune` with the same options would do and take, without its work (a GGUF file has to be read).

    Methods and patterns are given as for `prune`: "wanda+swaps", "2:4". Raises the errors that `prune` raises before
    its work starts. With ``calibration=None`` nothing is asked of the text, and `samples` (128) and `length` (2048) say
    how many tokens there will be.
    """
    began = time.perf_counter()
    settings = resolved(settings)
    target = None if settings.output is None else output_of(settings)
    with prepared(settings, dry=True) as ready:
        return _estimate(ready, target, opening=time.perf_counter() - began)


def _estimate(ready: Prepared, target: Path | None, *, opening: float) -> Estimate:
    skeleton, plan, method = ready.opened.skeleton, ready.plan, ready.method
    memory = memory_of(ready)
    free = available_bytes()
    total = source_bytes(skeleton, skeleton.source.names)
    disk = total + memory.cost.file + (ready.packed_bytes or 0)
    notes = [*ready.unchecked, *_memory_notes(ready, memory)]
    if told := shortage(ready, memory):
        notes.append(told)
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
        seconds=opening + run_seconds(ready, math.prod(before.passes for before in memory.cost.before)),
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
