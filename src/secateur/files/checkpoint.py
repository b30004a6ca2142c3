"""Checkpoints on disk: tensors read one by one from safetensors shards.

Reading works on the bytes of the format itself (an 8-byte length, a JSON header, then the tensors) and keeps no file
mapped, so that the memory of a run is that of the tensors it holds.
"""

import datetime
import hashlib
import math
import os
import shlex
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from msgspec import Meta
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.files.reading import check_inside, checked, open_regular, parse_json, read_json

DTYPES: dict[str, torch.dtype] = {
    **{f"F{bits}": getattr(torch, f"float{bits}") for bits in (64, 32, 16)},
    "BF16": torch.bfloat16,
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (64, 32, 16, 8)},
    **{f"U{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)},
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
ADAPTER_FILE = "adapter_config.json"
MODELOPT_FILE = "hf_quant_config.json"  # how weights are packed; dense weights are not
CARD_FILE = "README.md"
PACKED_FILE = "sparse_config.json"  # how the matrices of a packed checkpoint are stored
PACKED_INDEX = "sparse.index.json"
HEADER_BYTES = 100_000_000  # what the format itself allows
NAME_LENGTH = 200  # of a file; file systems allow for some 250 bytes
DIMENSIONS = 16  # of a tensor; no model has more than six

PART_BYTES = 16 << 20  # of a tensor that is read a part at a time

# The shards of a checkpoint: file name, and (tensor name, dtype, shape) in the order of the bytes.
Layout = Sequence[tuple[str, Sequence[tuple[str, torch.dtype, tuple[int, ...]]]]]


@dataclass(frozen=True)
class TensorRecord:
    """Where one tensor lies: its file, its dtype as the format spells it, its shape, and its byte range.

    `stamp` is of the file when its header was read; a file that has another by the time that the tensor is read has
    been changed in between. None where nobody else writes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    stamp: tuple[int, int] | None = None

    @property
    def bytes(self) -> int:
        """Size of the tensor's data."""
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """The head of one safetensors file: its tensors, its `__metadata__`, and the sha256 of the raw header bytes."""

    tensors: dict[str, TensorRecord]  # in the order of their bytes
    metadata: dict[str, str]
    digest: str


_Size = Annotated[int, Meta(ge=0, lt=1 << 60)]


@dataclass
class _Entry:
    """What a safetensors header says of one tensor."""

    dtype: str
    shape: Annotated[list[_Size], Meta(max_length=DIMENSIONS)]
    data_offsets: tuple[_Size, _Size]


@dataclass
class _Index:
    """What an index file says."""

    weight_map: dict[str, str]


def read_header(file: Path) -> Header:
    """The checked header of a safetensors file. Raises `CheckpointError` for a file that is damaged or cut short."""
    prefix, raw, found = _raw_header(file)
    where = f"{file}: the safetensors header"
    entries = parse_json(raw, where, dict[str, Any], advice="Download it again.", unique=True)
    metadata = checked(entries.pop("__metadata__", {}), f"{where}, __metadata__", dict[str, str])
    described = checked(entries, where, dict[str, _Entry], advice="Download it again.")
    base = len(prefix) + len(raw)
    ordered = sorted(described.items(), key=lambda item: item[1].data_offsets)
    tensors = {
        name: TensorRecord(
            file,
            entry.dtype,
            tuple(entry.shape),
            base + entry.data_offsets[0],
            base + entry.data_offsets[1],
            _stamp(found),
        )
        for name, entry in ordered
    }
    position = base
    for name, record in tensors.items():
        if not name.isprintable():
            raise CheckpointError(
                f"{file}: has a tensor with characters in its name that nobody can see, {name[:NAME_LENGTH]!a}. "
                "Do not use this file, unless you know who wrote it."
            )
        expected = _size(record, name)
        if record.start != position or record.bytes != expected:
            raise CheckpointError(
                f"{file}: tensor {name} lies at bytes {record.start} to {record.end}, expected {position} to "
                f"{position + expected}. The file is damaged; download it again."
            )
        position = record.end
    if position != found.st_size:
        raise CheckpointError(
            f"{file}: truncated or damaged: the header describes {position} bytes, the file has {found.st_size}. "
            "Download or copy it again."
        )
    return Header(tensors, metadata, hashlib.sha256(prefix + raw).hexdigest())


def _stamp(found: os.stat_result) -> tuple[int, int]:
    """What changes when a file is written to: its size and the time of its last change, in ns."""
    return found.st_size, found.st_mtime_ns


def _raw_header(file: Path) -> tuple[bytes, bytes, os.stat_result]:
    """The first eight bytes of a file, the header whose length they give, and what the system says of the file."""
    with open_regular(file) as stream:
        found = os.fstat(stream.fileno())
        size = found.st_size
        try:
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise CheckpointError(
                    f"{file}: cut short: the file has {size} bytes, and the length of a safetensors header alone takes "
                    "8. Download or copy it again."
                )
            length = struct.unpack("<Q", prefix)[0]
            if not 2 <= length <= size - 8:
                raise CheckpointError(
                    f"{file}: not a safetensors file, or cut short: the header claims {length} bytes, the file has "
                    f"{size}. Download or copy it again."
                )
            if length > HEADER_BYTES:
                raise CheckpointError(
                    f"{file}: not a safetensors file: its header claims {length:,} bytes, and the format allows for "
                    f"{HEADER_BYTES:,}. Download or copy it again."
                )
            return prefix, stream.read(length), found
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error.strerror}).") from None


