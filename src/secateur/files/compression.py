"""Tensors compressed for transport: chunks of their bytes, byte planes of a chunk, each plane a frame of Zstandard.

The first bytes of numbers lie together, then all second ones, and so on. In a plane of exponents few values are common,
so that it becomes small; a plane of mantissas stays as it is. Mixed as they lie in memory, both hide each other.
Rotating the sign out of the exponents' plane first makes a pruned checkpoint 0.4 % smaller, and is not done.
"""

import importlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from msgspec import Meta
from numpy.typing import NDArray
from torch import Tensor

from secateur.errors import CheckpointError, SecateurError
from secateur.files.checkpoint import DIMENSIONS, DTYPES, tensor_bytes

CHUNK_BYTES = 1 << 22  # of a tensor, which are read and made at once
MOST_RATIO = 64  # nothing stands for more bytes than so many times its own: what claims to is made to fill the memory
ADVICE = "The file is damaged; copy or download it again."
LEVEL = 1  # higher ones take longer and find nothing: there is no order in weights, only frequent bytes

Bytes = NDArray[np.uint8]

_Size = Annotated[int, Meta(ge=0, lt=1 << 60)]


@dataclass(frozen=True)
class Compressed:
    """What `sparse_config.json` says of a compressed tensor: what it is, and the bytes of each plane of each chunk.

    `sha256` is the digest of the compressed bytes. A plane with as many bytes as it stands for is stored as it is.
    """

    dtype: str
    shape: Annotated[list[_Size], Meta(max_length=DIMENSIONS)]
    planes: list[list[_Size]]
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


def library() -> Any:
    """The Zstandard library: of Python from 3.14 on, else a package. Raises `SecateurError` where it is missing."""
    try:
        return importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    except ImportError:
        raise SecateurError(
            'compressed checkpoints need Zstandard, which is not installed. Run: pip install "secateur[compress]"'
        ) from None


def compress(tensor: Tensor) -> tuple[bytes, list[list[int]]]:
    """The compressed bytes of a tensor, and how many of them each plane of each chunk takes."""
    data, size = np.frombuffer(tensor_bytes(tensor), np.uint8), tensor.dtype.itemsize
    found: list[bytes] = []
    planes: list[list[int]] = []
    for start in range(0, len(data), CHUNK_BYTES):
        chunk = data[start : start + CHUNK_BYTES].reshape(-1, size)
        parts = [_compress_plane(np.ascontiguousarray(chunk[:, byte])) for byte in range(size)]
        planes.append([len(part) for part in parts])
        found += parts
    return b"".join(found), planes


def _compress_plane(plane: Bytes) -> bytes:
    frame: bytes = library().compress(plane, LEVEL)
    padding = -(-len(plane) // MOST_RATIO) - len(frame)
    frame += bytes(max(0, padding))
    return frame if len(frame) < len(plane) else plane.tobytes()


def check(stored: Compressed, bytes_there: int, where: str) -> None:
    """Raise `CheckpointError` unless the facts of a compressed tensor fit together, and to its bytes in the file."""
    if stored.dtype not in DTYPES:
        raise CheckpointError(f"{where}: has the unknown dtype {stored.dtype}; known are {', '.join(DTYPES)}.")
    total, width = plain_bytes(stored), DTYPES[stored.dtype].itemsize
    count = -(-total // CHUNK_BYTES)
    if len(stored.planes) != count or any(len(chunk) != width for chunk in stored.planes):
        raise CheckpointError(
            f"{where}: a compressed tensor of {total:,} bytes in {len(stored.planes)} chunks, expected {count:,}, with "
            f"{width} planes each. {ADVICE}"
        )
    found = sum(map(sum, stored.planes))
    if found != bytes_there:
        raise CheckpointError(f"{where}: its planes take {found:,} bytes, and {bytes_there:,} are stored. {ADVICE}")
    for size, chunk in zip(_chunk_sizes(stored), stored.planes, strict=True):
        plane = size // width
        for taken in chunk:
            if not -(-plane // MOST_RATIO) <= taken <= plane:
                raise CheckpointError(
                    f"{where}: {taken:,} compressed bytes stand for {plane:,}; expected at least one for {MOST_RATIO}, "
                    "and no more than there are. The file is damaged, or made to fill the memory: do not use it."
                )


def plain_bytes(stored: Compressed) -> int:
    """The size of what a compressed tensor stands for."""
    return math.prod(stored.shape) * DTYPES[stored.dtype].itemsize


def chunks(stored: Compressed, read: Callable[[int, int], Tensor], where: str) -> Iterator[Tensor]:
    """The bytes of a tensor chunk by chunk (uint8); `read(start, end)` gives those that are stored.

    Raises `CheckpointError` for a plane that is not what it should be; more than a chunk is never made of it.
    """
    done = 0
    for size, planes in zip(_chunk_sizes(stored), stored.planes, strict=True):
        out = np.empty((size // len(planes), len(planes)), np.uint8)
        for byte, found in enumerate(planes):
            out[:, byte] = _plane(read(done, done + found).numpy(), len(out), where)
            done += found
        yield torch.from_numpy(out.reshape(-1))


def _plane(data: Bytes, size: int, where: str) -> Bytes:
    if len(data) == size:
        return data
    zstd = library()
    try:
        # Windows are no larger than a chunk: the library takes no more memory for a frame that asks for it.
        options = {zstd.DecompressionParameter.window_log_max: CHUNK_BYTES.bit_length() - 1}
        frame = zstd.ZstdDecompressor(options=options)
        found = frame.decompress(data, max_length=size)
        if len(found) == size and not frame.eof:
            frame.decompress(b"", max_length=1)  # the end of the frame, or more than there should be
        if len(found) != size or not frame.eof or any(frame.unused_data):
            raise CheckpointError(f"{where}: a compressed plane does not stand for {size:,} bytes. {ADVICE}")
    except zstd.ZstdError as error:
        raise CheckpointError(f"{where}: cannot be decompressed ({error}). {ADVICE}") from None
    return np.frombuffer(found, np.uint8)


def _chunk_sizes(stored: Compressed) -> list[int]:
    """How many bytes each of the chunks, whose number was checked, stands for."""
    total = plain_bytes(stored)
    return [min(CHUNK_BYTES, total - CHUNK_BYTES * number) for number in range(len(stored.planes))]
