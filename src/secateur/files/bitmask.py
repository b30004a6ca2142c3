"""A tensor as one bit for each entry and the entries that are kept, and back: exact, for every dtype.

An entry is kept unless all of its bits are zero. That keeps -0.0, which equals zero: only so are the bytes that come
back the bytes that went in, whatever wrote them.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.errors import CheckpointError

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_AT_ONCE = 1 << 18  # entries: what is made of them on the way stays in the cache


def mask_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of the mask of a tensor of at least one dimension: the last one takes a bit, and each row whole bytes."""
    return (*shape[:-1], -(-shape[-1] // 8))


def count_kept(tensor: Tensor) -> int:
    """How many entries have a bit that is not zero."""
    return int(np.count_nonzero(_integers(tensor)))


def pack_bits(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The mask (uint8, of `mask_shape`) and the kept entries (flat, in rows, of the tensor's dtype).

    Bit j of byte i of a row, counted from the least significant, stands for entry 8 i + j. Bits after the last entry
    of a row are zero.
    """
    entries = _integers(tensor)
    mask = torch.zeros(mask_shape(tensor.shape), dtype=torch.uint8)
    kept = torch.empty(int(np.count_nonzero(entries)), dtype=tensor.dtype)
    if not tensor.numel():
        return mask, kept
    values, done = _integers(kept), 0
    rows, bits = entries.reshape(-1, tensor.shape[-1]), mask.numpy().reshape(-1, mask.shape[-1])
    for part in _parts(rows):
        chosen = rows[part] != 0
        bits[part] = np.packbits(chosen, axis=1, bitorder="little")
        found = np.compress(chosen.reshape(-1), rows[part].reshape(-1))
        values[done : done + len(found)] = found
        done += len(found)
    return mask, kept


def expand(mask: Tensor, kept: Tensor, shape: Sequence[int], out: Tensor | None = None) -> Tensor:
    """The tensor of a mask and of kept entries that `check_mask` has found to belong together: of `kept`'s dtype.

    `out`, contiguous, of that shape and dtype, is filled and returned where it is given.
    """
    out = torch.empty(tuple(shape), dtype=kept.dtype) if out is None else out
    if not out.numel():
        return out
    values, done = _integers(kept), 0
    rows, bits = _integers(out).reshape(-1, shape[-1]), mask.numpy().reshape(-1, mask.shape[-1])
    for part in _parts(rows):
        chosen = np.unpackbits(bits[part], axis=1, count=rows.shape[1], bitorder="little")
        places = np.flatnonzero(chosen.view(np.bool_))  # several times as fast as of numbers
        flat = rows[part].reshape(-1)
        flat[:] = 0
        flat[places] = values[done : done + len(places)]
        done += len(places)
    return out


def check_mask(mask: Tensor, columns: int, kept: int, where: str) -> None:
    """Raise `CheckpointError` unless a mask keeps exactly so many entries, in rows of so many columns."""
    bits: NDArray[np.uint8] = mask.numpy().reshape(-1)
    found = count_bits(bits)
    if found != kept:
        raise CheckpointError(
            f"{where}: its mask keeps {found:,} entries, and {kept:,} values are stored. The file is damaged; copy or "
            "download it again."
        )
    if columns % 8 and bits.size and bool((bits.reshape(-1, mask.shape[-1])[:, -1] >> (columns % 8)).any()):
        raise CheckpointError(
            f"{where}: its mask has bits after the last of {columns} columns. The file is damaged; copy or download it "
            "again."
        )


def count_bits(bits: NDArray[np.uint8]) -> int:
    """How many bits of flat contiguous bytes are one."""
    whole = bits.size // 8 * 8
    words = np.frombuffer(bits[:whole].data, dtype=np.uint64) if whole else np.zeros(0, np.uint64)
    return int(np.bitwise_count(words).sum(dtype=np.int64)) + int(np.bitwise_count(bits[whole:]).sum(dtype=np.int64))


def _integers(tensor: Tensor) -> NDArray[Any]:
    """The entries as flat integers of the same bits; a view where the tensor is contiguous."""
    array: NDArray[Any] = tensor.detach().contiguous().reshape(-1).view(_INTEGERS[tensor.dtype.itemsize]).numpy()
    return array


def _parts(rows: NDArray[Any]) -> Iterator[slice]:
    """Rows, as many at a time as fit into the cache."""
    step = max(1, _AT_ONCE // max(1, math.prod(rows.shape[1:])))
    return (slice(start, start + step) for start in range(0, len(rows), step))
