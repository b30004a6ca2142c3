"""Giving freed memory back to the system."""

import ctypes
import functools
from typing import Any

LARGE_BYTES = 4 << 20
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD in malloc.h


def trim() -> None:
    """Give freed heap memory back, where the C library knows how (glibc); elsewhere do nothing.

    Memory: glibc keeps freed buffers of up to 32 MB in its heaps, where the next block's buffers do not quite fit; the
    resident size then grows with every block although nothing is held. Called once per block, this keeps it flat.
    """
    library = _libc()
    if library is not None:
        library.malloc_trim(0)


def return_large() -> None:
    """From now on give every large buffer back to the system at once, where the C library knows how (glibc).

    Memory: left to itself glibc takes buffers of up to 32 MB from its heaps as soon as one of that size was freed, and
    weights and activations of some megabytes then leave holes between them: up to a third of the peak. A fixed limit
    keeps the resident size at what is held. It stays set for the rest of the process.
    """
    library = _libc()
    if library is not None:
        library.mallopt(_MMAP_THRESHOLD, LARGE_BYTES)


@functools.cache
def _libc() -> Any:
    try:
        library = ctypes.CDLL(None)
        library.malloc_trim  # noqa: B018 - raises where there is none
        library.mallopt  # noqa: B018
    except (OSError, AttributeError, TypeError):
        return None
    return library
