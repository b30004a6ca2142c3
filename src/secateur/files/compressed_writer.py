"""Shards of compressed tensors, whose sizes are known only when they are there."""

import hashlib
import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.files.ahead import ahead
from secateur.files.checkpoint import DTYPE_NAMES, Layout, tensor_bytes
from secateur.files.compression import Compressed, compress
from secateur.files.writer import reserve, writing


class CompressedWriter:
    """Shards of a known layout, whose tensors are compressed and written one after the other, each as plain bytes.

    The header of a shard comes first and can only be written last: it gets as much room as it can need, and blanks in
    what it does not. `compressed` is what sparse_config.json says of each tensor. All space that the tensors could take
    is reserved when the writer is made, so that a full disk is found out before the work, not after it.
    """

    def __init__(self, folder: Path, layout: Layout, *, index: str) -> None:
        self.folder, self._index = folder, index
        self._shapes = {name: (dtype, shape) for _, tensors in layout for name, dtype, shape in tensors}
        self._shard = {name: file for file, tensors in layout for name, _, _ in tensors}
        self.compressed: dict[str, Compressed] = {}
        self.header_digests: dict[str, str] = {}
        self.total_bytes = 0
        self._descriptors: dict[str, int] = {}
        self._room: dict[str, int] = {}
        self._ends: dict[str, int] = {}
        self._entries: dict[str, dict[str, Any]] = {}
        try:
            for file, tensors in layout:
                self._create(file, tensors)
        except BaseException:
            self.abandon()
            raise

    def _create(self, file: str, tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
        sizes = {name: dtype.itemsize * int(torch.Size(shape).numel()) for name, dtype, shape in tensors}
        most = sum(sizes.values())
        self._entries[file] = {name: _entry(most, most, most) for name in sizes}
        room = len(self._head(file))
        path = self.folder / file
        try:
            self._descriptors[file] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            reserve(self._descriptors[file], room + most)
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot reserve {room + most:,} bytes ({error.strerror}). Free some space or choose another "
                "output folder."
            ) from None
        self._entries[file], self._room[file], self._ends[file] = {}, room, 0

    def _head(self, file: str, room: int = 0) -> bytes:
        raw = json.dumps({"__metadata__": {"format": "pt"}, **self._entries[file]}, separators=(",", ":")).encode()
        raw += b" " * (max(room - 8 - len(raw), -len(raw) % 8))
        return struct.pack("<Q", len(raw)) + raw

    def write_parts(self, name: str, parts: Iterable[Tensor]) -> str:
        """Compress and write a tensor that comes in parts of whole chunks; returns the sha256 of its plain bytes."""
        file = self._shard[name]
        dtype, shape = self._shapes[name]
        plain, stored, planes, start = hashlib.sha256(), hashlib.sha256(), [], self._ends[file]
        for part, (data, sizes) in ahead(lambda part: (part, compress(part)), parts):
            plain.update(tensor_bytes(part))
            self._append(file, data)
            stored.update(data)
            planes += sizes
        self._finish(name, file, start, Compressed(DTYPE_NAMES[dtype], list(shape), planes, stored.hexdigest()))
        return plain.hexdigest()

    def write_compressed(self, name: str, data: bytes, planes: list[list[int]]) -> None:
        """Write a tensor that is compressed already."""
        file, (dtype, shape) = self._shard[name], self._shapes[name]
        start = self._ends[file]
        self._append(file, data)
        digest = hashlib.sha256(data).hexdigest()
        self._finish(name, file, start, Compressed(DTYPE_NAMES[dtype], list(shape), planes, digest))

    def _append(self, file: str, data: bytes) -> None:
        left = memoryview(data)
        with writing(self.folder / file):
            while len(left):
                count = os.pwrite(self._descriptors[file], left, self._room[file] + self._ends[file])
                left, self._ends[file] = left[count:], self._ends[file] + count

    def _finish(self, name: str, file: str, start: int, compressed: Compressed) -> None:
        end = self._ends[file]
        self._entries[file][name] = _entry(end - start, start, end)
        self.compressed[name] = compressed
        self.total_bytes += end - start

    def close(self) -> None:
        """Write headers and index, flush and close all files."""
        try:
            for file, descriptor in self._descriptors.items():
                head = self._head(file, self._room[file])
                self.header_digests[file] = hashlib.sha256(head).hexdigest()
                with writing(self.folder / file):
                    os.pwrite(descriptor, head, 0)
                    os.ftruncate(descriptor, len(head) + self._ends[file])
                    os.fsync(descriptor)
            listing = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(self._shard.items()))}
            with writing(self.folder / self._index):
                (self.folder / self._index).write_text(json.dumps(listing, indent=2) + "\n", encoding="utf-8")
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close all files without waiting for the disk; harmless after `close`."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


def _entry(size: int, start: int, end: int) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [size], "data_offsets": [start, end]}
