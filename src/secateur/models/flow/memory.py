"""Returning freed memory to the system."""

import ctypes
from contextlib import suppress

LARGE_BYTES = 4 << 20
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD in malloc.h
_UNKNOWN = (OSError, AttributeError, TypeError)  # raised where the C library does not know how


def trim() -> None:
    """Return freed heap memory to the system, where the C library knows how (glibc); elsewhere do nothing.

    Memory: glibc keeps freed buffers of up to 32 MB in its heaps, where the next block's buffers do not quite fit; the
    resident size then grows with every block although nothing is held. Called once per block, this keeps it flat.
    """
    with suppress(*_UNKNOWN):
        ctypes.CDLL(None).malloc_trim(0)


def return_large() -> None:
    """From now on return every large buffer to the system as soon as it is freed, where the C library can (glibc).

    Memory: left to itself glibc takes buffers of up to 32 MB from its heaps as soon as one of that size was freed, and
    weights and activations of some megabytes then leave holes between them: up to a third of the peak. A fixed limit
    keeps the resident size at what is held. It stays set for the rest of the process.
    """
    with suppress(*_UNKNOWN):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, LARGE_BYTES)
