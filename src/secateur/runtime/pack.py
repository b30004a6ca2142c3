"""`pack`: from a pruned checkpoint to a smaller one, tensor by tensor."""

import math
import os
import shlex
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from secateur.errors import CheckpointError, SecateurError
from secateur.files.ahead import ahead
from secateur.files.checkpoint import Checkpoint
from secateur.files.compression import library
from secateur.files.folders import locate
from secateur.files.packed import PackedCheckpoint, Values, open_files, stored_bytes
from secateur.record.manifest import FILE_NAME, read_manifest
from secateur.runs.options import taking
from secateur.runs.output import check_output
from secateur.runs.packing import Plan, packed_parts, plan_packing, write_packed
from secateur.runs.transaction import Transaction
from secateur.runtime.layout import compact
from secateur.runtime.settings import PackSettings


@dataclass(frozen=True)
class Packing:
    """The result of `pack`: bytes before and after, of the packed matrices and of all tensors, and what stayed dense.

    `dense` maps tensors that might have been packed to the reason why they were not, and `same` packed ones to the
    reason why their values are not int8, where that was asked. `errors` are the relative errors of those that are: the
    Frobenius norm of what rounding changed, divided by that of the matrix. `output` is None after a dry run.
    """

    model: str
    output: str | None
    values: Values
    matrices: int
    weights: int
    kept: int
    bytes_before: int
    bytes_after: int
    total_before: int
    total_after: int
    seconds: float
    dense: Mapping[str, str] = field(default_factory=dict)
    same: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def bits(self) -> float:
        """Bits for each weight of the packed matrices, zeros included."""
        return 8 * self.bytes_after / max(self.weights, 1)

    def to_json(self) -> dict[str, Any]:
        """All fields, and the bits for each weight."""
        return {**asdict(self), "bits": self.bits}


@taking(PackSettings)
def pack(settings: PackSettings) -> Packing:
    """Write a checkpoint with its pruned matrices packed; returns how much smaller it is.

    Every tensor of at least two dimensions that becomes smaller is stored as a bit for each entry and the entries that
    are not zero, in the bytes that they have: `unpack` gives back every byte. The others stay as they are. Tensors are
    read twice, a few at a time: first counted, then packed. What is packed already stays as it is, and can be rounded
    or compressed further.

    Raises `CheckpointError` for what is no plain checkpoint, and for one that is not what its manifest says.
    """
    started = time.perf_counter()
    model = os.fspath(settings.model)
    target = None if settings.dry_run else check_output(settings.output, model, settings.overwrite)
    if settings.compress:
        library()  # what is missing is said before the work
        if settings.dry_run:
            raise SecateurError(
                "--compress: how small it makes a checkpoint is known only when it is done; no --dry-run."
            )
    folder = locate(model, settings.revision)
    source = open_files(folder)
    if isinstance(source, PackedCheckpoint) and settings.values == "same" and settings.compress == source.compressed:
        raise CheckpointError(
            f"{folder}: is packed already. secateur unpack makes it plain again; --values int8 and --compress make it "
            "smaller."
        )
    manifest = read_manifest(folder) if (folder / FILE_NAME).exists() else None
    plan = plan_packing(source, settings.values, settings.tell)
    if not plan.packed:
        raise CheckpointError(
            f"{folder}: no tensor in it would become smaller: none has enough zeros. Is it the pruned checkpoint? "
            f"See what there is with: secateur inspect {shlex.quote(str(folder))}"
        )
    before = {name: source.tensors[name].bytes for name in plan.packed}
    after = {
        name: stored_bytes(source.shape(name), source.dtype(name), how.kept, how.values)
        for name, how in plan.packed.items()
    }
    total = sum(record.bytes for record in source.tensors.values())
    bytes_after = sum(after.values())
    total_after = total - sum(before.values()) + bytes_after
    if target is None:
        errors = _errors(source, plan)
    else:
        with Transaction(target, settings.overwrite) as transaction:
            written = write_packed(
                source,
                manifest,
                plan,
                transaction.folder,
                target.name,
                values=settings.values,
                compressed=settings.compress,
                progress=settings.tell,
                pack=compact,
            )
            transaction.commit()
        errors = {name: matrix.error for name, matrix in written.matrices.items() if matrix.error is not None}
        bytes_after, total_after = written.matrix_bytes, written.total_bytes
    return Packing(
        model=model,
        output=None if target is None else os.fspath(settings.output or ""),
        values=settings.values,
        matrices=len(plan.packed),
        weights=sum(math.prod(source.shape(name)) for name in plan.packed),
        kept=sum(how.kept for how in plan.packed.values()),
        bytes_before=sum(before.values()),
        bytes_after=bytes_after,
        total_before=total,
        total_after=total_after,
        seconds=time.perf_counter() - started,
        dense=plan.dense,
        same={name: how.refusal for name, how in plan.packed.items() if how.refusal is not None},
        errors=errors,
    )


def _errors(source: Checkpoint, plan: Plan) -> dict[str, float]:
    """What rounding would change, by tensor, where nothing is written."""
    names = [name for name, how in plan.packed.items() if how.values == "int8"]
    found = ahead(lambda name: packed_parts(source, name, plan.packed[name], compact).matrix.error, names)
    return {name: error for name, error in zip(names, found, strict=True) if error is not None}
