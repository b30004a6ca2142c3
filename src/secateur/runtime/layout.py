"""Packed weights, checked and laid out for the path that multiplies by them."""

import ctypes
import os
from dataclasses import dataclass, field, replace
from threading import Lock

import torch
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.files.bitmask import mask_shape, pack_bits
from secateur.files.codes import values_of
from secateur.files.packed import PackedTensor
from secateur.runtime.library import COMPILED, KINDS, PathName, address, chosen, found, library

# Rows of a panel and columns of a block: what one step of the path works on.
PANELS: dict[PathName, tuple[int, int]] = {"plain": (1, 8), "avx2": (4, 8), "avx512": (16, 32), "amx": (16, 32)}
PADDING = 64  # values that a path may read beyond the last, and drops


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A sparse (rows, columns) matrix of which only the kept values are stored, laid out for one path.

    `masks` and `values` are bytes, so that casting a module that holds them leaves them as they are; so are the
    `scales` of int8 values. `numbers` is what the C code is told, `starts` the first value of each panel.
    """

    name: str
    rows: int
    columns: int
    dtype: torch.dtype
    path: PathName
    group_size: int | None
    numbers: Tensor = field(repr=False)
    masks: Tensor = field(repr=False)
    values: Tensor = field(repr=False)
    starts: Tensor = field(repr=False)
    scales: Tensor | None = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes in memory, all parts together."""
        parts = (self.numbers, self.masks, self.values, self.starts, self.scales)
        return sum(part.nbytes for part in parts if part is not None)

    def with_parts(
        self, numbers: Tensor, masks: Tensor, values: Tensor, starts: Tensor, scales: Tensor | None
    ) -> "PackedWeight":
        """The same weight with other tensors."""
        return replace(self, numbers=numbers, masks=masks, values=values, starts=starts, scales=scales)

    def expand(self) -> Tensor:
        """The dense (rows, columns) matrix, bit for bit in the dtype of the values; int8 times scales, in float32."""
        values = self.values.view(self.dtype)
        if self.path == "torch":
            dense = _expand_by_torch(self.masks, values, self.columns)
        else:
            dense = _expand_by_library(self.numbers, self.masks, values, self.starts, (self.rows, self.columns))
        return dense if self.scales is None else _scaled(dense, self.scales.view(torch.float32), self.group_size)


class Room:
    """Memory for the parts of many packed weights, in one piece and in large pages where the system has them."""

    def __init__(self, size: int) -> None:
        self._bytes, self._taken, self._lock = torch.empty(size, dtype=torch.uint8), 0, Lock()
        if loaded := found():
            loaded.secateur_large_pages(address(self._bytes), size)

    @staticmethod
    def needed(rows: int, columns: int, kept: int, dtype: torch.dtype, path: PathName) -> int:
        """What a weight takes that is laid out for a compiled path."""
        return sum(_aligned(size) for size in _part_bytes(rows, columns, kept, dtype, path))

    def take(self, size: int) -> Tensor:
        """The next bytes; may be called by several threads."""
        with self._lock:
            first, self._taken = self._taken, self._taken + _aligned(size)
        return self._bytes[first : first + size]