def _size(record: TensorRecord, name: str) -> int:
    if record.dtype not in DTYPES:
        raise CheckpointError(
            f"{record.file}: tensor {name} has the unknown dtype {record.dtype}; known are {', '.join(DTYPES)}."
        )
    if math.prod(max(1, side) for side in record.shape) >= 1 << 60:
        raise CheckpointError(f"{record.file}: tensor {name} has more numbers than there can be, {record.shape}.")
    return math.prod(record.shape) * DTYPES[record.dtype].itemsize


class Checkpoint:
    """A folder with safetensors weights, read lazily. Nothing is ever written to it.

    `tensors` maps every tensor name to where it lies, in the order of the files and, within one, of the bytes.
    """

    def __init__(self, folder: Path, files: Sequence[Path] | None = None) -> None:
        """The weights of a folder: those in `files`, where they are given, else as transformers would choose them."""
        self.folder = folder
        self.files = _weight_files(folder) if files is None else list(files)
        for file in self.files:
            check_inside(file, folder)
        self.headers = {file: read_header(file) for file in self.files}
        self.tensors: dict[str, TensorRecord] = {}
        for file, header in self.headers.items():
            for name, record in header.tensors.items():
                if name in self.tensors:
                    raise CheckpointError(
                        f"{folder}: tensor {name} is in {self.tensors[name].file.name} and {file.name}."
                    )
                self.tensors[name] = record
        if files is None:
            self._check_index()

    def _check_index(self) -> None:
        index = self.folder / INDEX_FILE
        if not index.exists() or (self.folder / SINGLE_FILE) in self.files:
            return
        for name, file in _weight_map(index).items():
            if name not in self.headers[self.folder / file].tensors:
                raise CheckpointError(
                    f"{index}: lists the tensor {name} in {file}, which does not hold it. "
                    "Index and shards do not belong together; download the checkpoint again."
                )

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, from the header."""
        return DTYPES[self.tensors[name].dtype]

    @property
    def names(self) -> list[str]:
        """All tensor names."""
        return list(self.tensors)

    def read(self, names: Sequence[str], *, pin: bool = False) -> dict[str, Tensor]:
        """The named tensors, freshly read into host memory (page-locked with `pin`, for transfers to a GPU)."""
        return {name: read_tensor(self.tensors[name], pin=pin) for name in names}

    def parts(self, name: str) -> Iterator[Tensor]:
        """All entries of a tensor in order, as flat tensors of at most 16 MB that are read one after the other."""
        record = self.tensors[name]
        size = max(1, PART_BYTES // DTYPES[record.dtype].itemsize) * DTYPES[record.dtype].itemsize
        for start in range(record.start, record.end, size):
            end = min(start + size, record.end)
            entries = ((end - start) // DTYPES[record.dtype].itemsize,)
            yield read_tensor(replace(record, shape=entries, start=start, end=end))

    def layout(self) -> Layout:
        """The shards of an output with the same tensors: (standard file name, [(name, dtype, shape)])."""
        shards = [
            [(name, DTYPES[record.dtype], record.shape) for name, record in header.tensors.items()]
            for header in self.headers.values()
            if header.tensors
        ]
        return list(zip(shard_names(len(shards)), shards, strict=True))


def read_tensor(record: TensorRecord, *, pin: bool = False, into: Tensor | None = None) -> Tensor:
    """The tensor of a record, freshly read into host memory, or into the first bytes of another.

    Raises `CheckpointError` when the file ends early, or was changed since its header was read.
    """
    # Memory: reading copies into this buffer alone; a memory map would count every page it touched.
    buffer = torch.empty(record.bytes, dtype=torch.uint8, pin_memory=pin) if into is None else into[: record.bytes]
    try:
        with record.file.open("rb") as stream:
            stream.seek(record.start)
            done = stream.readinto(_bytes_of(buffer))
            now = _stamp(os.fstat(stream.fileno()))
    except OSError as error:
        raise CheckpointError(f"{record.file}: cannot be read ({error.strerror}).") from None
    if done < record.bytes:
        raise CheckpointError(f"{record.file}: ended at byte {record.start + done}, expected {record.end}.")
    if record.stamp is not None and now != record.stamp:
        raise CheckpointError(
            f"{record.file}: was changed while it was being read: {now[0]:,} bytes, written at {_time(now[1])}; "
            f"expected {record.stamp[0]:,}, written at {_time(record.stamp[1])}. Leave the model alone until the run "
            "is complete."
        )
    return buffer.view(DTYPES[record.dtype]).view(record.shape)


def _time(nanoseconds: int) -> str:
    return datetime.datetime.fromtimestamp(nanoseconds / 1e9, datetime.UTC).isoformat(" ", "milliseconds")


def _weight_map(index: Path) -> dict[str, str]:
    """The shard of every tensor. Raises `CheckpointError` for a file that is no index, or names files elsewhere."""
    check_inside(index, index.parent)
    weight_map: dict[str, str] = read_json(index, _Index, advice="Download it again.").weight_map
    for name, file in weight_map.items():
        if file in ("", ".", "..") or len(file) > NAME_LENGTH or any(mark in file for mark in ("/", "\\", "\0")):
            raise CheckpointError(
                f'{index}: has the tensor {name} in "{file[:NAME_LENGTH]}", and a shard lies beside its index, in the '
                "same folder. Download the checkpoint again, from whom you trust."
            )
    return weight_map


def _weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder, as transformers would choose them: the single file before the index."""
    index, adapter = folder / INDEX_FILE, folder / ADAPTER_FILE
    is_model = (folder / SINGLE_FILE).exists() or index.exists()
    if adapter.exists():
        raise CheckpointError(_of_an_adapter(folder, beside_weights=is_model))
    if (folder / SINGLE_FILE).exists():
        return [folder / SINGLE_FILE]
    if index.exists():
        files = [folder / name for name in sorted(set(_weight_map(index).values()))]
        for file in files:
            if not os.path.exists(file):  # which also answers for names that no file system takes
                raise CheckpointError(
                    f"{file}: the shard is missing, and {INDEX_FILE} lists it ({len(files)} shards expected). "
                    "Download the checkpoint again."
                )
        return files
    if (folder / PACKED_FILE).exists():
        raise CheckpointError(
            f"{folder}: a packed checkpoint, and a plain one is needed here. Unpack it first: secateur unpack "
            f"{shlex.quote(str(folder))} -o FOLDER"
        )
    if any(folder.glob("*.bin")):
        raise CheckpointError(
            f"{folder}: holds PyTorch .bin weights only, and Secateur reads safetensors. Convert it once with\n"
            '  python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
            f"M.from_pretrained('{folder}', dtype='auto').save_pretrained('{folder}-safetensors'); "
            f"T.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
        )
    gguf = sorted(folder.glob("*.gguf"))
    if gguf:
        raise CheckpointError(f"{folder}: holds GGUF weights; give the file itself, such as {gguf[0]}.")
    raise CheckpointError(
        f"{folder}: no {SINGLE_FILE} and no {INDEX_FILE} in it. Give a folder that save_pretrained wrote, a hub id, "
        "or a GGUF file."
    )


