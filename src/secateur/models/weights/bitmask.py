"""Sparse checkpoints of compressed-tensors seen as plain ones: its formats sparse-bitmask and sparse-24-bitmask.

Releases before 0.15 wrote them, and no later one reads them. For a linear layer L they hold `L.bitmask` (a bit for each
weight, from the least significant, each row in whole bytes), `L.compressed` (the weights that are not zero, in rows; of
the second format, as a matrix of half the width), `L.shape`, and of the first format `L.row_offsets` (how many weights
lie before each row).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.files.bitmask import check_mask, expand, mask_shape
from secateur.files.checkpoint import DTYPES, Checkpoint, Layout, TensorRecord, read_tensor, shard_names
from secateur.files.packed import open_files

ENDING = ".bitmask"
FORMATS = ("sparse-bitmask", "sparse-24-bitmask")
PARTS = ("bitmask", "compressed", "shape", "row_offsets")


@dataclass(frozen=True)
class SparseWeight:
    """The parts of one weight, and the shape that it has when it is plain."""

    mask: TensorRecord
    values: TensorRecord
    offsets: TensorRecord | None
    shape: tuple[int, ...]


class SparseBitmaskCheckpoint(Checkpoint):
    """Such a checkpoint seen as the plain one: each weight is expanded when it is read.

    `tensors` are the plain ones; of a sparse one, the record says what it is when it is plain, in bytes from 0.
    `stored` is where the tensors in the files lie.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.stored = self.tensors
        self.sparse: dict[str, SparseWeight] = {}
        self.tensors = {}
        for name, record in self.stored.items():
            stem, _, part = name.rpartition(".")
            if stem and f"{stem}{ENDING}" in self.stored and part in PARTS:
                if part == "bitmask":
                    plain = f"{stem}.weight"
                    if plain in self.stored:
                        raise _misfit(folder, stem, f"{plain} is there as well")
                    self.sparse[plain] = weight = self._weight(stem)
                    dtype = weight.values.dtype
                    size = weight.shape[0] * weight.shape[1] * DTYPES[dtype].itemsize
                    self.tensors[plain] = TensorRecord(record.file, dtype, weight.shape, 0, size)
            else:
                self.tensors[name] = record

    @property
    def format(self) -> str:
        """What compressed-tensors calls it."""
        return FORMATS[any(len(weight.values.shape) == 2 for weight in self.sparse.values())]

    def _weight(self, stem: str) -> SparseWeight:
        """The parts of a weight. Raises `CheckpointError` where they are not what the format says."""
        parts = {part: self.stored.get(f"{stem}.{part}") for part in PARTS}
        mask, values, shape, offsets = (parts[part] for part in PARTS)
        if mask is None or values is None or shape is None:
            missing = next(part for part in PARTS if parts[part] is None)
            raise _misfit(self.folder, stem, f"{stem}.{missing} is missing")
        if shape.dtype != "I64" or shape.shape not in ((2,), (2, 1)):
            raise _misfit(self.folder, stem, f"{stem}.shape is {shape.dtype} {list(shape.shape)}, expected I64 [2]")
        rows, columns = (int(side) for side in read_tensor(shape).view(-1))
        if rows < 0 or columns < 0 or mask.dtype != "U8" or mask.shape != mask_shape((rows, columns)):
            found = f"{mask.dtype} {list(mask.shape)}"
            raise _misfit(self.folder, stem, f"its mask is {found}, and its shape is {rows} x {columns}")
        if len(values.shape) != 1 and values.shape != (rows, columns // 2):
            raise _misfit(
                self.folder, stem, f"its values are {list(values.shape)}, and its shape is {rows} x {columns}"
            )
        if offsets is not None and (offsets.dtype != "I64" or offsets.shape != (rows,)):
            raise _misfit(self.folder, stem, f"it has {list(offsets.shape)} row offsets, and {rows} rows")
        return SparseWeight(mask, values, offsets, (rows, columns))

    def read(self, names: Sequence[str], *, pin: bool = False) -> dict[str, Tensor]:
        """The named tensors, sparse ones expanded."""
        return {name: self._read(name, pin) for name in names}

    def _read(self, name: str, pin: bool) -> Tensor:
        weight = self.sparse.get(name)
        if weight is None:
            return read_tensor(self.tensors[name], pin=pin)
        mask, values = read_tensor(weight.mask), read_tensor(weight.values).view(-1)
        check_mask(mask, weight.shape[1], len(values), f"{self.folder}: {name}")
        if weight.offsets is not None:
            counts = np.bitwise_count(mask.numpy()).sum(axis=1, dtype=np.int64)
            if not np.array_equal(np.cumsum(counts) - counts, read_tensor(weight.offsets).numpy()):
                raise _misfit(self.folder, name.removesuffix(".weight"), "its row offsets are not those of its mask")
        out = torch.empty(weight.shape, dtype=DTYPES[weight.values.dtype], pin_memory=pin)
        return expand(mask, values, weight.shape, out)

    def parts(self, name: str) -> Iterator[Tensor]:
        """All entries of a tensor in order, as flat tensors; of a sparse one all at once."""
        if name in self.sparse:
            yield self._read(name, pin=False).view(-1)
        else:
            yield from super().parts(name)

    def layout(self) -> Layout:
        """The shards of an output with the plain tensors, each in the shard where its mask was."""
        shards: dict[Path, list[tuple[str, torch.dtype, tuple[int, ...]]]] = {}
        for name, record in self.tensors.items():
            shards.setdefault(record.file, []).append((name, self.dtype(name), record.shape))
        return list(zip(shard_names(len(shards)), shards.values(), strict=True))


def open_expanded(folder: Path) -> Checkpoint:
    """The weights of a folder under their plain names: plain, packed, or sparse as compressed-tensors wrote them."""
    checkpoint = open_files(folder)
    if any(name.endswith(ENDING) for name in checkpoint.names):
        return SparseBitmaskCheckpoint(folder)
    return checkpoint


def _misfit(folder: Path, stem: str, what: str) -> CheckpointError:
    return CheckpointError(f"{folder}: {stem}: stored as a sparse bitmask, and {what}. Download the checkpoint again.")