def _aligned(size: int) -> int:
    return -(-size // 64) * 64


def _part_bytes(rows: int, columns: int, kept: int, dtype: torch.dtype, path: PathName) -> tuple[int, int, int]:
    """Of the masks, the values and the starts."""
    height, width = PANELS[path]
    panels, blocks = -(-rows // height), -(-columns // width)
    return panels * blocks * height * width // 8, (kept + PADDING) * dtype.itemsize, 8 * (panels + 1)


def lay_out(
    bitmask: Tensor,
    values: Tensor,
    columns: int,
    *,
    scales: Tensor | None = None,
    group_size: int | None = None,
    name: str = "weight",
    path: PathName | None = None,
    room: Room | None = None,
) -> PackedWeight:
    """The matrix of a packed checkpoint, laid out for `path`, or for the one that `chosen` gives.

    `bitmask` is uint8 (rows, ceil(columns / 8)), the first column in the lowest bit, `values` 1-D with the kept
    weights row by row, in bfloat16, float16, float32 or int8. int8 needs `scales`, float32: one for each row, or
    (rows, groups) for groups of `group_size` columns. The parts lie in `room`, or in memory of their own; with path
    "torch" they are `bitmask` and `values` themselves. Raises CheckpointError, with `name`, where these do not agree.
    """
    path = path or chosen()
    rows, starts = _checked(bitmask, values, columns, name)
    scales = _checked_scales(scales, values.dtype, rows, columns, group_size, name)
    bitmask, values = bitmask.contiguous(), values.contiguous()
    loaded = None if path == "torch" else library()
    if loaded is None:
        numbers = torch.empty(0, dtype=torch.int64)
        parts = (numbers, bitmask, values.view(torch.uint8), starts)
        return PackedWeight(name, rows, columns, values.dtype, "torch", group_size, *parts, _as_bytes(scales))
    height, width = PANELS[path]
    numbers = _numbers(rows, columns, height, width, values.dtype, group_size, len(values) + PADDING, path)
    shape = (rows, columns, len(values), values.dtype, path)
    room = room or Room(Room.needed(*shape))
    masks, as_bytes, begins = map(room.take, _part_bytes(*shape))
    laid_out, panel_starts = as_bytes.view(values.dtype), begins.view(torch.int64)
    loaded.secateur_arrange(*map(address, (numbers, bitmask, values, starts, masks, laid_out, panel_starts)))
    laid_out[len(values) :] = 0
    parts = (numbers, masks, as_bytes, panel_starts)
    return PackedWeight(name, rows, columns, values.dtype, path, group_size, *parts, _as_bytes(scales))


def compact(tensor: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """The mask and the `kept` entries of a tensor, as `pack_bits` of `secateur.files.bitmask` has them.

    Raises ValueError where it has more entries than that, or fewer, that are not zero.
    """
    loaded = _of_files()
    if loaded is None:
        mask, values = pack_bits(tensor)
        found = len(values)
    else:
        tensor = tensor.contiguous()
        columns, size = tensor.shape[-1], tensor.dtype.itemsize
        mask = torch.empty(mask_shape(tensor.shape), dtype=torch.uint8)
        values = torch.empty(kept, dtype=tensor.dtype)
        rows = tensor.numel() // columns if columns else 0
        found = loaded.secateur_compact(address(tensor), rows, columns, size, address(mask), address(values), kept)
    if found != kept:
        raise ValueError(f"{kept} entries that are not zero were counted before, and now there are others")
    return mask, values


def expanded(packed: PackedTensor) -> Tensor:
    """The plain tensor of one that was read from a packed checkpoint."""
    columns = packed.shape[-1]
    if _of_files() is None or packed.kept.dtype not in KINDS or not columns:
        return packed.dense()
    dense = expand(packed.mask.view(-1, packed.mask.shape[-1]), packed.kept, columns).view(packed.shape)
    if packed.scales is None:
        return dense
    return values_of(dense, packed.scales, torch.empty(packed.shape, dtype=packed.dtype))


def _of_files() -> ctypes.CDLL | None:
    """The library, for work on files: not where plain torch is asked for, and without a warning where there is none."""
    return None if os.environ.get("SECATEUR_KERNEL") == "torch" else found()


def expand(bitmask: Tensor, values: Tensor, columns: int, *, name: str = "weight") -> Tensor:
    """The dense matrix of a packed checkpoint, bit for bit, without laying it out; int8 values stay as they are.

    Takes and raises what `lay_out` does.
    """
    rows, starts = _checked(bitmask, values, columns, name)
    bitmask, values = bitmask.contiguous(), values.contiguous()
    if _of_files() is None:
        return _expand_by_torch(bitmask, values, columns)
    numbers = _numbers(rows, columns, *PANELS["plain"], values.dtype, None, len(values), "plain")
    return _expand_by_library(numbers, bitmask, values, starts, (rows, columns))


def _numbers(
    rows: int,
    columns: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    group_size: int | None,
    capacity: int,
    path: PathName,
) -> Tensor:
    """The numbers of `packed` in native/kernel.h."""
    kind = KINDS[dtype]
    return torch.tensor([rows, columns, height, width, kind, group_size or 0, capacity, COMPILED.index(path)])


def _checked(bitmask: Tensor, values: Tensor, columns: int, name: str) -> tuple[int, Tensor]:
    """The number of rows, and where the values of each begin (rows + 1)."""
    if values.dtype not in KINDS or values.ndim != 1:
        raise CheckpointError(
            f"{name}: values are {values.dtype} {tuple(values.shape)}, "
            "expected one dimension of bfloat16, float16, float32 or int8. Pack the checkpoint again."
        )
    width = -(-columns // 8)
    if bitmask.dtype != torch.uint8 or bitmask.ndim != 2 or bitmask.shape[1] != width or columns < 1:
        raise CheckpointError(
            f"{name}: the bitmask is {bitmask.dtype} {tuple(bitmask.shape)}, "
            f"expected uint8 (rows, {width}) for {columns} columns. Pack the checkpoint again."
        )
    if bitmask.device.type != "cpu" or values.device.type != "cpu":
        raise CheckpointError(f"{name}: packed weights lie on {values.device}; they are laid out on the CPU only.")
    rows, bitmask = bitmask.shape[0], bitmask.contiguous()
    starts = torch.zeros(rows + 1, dtype=torch.int64)
    padded = -1
    if loaded := found():
        padded = loaded.secateur_row_starts(address(bitmask), rows, columns, address(starts))
    else:
        kept = _kept(bitmask)
        rows_with = kept[:, columns:].any(dim=1).nonzero()
        padded = int(rows_with[0]) if len(rows_with) else -1
        starts[1:] = kept.sum(dim=1).cumsum(0)
    if padded >= 0:
        raise CheckpointError(
            f"{name}: the bitmask keeps columns beyond {columns} in row {padded}. "
            "The file is damaged: download or pack it again."
        )
    if starts[-1] != len(values):
        raise CheckpointError(
            f"{name}: the bitmask keeps {int(starts[-1])} weights, but there are {len(values)} values. "
            "The file is damaged: download or pack it again."
        )
    return rows, starts


def _checked_scales(
    scales: Tensor | None, dtype: torch.dtype, rows: int, columns: int, group_size: int | None, name: str
) -> Tensor | None:
    if (scales is None) != (dtype != torch.int8):
        needed = "int8 values need scales" if scales is None else f"{dtype} values have no scales"
        raise CheckpointError(f"{name}: {needed}. Pack the checkpoint again.")
    if scales is None:
        return None
    if group_size is not None and (group_size < 8 or group_size % 8):
        raise CheckpointError(f"{name}: a scale is for {group_size} columns, expected a multiple of 8.")
    groups = 1 if group_size is None else -(-columns // group_size)
    if scales.dtype != torch.float32 or scales.numel() != rows * groups or scales.shape[:1] != (rows,):
        raise CheckpointError(
            f"{name}: scales are {scales.dtype} {tuple(scales.shape)}, expected float32 ({rows}, {groups}). "
            "Pack the checkpoint again."
        )
    return scales.contiguous()


def _as_bytes(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.reshape(-1).view(torch.uint8)


def _kept(bitmask: Tensor) -> Tensor:
    """Bool (rows, 8 * bytes)."""
    bits = torch.arange(8, dtype=torch.uint8)
    return (bitmask[..., None] >> bits & 1).bool().flatten(1)


def _expand_by_torch(bitmask: Tensor, values: Tensor, columns: int) -> Tensor:
    kept = _kept(bitmask)[:, :columns]
    return torch.zeros(kept.shape, dtype=values.dtype).masked_scatter_(kept, values)


def _expand_by_library(
    numbers: Tensor, masks: Tensor, values: Tensor, starts: Tensor, shape: tuple[int, int]
) -> Tensor:
    dense = torch.empty(shape, dtype=values.dtype)
    loaded = found()
    assert loaded is not None
    loaded.secateur_expand(*map(address, (numbers, masks, values, starts, dense)))
    return dense


def _scaled(dense: Tensor, scales: Tensor, group_size: int | None) -> Tensor:
    rows, columns = dense.shape
    scales = scales.reshape(rows, -1)
    if group_size is not None:
        scales = scales.repeat_interleave(group_size, dim=1)[:, :columns]
    return dense * scales