def _of_an_adapter(folder: Path, *, beside_weights: bool) -> str:
    """Why a folder with the configuration of an adapter is no model, and what to do."""
    base = read_json(folder / ADAPTER_FILE, dict[str, Any]).get("base_model_name_or_path")
    named = f" for {base}" if isinstance(base, str) and base else ""
    if beside_weights:
        return (
            f"{folder}: holds the weights of a model and {ADAPTER_FILE}, the adapter{named} that transformers would "
            f"load with them. Move {ADAPTER_FILE} elsewhere, or merge the adapter into its base: secateur merge."
        )
    return (
        f"{folder}: an adapter{named}, not a model. Give its base, or merge the two into one checkpoint first: "
        f"secateur merge {shlex.quote(str(folder))} --base BASE --output FOLDER"
    )


def shard_names(count: int) -> list[str]:
    """The standard file names of `count` shards."""
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw little-endian bytes of a tensor, as a view where it is contiguous in host memory."""
    return _bytes_of(tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8))


def _bytes_of(flat: Tensor) -> memoryview:
    """A writable view of the memory of a uint8 tensor."""
    array: Any = flat.numpy()
    return memoryview(array) if flat.numel() else memoryview(bytearray())


def tensor_digest(tensor: Tensor) -> str:
    """sha256 of the bytes of a tensor."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def file_digest(file: Path) -> str:
    """sha256 of a whole file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
