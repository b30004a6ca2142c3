"""Packed checkpoints: pruned matrices as a mask and the values that are kept, every other tensor as it was.

The tensors of a folder lie in `sparse-00001-of-0000N.safetensors`, one shard for each of the plain checkpoint, and
`sparse_config.json` says what they stand for. No loader of plain checkpoints knows these names, so none can take a
packed checkpoint for a plain one and fill its matrices with noise.
"""

import json
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from msgspec import Meta
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.files.bitmask import check_mask, expand, mask_shape
from secateur.files.checkpoint import (
    DIMENSIONS,
    DTYPES,
    INDEX_FILE,
    PACKED_FILE,
    PACKED_INDEX,
    SINGLE_FILE,
    Checkpoint,
    Layout,
    TensorRecord,
    read_tensor,
    shard_names,
)
from secateur.files.codes import DTYPES as CODED
from secateur.files.codes import values_of
from secateur.files.compression import ADVICE, Compressed, chunks
from secateur.files.compression import check as check_compressed
from secateur.files.reading import check_inside, checked, digest_of, parse_json, read_text

FORMAT = "secateur-bitmask"
VERSION, COMPRESSED_VERSION = 1, 2  # without compressed tensors, which readers of the first would not know, and with
Values = Literal["same", "int8"]

Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
_Size = Annotated[int, Meta(ge=0, lt=1 << 60)]


@dataclass(frozen=True)
class PackedMatrix:
    """What `sparse_config.json` says of a packed tensor: what it is when it is plain, and its parts.

    `kept` counts its values. `sha256` is the digest of the bytes that it stands for, `stored` those of its parts by the
    last part of their names. With int8 values, `error` is the Frobenius norm of what rounding changed, divided by that
    of the matrix, and `sha256` the digest of what the codes and scales stand for.
    """

    dtype: str
    shape: Annotated[list[_Size], Meta(min_length=2, max_length=DIMENSIONS)]
    kept: _Size
    sha256: Digest
    stored: dict[str, Digest]
    values: Values = "same"
    error: float | None = None


@dataclass(frozen=True)
class DenseTensor:
    """What `sparse_config.json` says of a tensor that is stored as it was; `reason` why, where it might have shrunk."""

    sha256: Digest
    reason: str | None = None


@dataclass(frozen=True)
class PackedShard:
    """The names of the plain tensors that a shard stands for, in order, and the sha256 of its header."""

    header: Digest
    tensors: list[str]


@dataclass(frozen=True)
class PackedRecord:
    """What `sparse_config.json` holds, besides its digest. `files` are the sha256 of the files beside the shards.

    `compressed` describes the stored tensors, by their names in the shards, that are compressed: all or none.
    """

    format: str
    version: int
    secateur: str
    values: Values
    shards: list[PackedShard]
    matrices: dict[str, PackedMatrix]
    dense: dict[str, DenseTensor]
    files: dict[str, Digest] = field(default_factory=dict)
    compressed: dict[str, Compressed] = field(default_factory=dict)
    digest: str = ""


@dataclass(frozen=True)
class PackedTensor:
    """A packed tensor in memory: mask (uint8), kept values (flat), and the shape and dtype of what they stand for.

    With `scales` (float32, one for each row), the values are int8 codes.
    """

    mask: Tensor
    kept: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    scales: Tensor | None = None

    def dense(self, out: Tensor | None = None) -> Tensor:
        """The plain tensor, in `out` where that is given."""
        if self.scales is None:
            return expand(self.mask, self.kept, self.shape, out)
        out = torch.empty(self.shape, dtype=self.dtype) if out is None else out
        return values_of(expand(self.mask, self.kept, self.shape), self.scales, out)


def stem(name: str) -> str:
    """What the names of the parts of a packed tensor begin with."""
    return name.removesuffix(".weight")


