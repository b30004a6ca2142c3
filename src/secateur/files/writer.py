"""Checkpoints written tensor by tensor, in any order, into shards whose headers are known beforehand."""

import contextlib
import hashlib
import json
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.files.checkpoint import (
    DTYPE_NAMES,
    INDEX_FILE,
    Layout,
    TensorRecord,
    read_tensor,
    tensor_bytes,
    tensor_digest,
)


class CheckpointWriter:
    """Shards of known layout, filled tensor by tensor in any order, with the sha256 of every tensor.

    All space is reserved when the writer is made, so that a full disk is found out before the work, not after it.
    """

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        metadata: Mapping[str, str] | None = None,
        *,
        index: str | None = None,
        found: Mapping[str, str] | None = None,
        found_head: bool = True,
    ) -> None:
        """Shards without an index of their tensors where there is one only, unless `index` is the name of one.

        With `found` the shards are there, from a writer that did not get to its end, and hold tensors with these
        sha256; without `found_head` their headers may be others, and are written again. Raises `CheckpointError` where
        there is no room, or where the shards are others than that writer made.
        """
        self.folder = folder
        self._metadata = {"format": "pt", **(metadata or {})}
        self.digests: dict[str, str] = dict(found or {})
        self._make = self._create if found is None else self._reopen
        self._found_head = found_head
        self.header_digests: dict[str, str] = {}
        self._place: dict[str, tuple[str, int, int]] = {}
        self._descriptors: dict[str, int] = {}
        self._entries: dict[str, dict[str, Any]] = {}
        self._touched: set[str] = set()
        self.total_bytes = 0
        try:
            for name, tensors in layout:
                self._add(name, tensors)
            if len(layout) > 1 or index is not None:
                file = folder / (index or INDEX_FILE)
                weight_map = {tensor: place[0] for tensor, place in sorted(self._place.items())}
                listing = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
                with writing(file):
                    file.write_text(json.dumps(listing, indent=2) + "\n", encoding="utf-8")
        except CheckpointError:
            self.close()
            raise

    def _add(self, file: str, tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
        entries: dict[str, Any] = {}
        position = 0
        for name, dtype, shape in tensors:
            size = dtype.itemsize * int(torch.Size(shape).numel())
            entries[name] = {
                "dtype": DTYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [position, position + size],
            }
            position += size
        self._entries[file] = entries
        head = self._head(file)
        self._make(file, head, len(head) + position)
        self.header_digests[file] = hashlib.sha256(head).hexdigest()
        self.total_bytes += position
        for name, entry in entries.items():
            start, end = entry["data_offsets"]
            self._place[name] = (file, len(head) + start, end - start)

    def _create(self, file: str, head: bytes, size: int) -> None:
        path = self.folder / file
        try:
            self._descriptors[file] = descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            reserve(descriptor, size)
            os.pwrite(descriptor, head, 0)
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot reserve {size:,} bytes ({error.strerror}). "
                "Free some space or choose another output folder."
            ) from None

    def _reopen(self, file: str, head: bytes, size: int) -> None:
        path = self.folder / file
        with writing(path):
            self._descriptors[file] = descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
            there = os.fstat(descriptor)
            if not self._found_head:
                os.pwrite(descriptor, head, 0)
            if not stat.S_ISREG(there.st_mode) or there.st_size != size or os.pread(descriptor, len(head), 0) != head:
                raise CheckpointError(
                    f"{path}: was changed since the run that wrote it ended: {there.st_size:,} bytes, expected "
                    f"{size:,} with the same header. Start anew with --overwrite."
                )

    def _head(self, file: str) -> bytes:
        raw = json.dumps({"__metadata__": self._metadata, **self._entries[file]}, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        return struct.pack("<Q", len(raw)) + raw

    def change_metadata(self, metadata: Mapping[str, str]) -> None:
        """Put other metadata into the headers, which must take as many bytes as the old: digests for placeholders."""
        before = {file: len(self._head(file)) for file in self._entries}
        self._metadata |= metadata
        for file, length in before.items():
            head = self._head(file)
            if len(head) != length:
                raise ValueError(f"{file}: a header of {len(head)} bytes in the place of {length}")
            with writing(self.folder / file):
                os.pwrite(self._descriptors[file], head, 0)
            self._touched.add(file)
            self.header_digests[file] = hashlib.sha256(head).hexdigest()

    @property
    def missing(self) -> list[str]:
        """Names of the tensors that nobody has written yet."""
        return [name for name in self._place if name not in self.digests]

    def write(self, name: str, tensor: Tensor, digest: str | None = None) -> str:
        """Write one tensor in its place; returns the sha256 of its bytes. One of another size changes nothing.

        `digest` is the sha256 where it is known already.
        """
        file, _, size = self._place[name]
        if tensor.nbytes != size:
            raise CheckpointError(f"{name}: {tensor.nbytes} bytes to write into {file}, expected {size}.")
        return self.write_parts(name, [tensor], digest)

    def write_parts(self, name: str, parts: Iterable[Tensor], digest: str | None = None) -> str:
        """Write one tensor that comes in parts, in order; returns the sha256 of its bytes."""
        file, start, size = self._place[name]
        hashed, done = hashlib.sha256(), 0
        for part in parts:
            data = tensor_bytes(part)
            if digest is None:
                hashed.update(data)
            if done + len(data) > size:
                raise CheckpointError(f"{name}: {done + len(data)} bytes to write into {file}, expected {size}.")
            with writing(self.folder / file):
                while len(data):
                    count = os.pwrite(self._descriptors[file], data, start + done)
                    data, done = data[count:], done + count
        if done != size:
            raise CheckpointError(f"{name}: {done} bytes to write into {file}, expected {size}.")
        self._touched.add(file)
        self.digests[name] = digest or hashed.hexdigest()
        return self.digests[name]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors as they were written. Raises `CheckpointError` for one whose sha256 is another now."""
        result = {}
        for name in names:
            file, start, size = self._place[name]
            entry = self._entries[file][name]
            record = TensorRecord(self.folder / file, entry["dtype"], tuple(entry["shape"]), start, start + size)
            result[name] = read_tensor(record)
            digest = tensor_digest(result[name])
            if digest != self.digests[name]:
                raise CheckpointError(
                    f"{self.folder / file}: {name} was changed since it was written: digest {digest[:12]}, expected "
                    f"{self.digests[name][:12]}. Start anew with --overwrite."
                )
        return result

    def flush(self) -> None:
        """Force what was written to the disk, so that a finished block survives a crash."""
        for file in self._touched:
            with writing(self.folder / file):
                getattr(os, "fdatasync", os.fsync)(self._descriptors[file])  # macOS has fsync only
        self._touched.clear()

    def close(self) -> None:
        """Flush and close all files."""
        try:
            self.flush()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close all files without waiting for the disk; harmless after `close`."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


@contextlib.contextmanager
def writing(file: Path) -> Iterator[None]:
    """Turn the system's errors while an output is written into a `CheckpointError` that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or file}: cannot be written ({error.strerror or error}). "
            "Free some space or choose another output folder."
        ) from None


def reserve(descriptor: int, size: int) -> None:
    """Give an open file its size and its place on the disk. Raises `OSError` when there is not enough room."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:  # macOS has no posix_fallocate; a full disk then shows at the first write
        os.ftruncate(descriptor, size)
