"""Freed memory: kept for the next block, and returned to the system before it piles up."""

import ctypes
from contextlib import suppress
from pathlib import Path

import psutil

from secateur.launched import launched

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in malloc.h
LARGE_BYTES = 4 << 20
_LARGEST_KEPT = 16 << 20
_END_BYTES = 1 << 30  # what may lie free at the end of the heap
_PILE_BYTES = 192 << 20
_OWN_GROUP, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_UNKNOWN = (OSError, AttributeError, TypeError)  # raised where the C library does not know how


def available_bytes() -> int:
    """The host's memory that is free now, or what is left of the limit of the container that this process runs in.

    Of several processes that share a run on this machine each has an equal part.
    """
    return min([psutil.virtual_memory().available, *_left_of_limits()]) // (launched().local_count or 1)


def _left_of_limits() -> list[int]:
    """What is left of every limit on this process, as version 2 of Linux's control groups tells it.

    Memory: pages of files that nobody has used lately count towards a limit, but make room.
    """
    left = []
    with suppress(OSError, ValueError):
        lines = _OWN_GROUP.read_text(encoding="utf-8").splitlines()
        own = next((line[3:].strip("/ ") for line in lines if line.startswith("0::")), None)
        if own is None:
            return []
        group = _GROUPS if ".." in Path(own).parts else _GROUPS / own  # of a process that was moved out of sight
        for folder in (group, *group.parents):
            if not folder.is_relative_to(_GROUPS):
                break
            with suppress(OSError, ValueError):
                limit, used = (
                    int((folder / f"memory.{name}").read_text(encoding="utf-8")) for name in ("max", "current")
                )
                lines = (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
                idle = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
                left.append(max(0, limit - used + idle))
    return left


def trim() -> None:
    """Return freed heap memory to the system, where the C library knows how (glibc); elsewhere do nothing."""
    with suppress(*_UNKNOWN):
        ctypes.CDLL(None).malloc_trim(0)


def pile_limit(forward_bytes: int) -> int:
    """Bytes of freed memory that may pile up where `forward_bytes` is the largest buffer of a forward; see below."""
    return _PILE_BYTES if 0 < forward_bytes <= _LARGEST_KEPT else 0


def return_large(forward_bytes: int = 0) -> int:
    """From now on return every large buffer to the system as soon as it is freed, where the C library can (glibc).

    Large are more than 4 MiB; where `forward_bytes`, the largest buffer of a forward, is not above 16 MiB, what is
    larger than that. Returns how many bytes of freed memory may then pile up; see `FreedMemory`. The limit stays set
    for the rest of the process.

    Memory: left to itself glibc takes buffers of up to 32 MB from its heaps as soon as one of that size was freed, and
    weights and activations of some megabytes then leave holes between them: up to a third of the peak. A fixed limit
    keeps the resident size at what is held.
    Fast: but memory that is new from the system costs a page fault for every 4 KiB: a fifth of the time, where blocks
    are small. What their forwards need is kept.
    """
    pile = pile_limit(forward_bytes)
    with suppress(*_UNKNOWN):
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, max(LARGE_BYTES, forward_bytes) if pile else LARGE_BYTES)
        if pile:
            library.mallopt(_TRIM_THRESHOLD, _END_BYTES)
    return pile


class FreedMemory:
    """What the blocks of a pass have freed, and the next ones may use.

    Memory: not every buffer fits into a hole, and the resident size would grow from block to block although nothing is
    held.
    """

    def __init__(self, pile_bytes: int) -> None:
        self._pile_bytes = pile_bytes
        self._process = psutil.Process()
        self._first: int | None = None  # resident after the first block

    def after_block(self) -> None:
        """Return it to the system, if the process has grown by more than `pile_bytes` since the first block."""
        resident = self._process.memory_info().rss
        self._first = self._first or resident
        if not self._pile_bytes or resident > self._first + self._pile_bytes:
            trim()