def packed_shards(count: int) -> list[str]:
    """The file names of `count` shards of a packed checkpoint."""
    return [f"sparse-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def is_packed(folder: Path) -> bool:
    """Whether a folder holds a packed checkpoint. Raises `CheckpointError` where it holds a plain one as well."""
    if not (folder / PACKED_FILE).exists():
        return False
    for name in (SINGLE_FILE, INDEX_FILE):
        if (folder / name).exists():
            raise CheckpointError(
                f"{folder}: holds {name} of a plain checkpoint and {PACKED_FILE} of a packed one. Which of them is "
                "meant? Move one of the two elsewhere."
            )
    return True


def open_files(folder: Path) -> Checkpoint:
    """The weights of a folder, plain or packed, under their plain names."""
    return PackedCheckpoint(folder) if is_packed(folder) else Checkpoint(folder)


class ReadRoom(threading.local):
    """Memory that each thread reads into again and again: the system has to clear fresh pages, which takes longer."""

    def __init__(self) -> None:
        self._parts: dict[str, Tensor] = {}

    def of(self, part: str, size: int) -> Tensor:
        """Bytes for a part of a tensor."""
        if part not in self._parts or len(self._parts[part]) < size:
            self._parts[part] = torch.empty(size, dtype=torch.uint8)
        return self._parts[part]


class PackedCheckpoint(Checkpoint):
    """A packed checkpoint seen as the plain one: each tensor is expanded when it is read.

    `tensors` are the plain ones, in the order of the plain checkpoint; of a packed one, the record says what it is when
    it is plain, in bytes from 0. `stored` is where the tensors in the files lie, and `record` is `sparse_config.json`.
    """

    def __init__(self, folder: Path) -> None:
        self.record = read_record(folder)
        files = [folder / name for name in packed_shards(len(self.record.shards))]
        for file in files:
            if not file.exists():
                raise CheckpointError(
                    f"{file}: the shard is missing; {PACKED_FILE} lists {len(files)}. Download the checkpoint again."
                )
        super().__init__(folder, files)
        self.stored = self.tensors | {name: self._compressed(name) for name in self.record.compressed}
        self.tensors = {name: self._plain(name) for shard in self.record.shards for name in shard.tensors}
        self._check_names()

    def _compressed(self, name: str) -> TensorRecord:
        """Where a compressed tensor lies, with the dtype and shape that it has when it is decompressed."""
        where, how, found = f"{self.folder}/{PACKED_FILE}: {name}", self.record.compressed[name], self.tensors.get(name)
        if found is None or found.dtype != "U8" or len(found.shape) != 1:
            raise CheckpointError(f"{where}: described as compressed, and not stored as bytes. {ADVICE}")
        check_compressed(how, found.bytes, where)
        return TensorRecord(found.file, how.dtype, tuple(how.shape), found.start, found.end)

    def _plain(self, name: str) -> TensorRecord:
        """The record of a plain tensor. Raises `CheckpointError` where its parts are not what they should be."""
        where = f"{self.folder}/{PACKED_FILE}: {name}"
        matrix = self.record.matrices.get(name)
        if matrix is None:
            if name not in self.record.dense or name not in self.stored:
                raise CheckpointError(f"{where}: the tensor is listed, and not described or not stored. {ADVICE}")
            stored = self.stored[name]
            size = math.prod(stored.shape) * DTYPES[stored.dtype].itemsize
            return TensorRecord(stored.file, stored.dtype, stored.shape, 0, size) if self.compressed else stored
        if matrix.dtype not in DTYPES:
            raise CheckpointError(f"{where}: has the unknown dtype {matrix.dtype}; known are {', '.join(DTYPES)}.")
        if math.prod(max(1, side) for side in matrix.shape) >= 1 << 60:
            raise CheckpointError(f"{where}: has more numbers than there can be, {matrix.shape}.")
        for part, (dtype, shape) in self._expected(matrix).items():
            record = self.stored.get(f"{stem(name)}.{part}")
            found = "nothing" if record is None else f"{record.dtype} {list(record.shape)}"
            if found != f"{dtype} {list(shape)}":
                raise CheckpointError(
                    f"{where}: {stem(name)}.{part} is {found} in the shards, expected {dtype} {list(shape)} for a "
                    f"tensor of shape {matrix.shape} with {matrix.kept:,} kept values. {ADVICE}"
                )
        file = self.stored[f"{stem(name)}.bitmask"].file
        size = math.prod(matrix.shape) * DTYPES[matrix.dtype].itemsize
        return TensorRecord(file, matrix.dtype, tuple(matrix.shape), 0, size)

    def _expected(self, matrix: PackedMatrix) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of each part of a packed tensor."""
        int8 = matrix.values == "int8"
        parts = {
            "bitmask": ("U8", mask_shape(matrix.shape)),
            "compressed": ("I8" if int8 else matrix.dtype, (matrix.kept,)),
        }
        return parts | ({"scales": ("F32", tuple(matrix.shape[:-1]))} if int8 else {})

    def _check_names(self) -> None:
        """Raise `CheckpointError` for a tensor in the shards that stands for nothing, or in two places."""
        listed = [name for shard in self.record.shards for name in shard.tensors]
        described = [*self.record.matrices, *self.record.dense]
        if len(set(listed)) < len(listed) or sorted(listed) != sorted(described):
            raise CheckpointError(
                f"{self.folder}/{PACKED_FILE}: the tensors of its shards are not those that it describes. {ADVICE}"
            )
        owned = {f"{stem(name)}.{part}" for name, matrix in self.record.matrices.items() for part in matrix.stored}
        for name in sorted(owned.union(self.record.dense) ^ set(self.stored)):
            where = "the shards hold it" if name in self.stored else "it is described"
            raise CheckpointError(f"{self.folder}/{PACKED_FILE}: {name}: {where}, and nothing else knows it. {ADVICE}")
        if self.compressed and (left := sorted(set(self.stored) - set(self.record.compressed))):
            raise CheckpointError(
                f"{self.folder}/{PACKED_FILE}: {left[0]}: is not described as compressed, as others are. {ADVICE}"
            )

    @property
    def compressed(self) -> bool:
        """Whether the stored tensors are compressed."""
        return bool(self.record.compressed)

    def read_stored(self, name: str, room: ReadRoom | None = None) -> Tensor:
        """A tensor of the shards by its name in them: decompressed, or, where it is not compressed, in `room`."""
        record = self.stored[name]
        if not self.compressed:
            return read_tensor(record, into=None if room is None else room.of(name.rpartition(".")[2], record.bytes))
        out, done = torch.empty(record.shape, dtype=DTYPES[record.dtype]), 0
        data = out.view(-1).view(torch.uint8)
        for chunk in self._chunks(name):
            data[done : done + len(chunk)] = chunk
            done += len(chunk)
        return out

    def read_bytes(self, name: str, start: int = 0, end: int | None = None) -> Tensor:
        """Bytes of a stored tensor, compressed or not, as they lie in the shard."""
        record = self.stored[name]
        size = (record.bytes if end is None else end) - start
        return read_tensor(TensorRecord(record.file, "U8", (size,), record.start + start, record.start + start + size))

    def _chunks(self, name: str) -> Iterator[Tensor]:
        """The bytes of a compressed tensor, a chunk at a time."""
        read = partial(self.read_bytes, name)
        return chunks(self.record.compressed[name], read, f"{self.folder}: {name}")

    def read_packed(self, name: str, room: ReadRoom | None = None) -> PackedTensor:
        """A packed tensor as it is stored, read and checked; in `room` until the thread reads the next one there.

        Raises `CheckpointError` for a mask that does not fit.
        """
        matrix = self.record.matrices[name]
        mask = self.read_stored(f"{stem(name)}.bitmask", room)
        check_mask(mask, matrix.shape[-1], matrix.kept, f"{self.folder}: {name}")
        kept = self.read_stored(f"{stem(name)}.compressed", room)
        scales = self.read_stored(f"{stem(name)}.scales") if matrix.values == "int8" else None
        return PackedTensor(mask, kept, tuple(matrix.shape), DTYPES[matrix.dtype], scales)

    def read(self, names: Sequence[str], *, pin: bool = False) -> dict[str, Tensor]:
        """The named tensors, packed ones expanded."""
        return {name: self._read(name, pin) for name in names}

    def _read(self, name: str, pin: bool) -> Tensor:
        if name not in self.record.matrices:
            # A compressed one is decompressed into memory of its own: not page-locked.
            return self.read_stored(name) if self.compressed else read_tensor(self.tensors[name], pin=pin)
        packed = self.read_packed(name)
        return packed.dense(torch.empty(packed.shape, dtype=packed.dtype, pin_memory=pin))

    def parts(self, name: str) -> Iterator[Tensor]:
        """All entries of a tensor in order, as flat tensors; of a packed one all at once."""
        if name in self.record.matrices:
            yield self._read(name, pin=False).view(-1)
        elif self.compressed:
            for chunk in self._chunks(name):
                yield chunk.view(self.dtype(name))
        else:
            yield from super().parts(name)

    def layout(self) -> Layout:
        """The shards of an output with the same tensors, as the plain checkpoint had them."""
        shards = [
            [(name, self.dtype(name), self.shape(name)) for name in shard.tensors] for shard in self.record.shards
        ]
        return list(zip(shard_names(len(shards)), shards, strict=True))

    @property
    def digests(self) -> dict[str, str]:
        """sha256 of every plain tensor."""
        described: dict[str, PackedMatrix | DenseTensor] = {**self.record.matrices, **self.record.dense}
        return {name: entry.sha256 for name, entry in described.items()}

    @property
    def packed_bytes(self) -> int:
        """Size of all parts of packed tensors."""
        matrices = self.record.matrices.items()
        return sum(self.stored[f"{stem(name)}.{part}"].bytes for name, matrix in matrices for part in matrix.stored)

    @property
    def plain_bytes(self) -> int:
        """Size of what they stand for."""
        return sum(self.tensors[name].bytes for name in self.record.matrices)


def read_record(folder: Path) -> PackedRecord:
    """What `sparse_config.json` holds. Raises `CheckpointError` for another format, and for one that was altered."""
    file = folder / PACKED_FILE
    check_inside(file, folder)
    value = parse_json(read_text(file), file, dict[str, Any], advice=ADVICE, unique=True)
    if value.get("format") != FORMAT or value.get("version") not in (VERSION, COMPRESSED_VERSION):
        raise CheckpointError(
            f"{file}: format {value.get('format')!r}, version {value.get('version')!r}, expected {FORMAT!r}, version "
            f"{VERSION} or {COMPRESSED_VERSION}. A later version of Secateur may read it."
        )
    expected = digest_of(value)
    if value.get("digest") != expected:
        raise CheckpointError(f"{file}: altered since it was written: its digest should be {expected[:12]}. {ADVICE}")
    record: PackedRecord = checked(value, file, PackedRecord, advice=ADVICE)
    if record.version != version_of(record.compressed):
        raise CheckpointError(
            f"{file}: version {record.version}, and {len(record.compressed)} compressed tensors. {ADVICE}"
        )
    for name, matrix in record.matrices.items():
        for part in ("bitmask", "compressed", "scales")[: 3 if matrix.values == "int8" else 2]:
            if part not in matrix.stored:
                raise CheckpointError(f"{file}: {name}: has no digest of its {part}. {ADVICE}")
        if matrix.values == "int8" and DTYPES.get(matrix.dtype) not in CODED:
            raise CheckpointError(f"{file}: {name}: has int8 values that stand for {matrix.dtype}. {ADVICE}")
    return record


def version_of(compressed: Mapping[str, Compressed]) -> int:
    """The version of the format that a checkpoint with these compressed tensors has."""
    return COMPRESSED_VERSION if compressed else VERSION


def record_text(record: Mapping[str, Any]) -> str:
    """The text of `sparse_config.json` with its digest."""
    return json.dumps({**record, "digest": digest_of(record)}, indent=1) + "\n"


def packed_files(folder: Path) -> set[str]:
    """Names of the files of a packed checkpoint: its shards, their index, and the files that went with it."""
    record = read_record(folder)
    return {PACKED_FILE, PACKED_INDEX, *packed_shards(len(record.shards)), *record.files}


def packed_layout(shards: Sequence[Sequence[tuple[str, torch.dtype, tuple[int, ...]]]]) -> Layout:
    """The shards of a packed checkpoint: within one, wide numbers come first, so that each tensor is aligned."""
    names = packed_shards(len(shards))
    return [
        (name, sorted(tensors, key=lambda one: -one[1].itemsize)) for name, tensors in zip(names, shards, strict=True)
    ]


def stored_bytes(shape: Sequence[int], dtype: torch.dtype, kept: int, values: Values = "same") -> int:
    """Size of a tensor when it is packed."""
    mask = math.prod(mask_shape(shape))
    return mask + (kept * dtype.itemsize if values == "same" else kept + 4 * math.prod(shape[:-1]))
