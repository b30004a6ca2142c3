"""Giving freed memory back to the system."""

import ctypes
import functools
from typing import Any


def trim() -> None:
    """Give freed heap memory back, where the C library knows how (glibc); elsewhere do nothing.

    Memory: glibc keeps freed buffers of up to 32 MB in its heaps, where the next block's buffers do not quite fit; the
    resident size then grows with every block although nothing is held. Called once per block, this keeps it flat.
    """
    library = _libc()
    if library is not None:
        library.malloc_trim(0)


@functools.cache
def _libc() -> Any:
    try:
        library = ctypes.CDLL(None)
        library.malloc_trim  # noqa: B018 - raises where there is none
    except (OSError, AttributeError, TypeError):
        return None
    return library
