"""`pack`: from a pruned checkpoint to a smaller one, tensor by tensor."""

import math
import os
import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import secateur
from secateur.errors import CheckpointError
from secateur.files.bitmask import count_kept, mask_shape, pack_bits
from secateur.files.checkpoint import CARD_FILE, DTYPE_NAMES, PACKED_FILE, PACKED_INDEX, Checkpoint
from secateur.files.codes import DTYPES as CODED
from secateur.files.codes import codes_of, relative_error, values_of
from secateur.files.folders import companions, copy_files, locate
from secateur.files.packed import (
    FORMAT,
    VERSION,
    DenseTensor,
    PackedMatrix,
    PackedShard,
    is_packed,
    packed_layout,
    packed_shards,
    record_text,
    stem,
    stored_bytes,
)
from secateur.files.writer import CheckpointWriter, writing
from secateur.record.manifest import (
    FILE_NAME,
    Manifest,
    file_digests,
    mask_digest,
    read_manifest,
    tensor_digest,
    view_of,
)
from secateur.record.versions import run_facts
from secateur.runs.options import taking
from secateur.runs.output import check_output
from secateur.runs.transaction import Transaction
from secateur.runtime.settings import PackSettings, Values

HEADER_BYTES = 256  # what another tensor takes in the header of a shard and in sparse_config.json, about


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


@dataclass(frozen=True)
class _Planned:
    """How a tensor will be packed: how many values are kept, in which form, and why not as int8, if that was asked."""

    kept: int
    values: Values
    error: float | None = None
    refusal: str | None = None


@dataclass(frozen=True)
class _Plan:
    """Which tensors are packed and how, and why others are not."""

    packed: dict[str, _Planned]
    dense: dict[str, str]


@taking(PackSettings)
def pack(settings: PackSettings) -> Packing:
    """Write a checkpoint with its pruned matrices packed; returns how much smaller it is.

    Every tensor of at least two dimensions that becomes smaller is stored as a bit for each entry and the entries that
    are not zero, in the bytes that they have: `unpack` gives back every byte. The others stay as they are. Tensors are
    read twice, one at a time: first counted, then packed.

    Raises `CheckpointError` for what is no plain checkpoint, and for one that is not what its manifest says.
    """
    started = time.perf_counter()
    model = os.fspath(settings.model)
    target = None if settings.dry_run else check_output(settings.output, model, settings.overwrite)
    folder = locate(model, settings.revision)
    if is_packed(folder):
        raise CheckpointError(f"{folder}: is packed already. secateur unpack makes it plain again.")
    source = Checkpoint(folder)
    manifest = read_manifest(folder) if (folder / FILE_NAME).exists() else None
    plan = _planned(source, settings)
    if not plan.packed:
        raise CheckpointError(
            f"{folder}: no tensor in it would become smaller: none has enough zeros. Is it the pruned checkpoint? "
            f"See what there is with: secateur inspect {folder}"
        )
    if target is not None:
        with Transaction(target, settings.overwrite) as transaction:
            _write(source, manifest, plan, transaction.folder, settings)
            transaction.commit()
    before = {name: source.tensors[name].bytes for name in plan.packed}
    after = {
        name: stored_bytes(source.shape(name), source.dtype(name), how.kept, how.values)
        for name, how in plan.packed.items()
    }
    total = sum(record.bytes for record in source.tensors.values())
    return Packing(
        model=model,
        output=None if target is None else os.fspath(settings.output or ""),
        values=settings.values,
        matrices=len(plan.packed),
        weights=sum(math.prod(source.shape(name)) for name in plan.packed),
        kept=sum(how.kept for how in plan.packed.values()),
        bytes_before=sum(before.values()),
        bytes_after=sum(after.values()),
        total_before=total,
        total_after=total - sum(before.values()) + sum(after.values()),
        seconds=time.perf_counter() - started,
        dense=plan.dense,
        same={name: how.refusal for name, how in plan.packed.items() if how.refusal is not None},
        errors={name: how.error for name, how in plan.packed.items() if how.error is not None},
    )


def _planned(source: Checkpoint, settings: PackSettings) -> _Plan:
    """What is packed: every tensor of several dimensions that becomes smaller."""
    packed, dense = {}, {}
    names = [name for name in source.names if len(source.shape(name)) > 1]
    taken = set(source.names)
    for number, name in enumerate(names):
        entries = math.prod(source.shape(name))
        kept = sum(count_kept(part) for part in source.parts(name))
        size = stored_bytes(source.shape(name), source.dtype(name), kept) + HEADER_BYTES
        parts = {f"{stem(name)}.{part}" for part in ("bitmask", "compressed", "scales")}
        if taken & parts:
            dense[name] = "the names of its parts are taken"
        elif size < source.tensors[name].bytes:  # as it is: what has few zeros is not rounded either
            packed[name] = _coded(source, name, kept) if settings.values == "int8" else _Planned(kept, "same")
            taken |= parts
        elif kept == entries:
            dense[name] = "no zeros"
        else:
            dense[name] = f"{1 - kept / entries:.1%} zeros: it would not shrink"
        settings.progress("count zeros", number + 1, len(names))
    return _Plan(packed, dense)


def _coded(source: Checkpoint, name: str, kept: int) -> _Planned:
    """A tensor with int8 values: how many are kept, and what is lost; or as it is, and why."""
    if source.dtype(name) not in CODED:
        return _Planned(kept, "same", refusal=f"it is {str(source.dtype(name)).removeprefix('torch.')}")
    tensor = source.read([name])[name]
    try:
        codes, scales = codes_of(tensor)
    except ValueError as error:
        return _Planned(kept, "same", refusal=str(error))
    lost = relative_error(tensor, values_of(codes, scales, torch.empty_like(tensor)))
    return _Planned(count_kept(codes), "int8", lost)


