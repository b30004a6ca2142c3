"""Names in the file system: renames that replace nothing, the exchange of two names, and names that are unique."""

import ctypes
import errno
import os
import secrets
from collections.abc import Callable
from functools import cache
from pathlib import Path

_AT_FDCWD = -100
_NOREPLACE, _EXCHANGE = 1, 2
_UNKNOWN = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}  # the system, or this file system, has no such rename


@cache
def _renameat2() -> Callable[..., int] | None:
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
        function.restype = ctypes.c_int
    return function


def _rename(source: Path, target: Path, flag: int) -> bool:
    """Whether the system renamed in that way; False where it knows no such rename. Raises `OSError`."""
    function = _renameat2()
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNKNOWN:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


def unique(name: str) -> str:
    """The name with a random ending, for a file that no other process may take for its own."""
    return f"{name}-{secrets.token_hex(6)}"


def rename_new(source: Path, target: Path) -> None:
    """Rename a file or folder to a name that is free. Raises `FileExistsError` where it is not."""
    if _rename(source, target, _NOREPLACE):
        return
    if source.is_dir():
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        try:
            source.rename(target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR, errno.EEXIST):  # taken in the meantime
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
            raise
    else:
        os.link(source, target, follow_symlinks=False)
        source.unlink()


def exchange(source: Path, target: Path, aside: Path) -> None:
    """Let two files or folders change their names, in one step where the system can; else through `aside`.

    Raises `FileExistsError` when somebody takes the name `target` between two steps; what had it is then `aside`.
    """
    if _rename(source, target, _EXCHANGE):
        return
    target.rename(aside)
    rename_new(source, target)
    aside.rename(source)
