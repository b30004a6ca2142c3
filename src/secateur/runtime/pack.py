"""`pack`: from a pruned checkpoint to a smaller one, tensor by tensor."""

import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import secateur
from secateur.errors import CheckpointError
from secateur.files.bitmask import count_kept, mask_shape, pack_bits
from secateur.files.checkpoint import CARD_FILE, DTYPE_NAMES, PACKED_FILE, PACKED_INDEX, Checkpoint
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
from secateur.record.manifest import FILE_NAME, Manifest, file_digests, read_manifest, tensor_digest
from secateur.runs.options import taking
from secateur.runs.output import check_output
from secateur.runs.transaction import Transaction
from secateur.runtime.settings import PackSettings

HEADER_BYTES = 256  # what another tensor takes in the header of a shard and in sparse_config.json, about


@dataclass(frozen=True)
class Packing:
    """The result of `pack`: bytes before and after, of the packed matrices and of all tensors, and what stayed dense.

    `dense` maps tensors that might have been packed to the reason why they were not. `output` is None after a dry run.
    """

    model: str
    output: str | None
    matrices: int
    weights: int
    kept: int
    bytes_before: int
    bytes_after: int
    total_before: int
    total_after: int
    seconds: float
    dense: Mapping[str, str] = field(default_factory=dict)

    @property
    def bits(self) -> float:
        """Bits for each weight of the packed matrices, zeros included."""
        return 8 * self.bytes_after / max(self.weights, 1)

    def to_json(self) -> dict[str, Any]:
        """All fields, and the bits for each weight."""
        return {**asdict(self), "bits": self.bits}


@dataclass(frozen=True)
class _Plan:
    """Which tensors are packed, with the number of their kept values, and why others are not."""

    kept: dict[str, int]
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
    model, progress = os.fspath(settings.model), settings.progress
    target = None if settings.dry_run else check_output(settings.output, model, settings.overwrite)
    folder = locate(model, settings.revision)
    if is_packed(folder):
        raise CheckpointError(f"{folder}: is packed already. secateur unpack makes it plain again.")
    source = Checkpoint(folder)
    manifest = read_manifest(folder) if (folder / FILE_NAME).exists() else None
    plan = _planned(source, settings)
    if not plan.kept:
        raise CheckpointError(
            f"{folder}: no tensor in it would become smaller: none has enough zeros. Is it the pruned checkpoint? "
            f"See what there is with: secateur inspect {folder}"
        )
    if target is not None:
        with Transaction(target, settings.overwrite) as transaction:
            _write(source, manifest, plan, transaction.folder, settings)
            progress("rename", 0, 1)
            transaction.commit()
    before = {name: source.tensors[name].bytes for name in plan.kept}
    after = {name: stored_bytes(source.shape(name), source.dtype(name), kept) for name, kept in plan.kept.items()}
    total = sum(record.bytes for record in source.tensors.values())
    return Packing(
        model=model,
        output=None if target is None else os.fspath(settings.output or ""),
        matrices=len(plan.kept),
        weights=sum(math.prod(source.shape(name)) for name in plan.kept),
        kept=sum(plan.kept.values()),
        bytes_before=sum(before.values()),
        bytes_after=sum(after.values()),
        total_before=total,
        total_after=total - sum(before.values()) + sum(after.values()),
        seconds=time.perf_counter() - started,
        dense=plan.dense,
    )


def _planned(source: Checkpoint, settings: PackSettings) -> _Plan:
    """What is packed: every tensor of several dimensions that becomes smaller."""
    kept, dense = {}, {}
    names = [name for name in source.names if len(source.shape(name)) > 1]
    taken = set(source.names)
    for number, name in enumerate(names):
        entries = math.prod(source.shape(name))
        count = sum(count_kept(part) for part in source.parts(name))
        size = stored_bytes(source.shape(name), source.dtype(name), count) + HEADER_BYTES
        if taken & {f"{stem(name)}.bitmask", f"{stem(name)}.compressed"}:
            dense[name] = "the names of its parts are taken"
        elif size < source.tensors[name].bytes:
            kept[name] = count
            taken |= {f"{stem(name)}.bitmask", f"{stem(name)}.compressed"}
        elif count == entries:
            dense[name] = "no zeros"
        else:
            dense[name] = f"{1 - count / entries:.1%} zeros: it would not shrink"
        settings.progress("count zeros", number + 1, len(names))
    return _Plan(kept, dense)


def _write(source: Checkpoint, manifest: Manifest | None, plan: _Plan, folder: Path, settings: PackSettings) -> None:
    """Write shards, their index, the files beside them, and sparse_config.json."""
    shards = [[name for name, _, _ in tensors] for _, tensors in source.layout()]
    layout = packed_layout([[part for name in names for part in _parts(source, plan, name)] for names in shards])
    copy_files(source.folder, _copied(source.folder), folder)
    writer = CheckpointWriter(folder, layout, index=PACKED_INDEX)
    matrices, dense = {}, {}
    try:
        for number, name in enumerate(source.names):
            if name in plan.kept:
                matrices[name] = asdict(_pack(source, plan, name, writer))
                digest = matrices[name]["sha256"]
            else:
                digest = writer.write_parts(name, source.parts(name))
                dense[name] = asdict(DenseTensor(digest, plan.dense.get(name)))
            if manifest is not None and manifest.tensors.get(name) != digest:
                raise CheckpointError(
                    f"{source.folder}: {name}: its bytes differ from those that were written. The checkpoint was "
                    "changed since; secateur verify tells more."
                )
            settings.progress("pack", number + 1, len(source.names))
        writer.close()
    finally:
        writer.abandon()
    headers = [writer.header_digests[name] for name in packed_shards(len(shards))]
    record = {
        "format": FORMAT,
        "version": VERSION,
        "secateur": secateur.__version__,
        "values": "same",
        "shards": [asdict(PackedShard(digest, names)) for digest, names in zip(headers, shards, strict=True)],
        "matrices": matrices,
        "dense": dense,
        "files": file_digests(folder),
    }
    with writing(folder / PACKED_FILE):
        (folder / PACKED_FILE).write_text(record_text(record), encoding="utf-8")


def _parts(source: Checkpoint, plan: _Plan, name: str) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Name, dtype and shape of what is stored for a tensor."""
    shape, dtype = source.shape(name), source.dtype(name)
    if name not in plan.kept:
        return [(name, dtype, shape)]
    return [
        (f"{stem(name)}.bitmask", torch.uint8, mask_shape(shape)),
        (f"{stem(name)}.compressed", dtype, (plan.kept[name],)),
    ]


def _pack(source: Checkpoint, plan: _Plan, name: str, writer: CheckpointWriter) -> PackedMatrix:
    tensor = source.read([name])[name]
    mask, kept = pack_bits(tensor)
    if len(kept) != plan.kept[name]:
        raise CheckpointError(f"{source.folder}: {name}: changed while it was packed. Let nothing write there.")
    return PackedMatrix(
        dtype=DTYPE_NAMES[tensor.dtype],
        shape=list(tensor.shape),
        kept=len(kept),
        sha256=tensor_digest(tensor),
        stored={
            "bitmask": writer.write(f"{stem(name)}.bitmask", mask),
            "compressed": writer.write(f"{stem(name)}.compressed", kept),
        },
    )


def _copied(folder: Path) -> list[Path]:
    """The files that go with the weights: companions, manifest and model card, as they are."""
    own = [folder / name for name in (FILE_NAME, CARD_FILE) if (folder / name).is_file()]
    return [*companions(folder)[0], *own]
