"""Folders for what a process needs on the disk for a while, and what is left of them where one was killed."""

import fcntl
import logging
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.filesize import decimal

from secateur.errors import CheckpointError

_PREFIX = "secateur-scratch-"
_LOCK, _INSIDE = "lock", "files"
_OPENING_SECONDS = 60  # a younger folder may be one whose process has not locked it yet

logger = logging.getLogger(__name__)


@contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """A new folder below `parent`, or below where the system keeps temporary files; it is gone at the end.

    Those that killed processes of this machine left there are removed, with a warning that tells their size. Raises
    `CheckpointError` where no folder can be made.
    """
    above = Path(tempfile.gettempdir()) if parent is None else parent
    prefix = f"{_PREFIX}{platform.node()}-"
    for left in above.glob(f"{prefix}*"):
        _remove_dead(left)
    try:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=above))
        (folder / _INSIDE).mkdir()
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CheckpointError(
            f"{above}: no folder for temporary files can be made there ({error.strerror}). "
            + ("Set TMPDIR to another one." if parent is None else "Run the command in another one.")
        ) from None
    try:
        with suppress(OSError):  # a file system without locks: whoever finds it there later cannot lock it either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield folder / _INSIDE
    finally:
        delete(folder)
        os.close(descriptor)


def _remove_dead(folder: Path) -> None:
    """Remove a scratch folder that no process holds."""
    with suppress(OSError):  # it vanishes, is no folder, has no lock yet, or its file system has no locks
        facts = folder.lstat()
        if facts.st_uid != os.getuid() or time.time() - facts.st_mtime < _OPENING_SECONDS or folder.is_symlink():
            return
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
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
