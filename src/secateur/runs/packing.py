"""A packed checkpoint in the making: which tensors of a plain one are packed and how, and the files that hold them."""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import secateur
from secateur.errors import CheckpointError
from secateur.files.ahead import ahead
from secateur.files.bitmask import count_kept, mask_shape, pack_bits
from secateur.files.checkpoint import CARD_FILE, DTYPE_NAMES, PACKED_FILE, PACKED_INDEX, Checkpoint, tensor_digest
from secateur.files.codes import DTYPES as CODED
from secateur.files.codes import codes_of, count_coded, relative_error, values_of
from secateur.files.compressed_writer import CompressedWriter
from secateur.files.compression import compress
from secateur.files.folders import companions, copy_files
from secateur.files.packed import (
    FORMAT,
    DenseTensor,
    PackedCheckpoint,
    PackedMatrix,
    PackedShard,
    Values,
    packed_layout,
    packed_shards,
    record_text,
    stem,
    stored_bytes,
    version_of,
)
from secateur.files.writer import CheckpointWriter, writing
from secateur.models.shape.skeleton import Source
from secateur.record.card import tell_use
from secateur.record.manifest import FILE_NAME, Manifest, file_digests, mask_digest, view_of
from secateur.record.versions import run_facts
from secateur.runs.events import Progress

HEADER_BYTES = 256  # what another tensor takes in the header of a shard and in sparse_config.json, about


@dataclass(frozen=True)
class Planned:
    """How a tensor will be packed: how many values are kept, in which form, and why not as int8, if that was asked."""

    kept: int
    values: Values
    refusal: str | None = None


@dataclass(frozen=True)
class Plan:
    """Which tensors are packed and how, and why others are not."""

    packed: dict[str, Planned]
    dense: dict[str, str]


@dataclass(frozen=True)
class Parts:
    """The parts of a packed tensor, their digests, and what sparse_config.json says of it."""

    tensors: Mapping[str, Tensor]
    matrix: PackedMatrix
    plain: str  # digest of the tensor as it was


def would_shrink(shape: Sequence[int], dtype: torch.dtype, kept: int) -> bool:
    """Whether a tensor becomes smaller when it is packed."""
    return stored_bytes(shape, dtype, kept) + HEADER_BYTES < math.prod(shape) * dtype.itemsize


def expected_bytes(source: Source, zeros: Mapping[str, int]) -> tuple[int, int]:
    """How many tensors will be packed, and the bytes of all tensors then, where some have so many zeros."""
    packed = total = 0
    for name in source.names:
        shape, dtype = source.shape(name), source.dtype(name)
        entries = math.prod(shape)
        kept = entries - zeros.get(name, 0)
        shrinks = len(shape) > 1 and would_shrink(shape, dtype, kept)
        packed += shrinks
        total += stored_bytes(shape, dtype, kept) if shrinks else entries * dtype.itemsize
    return packed, total


def plan_packing(source: Checkpoint, values: Values, progress: Progress) -> Plan:
    """What is packed: every tensor of several dimensions that becomes smaller. Each is read once for it."""
    names = [name for name in source.names if len(source.shape(name)) > 1]
    count = partial(_counted, source, values)
    packed: dict[str, Planned] = {}
    dense: dict[str, str] = {}
    taken = set(source.names)
    for number, (name, found) in enumerate(zip(names, ahead(count, names), strict=True)):
        parts = {f"{stem(name)}.{part}" for part in ("bitmask", "compressed", "scales")}
        if taken & parts:
            dense[name] = "the names of its parts are taken"
        elif isinstance(found, Planned):
            packed[name] = found
            taken |= parts
        else:
            dense[name] = found
        progress("count zeros", number + 1, len(names))
    return Plan(packed, dense)


