"""Standard streams that are closed, full, broken, or of seven bits: what becomes of a command then."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Control characters, and those that turn the direction of what follows.
_WRITTEN_OUT = {
    code: chr(code).encode("unicode_escape").decode("ascii")
    for code in (*range(32), *range(127, 160), 0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))
    if chr(code) not in "\n\t"
}


def visible(text: str) -> str:
    """The text with everything written out that a terminal would obey rather than show, but for ends of lines.

    Names in files of others may hold such characters: they can hide text, move the cursor, or reverse what is read.
    """
    return text.translate(_WRITTEN_OUT)


def print_error(text: str) -> None:
    """Print a line to standard error, in red on a terminal, without credentials."""
    from secateur.files.redaction import redacted

    text = visible(redacted(text))
    print(f"\x1b[31m{text}\x1b[0m" if sys.stderr.isatty() else text, file=sys.stderr)


BROKEN_PIPE = 141  # what a shell shows for a program that a closed pipe ended


class _OutputError(Exception):
    """Standard output cannot be written. Not an `OSError`, which the libraries in between would take for their own."""


class _Guarded:
    """A text stream whose errors are told apart from those of other files, or, where nobody can read them, dropped."""

    def __init__(self, stream: Any, drop: bool) -> None:
        self._stream = stream
        self._drop = drop
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # rather no accent than no output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Any, *arguments: str) -> None:
        try:
            action(*arguments)
        except OSError as error:
            if not self._drop:
                raise _OutputError(error.strerror) from error


@contextmanager
def guarded_streams() -> Iterator[None]:
    """Standard streams that are there. Exits with 1 when standard output is full, and quietly when nobody reads it.

    What is written to a closed stream is dropped, and to a standard error that cannot be written as well.
    """
    _open_closed()
    output, errors = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Guarded(output, drop=False), _Guarded(errors, drop=True)
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except _OutputError as error:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)  # what is still in the buffer goes nowhere when the interpreter ends
        os.close(null)
        if isinstance(error.__cause__, BrokenPipeError):
            sys.exit(BROKEN_PIPE)
        sys.stderr.write(f"Error: standard output cannot be written ({error}).\n")
        sys.exit(1)
    finally:
        sys.stderr.flush()
        sys.stdout, sys.stderr = output, errors


def _open_closed() -> None:
    """Open the null device for closed streams; else a file opened later gets their number, and is printed into."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115
