"""What a command says on standard error while it works, and in the file of --log-file: how much of it, and when it was.

These options stand anywhere in a command, before anything else is read: a mistake in it is told in the same way.
"""

import logging
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from secateur.cli.streams import visible
from secateur.errors import ProcessError, SecateurError
from secateur.launched import launched

GLOBAL = (
    "**In every command**: `--quiet` says nothing but warnings, errors and results; `-v` says every stage in a line; "
    "`--log-file FILE` appends what is said to a file, and every stage; `--debug` shows the traceback of an error."
)


@dataclass
class _Voice:
    quiet: bool = False
    verbose: bool = False
    debug: bool = False
    file: TextIO | None = None


_voice = _Voice()


def bars() -> bool:
    """Whether bars and spinners are shown: on a terminal, where nobody asked for less or more."""
    return sys.stderr.isatty() and not (_voice.quiet or _voice.verbose)


def quiet() -> bool:
    """Whether nothing but warnings, errors and results is wanted."""
    return _voice.quiet


def say(text: str, *, detail: bool = False, screen: bool = True) -> None:
    """Say a line on standard error, with the time where that is no terminal, and in the log.

    A `detail` is for -v and the log alone, and so is everything without `screen`, such as what a bar shows.
    """
    text = visible(text)
    if screen and not _voice.quiet and (_voice.verbose or not detail):
        print(text if sys.stderr.isatty() else f"{_now()} {text}", file=sys.stderr)
    log(text)


def log(text: str) -> None:
    """A line in the log, with the time and without credentials."""
    if _voice.file is not None:
        from secateur.files.redaction import redacted

        print(_now(), redacted(text), file=_voice.file, flush=True)


def debugging() -> bool:
    """Whether errors show their traceback."""
    return _voice.debug


@contextmanager
def speaking(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Speak as the options among these arguments ask for. Yields the other arguments.

    Raises `SecateurError` for a log that cannot be written.
    """
    others, file, given = _parted(arguments)
    _voice.quiet, _voice.verbose, _voice.debug = (flag in given for flag in ("--quiet", "-v", "--debug"))
    handler = _Lines()
    logger = logging.getLogger("secateur")
    level = logger.level
    try:
        if file is not None and _first():
            _voice.file = _opened(file)
            log(shlex.join(["secateur", *arguments]))
        logger.addHandler(handler)
        if _voice.verbose or _voice.file is not None:
            logger.setLevel(logging.INFO)
        yield others
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        if _voice.file is not None:
            _voice.file.close()
        _voice.file = None
        _voice.quiet = _voice.verbose = _voice.debug = False


class _Lines(logging.Handler):
    """Warnings as lines, also where everything else is quiet; and what is less than a warning, for -v and the log."""

    def emit(self, record: logging.LogRecord) -> None:
        text = visible(record.getMessage())
        if record.levelno >= logging.WARNING or _voice.verbose:
            print(text if sys.stderr.isatty() else f"{_now()} {text}", file=sys.stderr)
        log(text)


def _parted(arguments: Sequence[str]) -> tuple[list[str], str | None, set[str]]:
    """The arguments without those that are read here; the log file, and the flags that are given."""
    others: list[str] = []
    file: str | None = None
    given: set[str] = set()
    left = iter(arguments)
    for argument in left:
        if argument in ("--quiet", "-v", "--debug"):
            given.add(argument)
        elif argument == "--log-file":
            file = next(left, None)
            if file is None:
                raise SecateurError("--log-file needs a value.")
        elif argument.startswith("--log-file="):
            file = argument.partition("=")[2]
        else:
            others.append(argument)
    if {"--quiet", "-v"} <= given:
        raise SecateurError("--quiet, -v: one asks for less and the other for more. Give one of them.")
    return others, file, given


def _opened(name: str) -> TextIO:
    try:
        return Path(name).expanduser().open("a", encoding="utf-8")
    except OSError as error:
        raise SecateurError(f"--log-file {name}: cannot be written ({error.strerror}).") from None


def _first() -> bool:
    """Whether this process speaks: of several that share a run, the others have --log-dir."""
    try:
        return launched().rank == 0
    except ProcessError:  # which the command will tell of
        return True


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
