"""Checkpoints on disk: tensors read one by one from safetensors shards, local or from the hub's cache.

Reading works on the bytes of the format itself (an 8-byte length, a JSON header, then the tensors): `pread` keeps no
file mapped, so that the memory of a run is that of the tensors it holds.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
CARD_FILE = "README.md"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt", ".index.json")

PART_BYTES = 16 << 20  # of a tensor that is read a part at a time

# The shards of a checkpoint: file name, and (tensor name, dtype, shape) in the order of the bytes.
Layout = Sequence[tuple[str, Sequence[tuple[str, torch.dtype, tuple[int, ...]]]]]


@dataclass(frozen=True)
class TensorRecord:
    """Where one tensor lies: its file, its dtype as the format spells it, its shape, and its byte range."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def bytes(self) -> int:
        """Size of the tensor's data."""
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """The head of one safetensors file: its tensors, its `__metadata__`, and the sha256 of the raw header bytes."""

    tensors: dict[str, TensorRecord]
    metadata: dict[str, str]
    digest: str


def read_header(file: Path) -> Header:
    """The checked header of a safetensors file. Raises `CheckpointError` for a file that is damaged or cut short."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
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
            raw = stream.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file. Download or copy the checkpoint again.") from None
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}).") from None
    try:
        entries = json.loads(raw)
        metadata = entries.pop("__metadata__", {})
        base = 8 + length
        tensors = {
            name: TensorRecord(
                file,
                entry["dtype"],
                tuple(entry["shape"]),
                base + entry["data_offsets"][0],
                base + entry["data_offsets"][1],
            )
            for name, entry in entries.items()
        }
        sizes = {name: _size(record, name) for name, record in tensors.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{file}: the safetensors header is damaged ({error!r}). Download it again.") from None
    position = base
    for name, record in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        expected = sizes[name]
        if record.start != position or record.bytes != expected:
            raise CheckpointError(
                f"{file}: tensor {name} lies at bytes {record.start} to {record.end}, expected {position} to "
                f"{position + expected}. The file is damaged; download it again."
            )
        position = record.end
    if position != size:
        raise CheckpointError(
            f"{file}: truncated or damaged: the header describes {position} bytes, the file has {size}. "
            "Download or copy it again."
        )
    return Header(tensors, metadata, hashlib.sha256(prefix + raw).hexdigest())


def _size(record: TensorRecord, name: str) -> int:
    if record.dtype not in DTYPES:
        raise CheckpointError(
            f"{record.file}: tensor {name} has the unknown dtype {record.dtype}; known are {', '.join(DTYPES)}."
        )
    if not all(isinstance(number, int) for number in (*record.shape, record.start, record.end)):
        raise TypeError(f"shape and offsets of {name} are not whole numbers")
    return math.prod(record.shape) * DTYPES[record.dtype].itemsize


class Checkpoint:
    """A folder with safetensors weights, read lazily. Nothing is ever written to it.

    `tensors` maps every tensor name to where it lies, in the order of the files and, within one, of the bytes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _weight_files(folder)
        self.headers = {file: read_header(file) for file in self.files}
        self.tensors: dict[str, TensorRecord] = {}
        for file, header in self.headers.items():
            for name, record in sorted(header.tensors.items(), key=lambda item: item[1].start):
                if name in self.tensors:
                    raise CheckpointError(
                        f"{folder}: tensor {name} is in {self.tensors[name].file.name} and {file.name}."
                    )
                self.tensors[name] = record
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

    def bytes(self, names: Iterable[str]) -> int:
        """Size in bytes of the named tensors together."""
        return sum(self.tensors[name].bytes for name in names)

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
        shards = [header for header in self.headers.values() if header.tensors]
        names = shard_names(len(shards))
        return [
            (
                name,
                [
                    (tensor, DTYPES[record.dtype], record.shape)
                    for tensor, record in sorted(shard.tensors.items(), key=lambda item: item[1].start)
                ],
            )
            for name, shard in zip(names, shards, strict=True)
        ]


def read_tensor(record: TensorRecord, *, pin: bool = False) -> Tensor:
    """The tensor of a record, freshly read into host memory."""
    # Memory: pread copies into this buffer alone; a memory map would count every page it touched.
    buffer = torch.empty(record.bytes, dtype=torch.uint8, pin_memory=pin)
    read_bytes(record, buffer)
    return buffer.view(DTYPES[record.dtype]).view(record.shape)


def read_bytes(record: TensorRecord, buffer: Tensor) -> None:
    """Fill a uint8 tensor with the bytes of a record. Raises `CheckpointError` when the file ends early."""
    view = _bytes_of(buffer)
    try:
        descriptor = os.open(record.file, os.O_RDONLY)
        try:
            done = 0
            while done < record.bytes:
                got = os.preadv(descriptor, [view[done:]], record.start + done)
                if got == 0:
                    raise CheckpointError(f"{record.file}: ended at byte {record.start + done}, expected {record.end}.")
                done += got
        finally:
            os.close(descriptor)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{record.file}: cannot be read ({error.strerror}).") from None


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except OSError as error:
        raise CheckpointError(f"{index}: cannot be read ({error.strerror}).") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a safetensors index ({error!r}). Download it again.") from None


def _weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder, as transformers would choose them: the single file before the index."""
    if (folder / SINGLE_FILE).exists():
        return [folder / SINGLE_FILE]
    index = folder / INDEX_FILE
    if index.exists():
        files = [folder / name for name in sorted(set(_weight_map(index).values()))]
        for file in files:
            if not file.exists():
                raise CheckpointError(
                    f"{file}: the shard is missing, and {INDEX_FILE} lists it ({len(files)} shards expected). "
                    "Download the checkpoint again."
                )
        return files
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
    return memoryview(array) if flat.numel() else memoryview(b"")


def locate(source: str, revision: str | None = None) -> Path:
    """The local folder of a checkpoint: the folder itself, or the hub's snapshot in huggingface_hub's cache.

    Raises `CheckpointError` when it is neither, or when the hub cannot be reached.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise CheckpointError(f"{folder}: give the folder of the checkpoint, not one of its files.")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            huggingface_hub.snapshot_download(
                source,
                revision=revision,
                allow_patterns=[
                    "*.safetensors",
                    "*.json",
                    "*.model",
                    "*.txt",
                    "*.jinja",
                    "*.py",
                    "LICENSE*",
                    "USE_POLICY*",
                    CARD_FILE,
                ],
                ignore_patterns=["original/*", "onnx/*", "consolidated*"],
            )
        )
    except HFValidationError:
        raise CheckpointError(f"{source}: no such folder, and not a hub id (owner/name) either.") from None
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{source}: no such folder, and the hub cannot be reached (or HF_HUB_OFFLINE is set) and has no copy in "
            "the cache. Give a local folder, or download it first: hf download " + source
        ) from None
    except HfHubHTTPError as error:
        raise CheckpointError(f"{source}: no such folder, and the hub says: {error}") from None


def companion_files(folder: Path) -> list[Path]:
    """The files of a checkpoint beside its weights: configuration, tokenizer, licence, code; not its model card."""
    return [
        file
        for file in sorted(folder.iterdir())
        if file.is_file()
        and not file.name.startswith(".")
        and not file.name.endswith(WEIGHT_SUFFIXES)
        and file.name not in (CARD_FILE, "secateur.json")
        and file.stat().st_size < 1 << 28
    ]


def file_digest(file: Path) -> str:
    """sha256 of a whole file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