def _counted(source: Checkpoint, values: Values, name: str) -> Planned | str:
    """How a tensor is packed, or why it is not."""
    already = source.record.matrices.get(name) if isinstance(source, PackedCheckpoint) else None
    if already is not None and already.values == "int8":  # what was rounded stays as it was rounded
        return Planned(already.kept, "int8")
    kept = already.kept if already is not None else sum(count_kept(part) for part in source.parts(name))
    entries = math.prod(source.shape(name))
    if not would_shrink(source.shape(name), source.dtype(name), kept):
        return "no zeros" if kept == entries else f"{1 - kept / entries:.1%} zeros: it would not shrink"
    if values == "same":  # and what has few zeros is not rounded either
        return Planned(kept, "same")
    if source.dtype(name) not in CODED:
        return Planned(kept, "same", refusal=f"it is {str(source.dtype(name)).removeprefix('torch.')}")
    try:
        return Planned(sum(map(count_coded, source.parts(name))), "int8")
    except ValueError as error:
        return Planned(kept, "same", refusal=str(error))


def pack_counted(tensor: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """The mask and the kept entries of a tensor, of which there are `kept`. Raises ValueError for another number."""
    mask, values = pack_bits(tensor)
    if len(values) != kept:
        raise ValueError(f"{len(values)} entries that are not zero, and {kept} when they were counted")
    return mask, values


Pack = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def packed_parts(source: Checkpoint, name: str, how: Planned, pack: Pack = pack_counted) -> Parts:
    """A tensor packed as planned, by `pack_counted` or by what does the same faster."""
    already = source.record.matrices.get(name) if isinstance(source, PackedCheckpoint) else None
    parts: dict[str, Tensor] = {}
    if isinstance(source, PackedCheckpoint) and already is not None and already.values == how.values:
        packed = source.read_packed(name)
        parts = {"bitmask": packed.mask, "compressed": packed.kept}
        if packed.scales is not None:
            parts["scales"] = packed.scales
        dtype, error, stands_for = packed.dtype, already.error, packed.dense()
        plain = digest = tensor_digest(stands_for)
    else:
        tensor = source.read([name])[name]
        dtype, error, plain = tensor.dtype, None, tensor_digest(tensor)
        if how.values == "int8":
            codes, parts["scales"] = codes_of(tensor)
            parts["bitmask"], parts["compressed"] = _packed(source, name, codes, how, pack)
            stands_for = values_of(codes, parts["scales"], torch.empty_like(tensor))
            error, digest = relative_error(tensor, stands_for), tensor_digest(stands_for)
        else:
            parts["bitmask"], parts["compressed"] = _packed(source, name, tensor, how, pack)
            digest = plain
    matrix = PackedMatrix(
        dtype=DTYPE_NAMES[dtype],
        shape=list(source.shape(name)),
        kept=how.kept,
        sha256=digest,
        stored={part: tensor_digest(value) for part, value in parts.items()},
        values=how.values,
        error=error,
    )
    return Parts(parts, matrix, plain)


def _packed(source: Checkpoint, name: str, tensor: Tensor, how: Planned, pack: Pack) -> tuple[Tensor, Tensor]:
    try:
        return pack(tensor, how.kept)
    except ValueError as error:
        raise CheckpointError(
            f"{source.folder}: {name}: changed while it was packed: {error}. Let nothing write there."
        ) from None


@dataclass(frozen=True)
class Written:
    """What its sparse_config.json says of the tensors that are packed, and their bytes in the files, and all bytes."""

    matrices: Mapping[str, PackedMatrix]
    matrix_bytes: int
    total_bytes: int


def write_packed(
    source: Checkpoint,
    manifest: Manifest | None,
    plan: Plan,
    folder: Path,
    title: str,
    *,
    values: Values = "same",
    compressed: bool = False,
    progress: Progress,
    pack: Pack = pack_counted,
) -> Written:
    """Write shards, their index, the files beside them, and sparse_config.json, for a checkpoint called `title`.

    Raises `CheckpointError` for a tensor that is not what its manifest says.
    """
    shards = [[name for name, _, _ in tensors] for _, tensors in source.layout()]
    layout = packed_layout([[part for name in names for part in _layout_of(source, plan, name)] for names in shards])
    own = [source.folder / file for file in (FILE_NAME, CARD_FILE) if (source.folder / file).is_file()]
    copy_files(source.folder, [*companions(source.folder)[0], *own], folder)
    writer = (CompressedWriter if compressed else CheckpointWriter)(folder, layout, index=PACKED_INDEX)
    matrices: dict[str, PackedMatrix] = {}
    dense: dict[str, DenseTensor] = {}
    matrix_bytes = 0

    def prepare(name: str) -> tuple[Parts, Mapping[str, Any]] | None:
        """In a thread: what is packed; dense tensors are read, hashed and written part by part."""
        how = plan.packed.get(name)
        if how is None:
            return None
        parts = packed_parts(source, name, how, pack)
        return parts, {part: compress(tensor) for part, tensor in parts.tensors.items()} if compressed else {}

    try:
        for number, (name, found) in enumerate(zip(source.names, ahead(prepare, source.names), strict=True)):
            if found is None:
                digest = writer.write_parts(name, source.parts(name))
                dense[name] = DenseTensor(digest, plan.dense.get(name))
            else:
                parts, bytes_of = found
                matrices[name], digest = parts.matrix, parts.plain
                for part, tensor in parts.tensors.items():
                    full = f"{stem(name)}.{part}"
                    if isinstance(writer, CompressedWriter):
                        writer.write_compressed(full, *bytes_of[part])
                        matrix_bytes += len(bytes_of[part][0])
                    else:
                        writer.write(full, tensor, parts.matrix.stored[part])
                        matrix_bytes += tensor.nbytes
            if manifest is not None and manifest.tensors.get(name) != digest:
                raise CheckpointError(
                    f"{source.folder}: {name}: its bytes differ from those that were written. The checkpoint was "
                    "changed since; secateur verify tells more."
                )
            progress("pack", number + 1, len(source.names))
        writer.close()
    finally:
        writer.abandon()
    if manifest is not None:
        rounded = {name: matrix.sha256 for name, matrix in matrices.items() if manifest.tensors[name] != matrix.sha256}
        if rounded:
            _rounded(manifest, rounded, source).write(folder)
    tell_use(folder, packed=True, name=title)
    streams = writer.compressed if isinstance(writer, CompressedWriter) else {}
    headers = [writer.header_digests[name] for name in packed_shards(len(shards))]
    record = {
        "format": FORMAT,
        "version": version_of(streams),
        "secateur": secateur.__version__,
        "values": "int8" if any(matrix.values == "int8" for matrix in matrices.values()) else values,
        "shards": [asdict(PackedShard(digest, names)) for digest, names in zip(headers, shards, strict=True)],
        "matrices": {name: asdict(matrix) for name, matrix in matrices.items()},
        "dense": {name: asdict(tensor) for name, tensor in dense.items()},
        "files": file_digests(folder),
    }
    if streams:
        record["compressed"] = {name: asdict(stream) for name, stream in streams.items()}
    with writing(folder / PACKED_FILE):
        (folder / PACKED_FILE).write_text(record_text(record), encoding="utf-8")
    return Written(matrices, matrix_bytes, writer.total_bytes)


def _layout_of(source: Checkpoint, plan: Plan, name: str) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Name, dtype and shape of what is stored for a tensor."""
    shape, dtype, how = source.shape(name), source.dtype(name), plan.packed.get(name)
    if how is None:
        return [(name, dtype, shape)]
    parts = [
        (f"{stem(name)}.bitmask", torch.uint8, mask_shape(shape)),
        (f"{stem(name)}.compressed", dtype if how.values == "same" else torch.int8, (how.kept,)),
    ]
    return parts if how.values == "same" else [*parts, (f"{stem(name)}.scales", torch.float32, shape[:-1])]


def _rounded(manifest: Manifest, rounded: dict[str, str], source: Checkpoint) -> Manifest:
    """The manifest of what a packed checkpoint with int8 values stands for: the masks of before, and other values.

    `rounded` are the digests of the rounded tensors.
    """
    new = deepcopy(manifest)
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