def _write(source: Checkpoint, manifest: Manifest | None, plan: _Plan, folder: Path, settings: PackSettings) -> None:
    """Write shards, their index, the files beside them, and sparse_config.json."""
    shards = [[name for name, _, _ in tensors] for _, tensors in source.layout()]
    layout = packed_layout([[part for name in names for part in _parts(source, plan, name)] for names in shards])
    copy_files(source.folder, _copied(source.folder), folder)
    writer = CheckpointWriter(folder, layout, index=PACKED_INDEX)
    matrices: dict[str, PackedMatrix] = {}
    dense: dict[str, DenseTensor] = {}
    try:
        for number, name in enumerate(source.names):
            how = plan.packed.get(name)
            if how is not None:
                tensor = source.read([name])[name]
                matrices[name] = _pack(source, tensor, name, how, writer)
                digest = matrices[name].sha256 if how.values == "same" else tensor_digest(tensor)
            else:
                digest = writer.write_parts(name, source.parts(name))
                dense[name] = DenseTensor(digest, plan.dense.get(name))
            if manifest is not None and manifest.tensors.get(name) != digest:
                raise CheckpointError(
                    f"{source.folder}: {name}: its bytes differ from those that were written. The checkpoint was "
                    "changed since; secateur verify tells more."
                )
            settings.progress("pack", number + 1, len(source.names))
        writer.close()
    finally:
        writer.abandon()
    if manifest is not None and any(matrix.values == "int8" for matrix in matrices.values()):
        _rounded(manifest, matrices, source).write(folder)
    headers = [writer.header_digests[name] for name in packed_shards(len(shards))]
    record = {
        "format": FORMAT,
        "version": VERSION,
        "secateur": secateur.__version__,
        "values": settings.values,
        "shards": [asdict(PackedShard(digest, names)) for digest, names in zip(headers, shards, strict=True)],
        "matrices": {name: asdict(matrix) for name, matrix in matrices.items()},
        "dense": {name: asdict(tensor) for name, tensor in dense.items()},
        "files": file_digests(folder),
    }
    with writing(folder / PACKED_FILE):
        (folder / PACKED_FILE).write_text(record_text(record), encoding="utf-8")


def _parts(source: Checkpoint, plan: _Plan, name: str) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Name, dtype and shape of what is stored for a tensor."""
    shape, dtype, how = source.shape(name), source.dtype(name), plan.packed.get(name)
    if how is None:
        return [(name, dtype, shape)]
    parts = [
        (f"{stem(name)}.bitmask", torch.uint8, mask_shape(shape)),
        (f"{stem(name)}.compressed", dtype if how.values == "same" else torch.int8, (how.kept,)),
    ]
    return parts if how.values == "same" else [*parts, (f"{stem(name)}.scales", torch.float32, shape[:-1])]


def _pack(source: Checkpoint, tensor: Tensor, name: str, how: _Planned, writer: CheckpointWriter) -> PackedMatrix:
    """What sparse_config.json says of a tensor whose parts were written."""
    parts: dict[str, Tensor] = {}
    stands_for = tensor
    if how.values == "int8":
        codes, parts["scales"] = codes_of(tensor)
        parts["bitmask"], parts["compressed"] = pack_bits(codes)
        stands_for = values_of(codes, parts["scales"], torch.empty_like(tensor))
    else:
        parts["bitmask"], parts["compressed"] = pack_bits(tensor)
    if len(parts["compressed"]) != how.kept:
        raise CheckpointError(f"{source.folder}: {name}: changed while it was packed. Let nothing write there.")
    return PackedMatrix(
        dtype=DTYPE_NAMES[tensor.dtype],
        shape=list(tensor.shape),
        kept=how.kept,
        sha256=tensor_digest(stands_for),
        stored={part: writer.write(f"{stem(name)}.{part}", value) for part, value in parts.items()},
        values=how.values,
        error=how.error,
    )


def _rounded(manifest: Manifest, record: Mapping[str, PackedMatrix], source: Checkpoint) -> Manifest:
    """The manifest of what a packed checkpoint with int8 values stands for: the masks of before, and other values."""
    new = deepcopy(manifest)
    rounded = {name: matrix.sha256 for name, matrix in record.items() if matrix.values == "int8"}
    masks: dict[str, str] = {}
    for name, entry in new.matrices.items():
        if entry["tensor"] in rounded:
            masks[name] = mask_digest(view_of(source.read([entry["tensor"]])[entry["tensor"]], entry) != 0)
            entry["kept_identical"] = False
    zeros = sum(entry["zeros"] for entry in manifest.matrices.values())
    new.recovery = {
        "method": "int8",
        "base": {"path": str(source.folder.resolve()), "digest": manifest.digest},
        "zeros_before": zeros,
        "zeros": zeros,
        "nudged": 0,
        "trained": {name: manifest.tensors[name] for name in rounded},
        "masks": masks,
        "unmasked": {},
        "earlier": manifest.recovery,
        **run_facts(None),
    }
    new.tensors = manifest.tensors | rounded
    return new


def _copied(folder: Path) -> list[Path]:
    """The files that go with the weights: companions, manifest and model card, as they are."""
    own = [folder / name for name in (FILE_NAME, CARD_FILE) if (folder / name).is_file()]
    return [*companions(folder)[0], *own]
