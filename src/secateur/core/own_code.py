"""Where somebody's own code is: the line that an error comes from, and the function that gave something wrong."""

import functools
import sysconfig
import types
from pathlib import Path
from typing import Any

import secateur

_OURS = Path(secateur.__file__).resolve().parent


@functools.cache
def installed() -> list[Path]:
    """Where libraries are installed."""
    return [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")]


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
