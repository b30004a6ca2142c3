"""Where somebody's own code is: the line that an error comes from, and the function that returned something wrong."""

import functools
import sysconfig
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import secateur
from secateur.errors import MethodError, SecateurError

_OURS = Path(secateur.__file__).resolve().parent


@functools.cache
def installed() -> list[Path]:
    """Where libraries are installed."""
    return [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")]


@functools.cache
def is_own(file: str) -> bool:
    """Whether a file, by its name in compiled code, is neither ours nor of an installed library."""
    if file.startswith("<frozen"):
        return False
    path = Path(file).resolve()
    return not any(path.is_relative_to(folder) for folder in (_OURS, *installed()))


def raised_at(error: BaseException) -> str | None:
    """FILE:LINE, in FUNCTION of the last frame of an error that is in somebody's own code, or None."""
    found, trace = None, error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if is_own(code.co_filename):
            found = f"{code.co_filename}:{trace.tb_lineno}, in {code.co_name}"
        trace = trace.tb_next
    return found


def written_at(function: Any) -> str | None:
    """FILE:LINE of a function that is somebody's own, also inside a partial, or of the class of an object; or None."""
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(function, "__code__", None)
    if not isinstance(code, types.CodeType):
        code = getattr(vars(type(function)).get("__call__"), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None and is_own(code.co_filename) else None


@contextmanager
def blamed(what: str, function: Any = None, *, always: bool = False) -> Iterator[None]:
    """Turn errors of somebody's own code into a `MethodError` that says what failed, and where.

    Where the error names no place, it is that of `function`. An error from our own code goes on as it is, unless
    `always`.
    """
    try:
        yield
    except (SecateurError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        place = raised_at(error) or written_at(function)
        if place is None and isinstance(error, SyntaxError) and error.filename:
            place = f"{error.filename}:{error.lineno}"
        if place is None and not always:
            raise
        found = error.args[0] if isinstance(error, KeyError) and error.args else error
        where = "" if place is None else f" ({place})"
        raise MethodError(f"{what} {type(error).__name__}: {found}{where}.") from error
