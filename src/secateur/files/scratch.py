"""Folders for what a process needs on the disk for a while, and what is left of them where one was killed."""

import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.filesize import decimal

_PREFIX = "secateur-scratch-"
_OPENING_SECONDS = 60  # a younger folder may be one whose process has not locked it yet

logger = logging.getLogger(__name__)


@contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """A new folder in `parent`, or where the system keeps temporary files; it is gone at the end.

    Those that killed processes of the same user left there are removed, with a warning that tells their size.
    """
    above = Path(tempfile.gettempdir()) if parent is None else parent
    for left in above.glob(f"{_PREFIX}*"):
        _remove_dead(left)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=above))
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield folder
    finally:
        delete(folder)
        os.close(descriptor)


def _remove_dead(folder: Path) -> None:
    """Remove a scratch folder that no process holds."""
    with suppress(OSError):  # it vanishes, or its file system has no locks
        facts = folder.lstat()
        if facts.st_uid != os.getuid() or time.time() - facts.st_mtime < _OPENING_SECONDS:
            return
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size = bytes_below(folder)
            delete(folder)
        finally:
            os.close(descriptor)
        logger.warning("%s: left by a process that was killed (%s); removed.", folder, decimal(size))


def delete(entry: Path) -> None:
    """Remove a file, a link or a whole folder, as far as the system allows it."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        with suppress(OSError):
            entry.unlink()


def bytes_below(folder: Path) -> int:
    """The size of all files below a folder; links are not followed."""
    return sum(file.lstat().st_size for file in entries_below(folder) if not file.is_dir())


def entries_below(folder: Path) -> Iterator[Path]:
    """Everything below a folder; symbolic links are not followed."""
    for above, folders, files in os.walk(folder):
        yield from (Path(above) / name for name in (*folders, *files))
