"""Whether errors speak of options of the command line, as they are written, or of the arguments of a call of Python.

Messages are written once, where the mistake is seen, and name options: "--samples: got 0", "use --within site". Where a
call of a public function ends in one, it comes out in the words of that call: "samples: got 0", 'use within="site"'.
Commands inside a message ("secateur eval ...") and options that the function has no argument for stay as they are.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

from secateur.errors import SecateurError

P = ParamSpec("P")
R = TypeVar("R")

_OPTION = re.compile(r"--(?P<flag>[a-z][a-z0-9]*(?:-[a-z0-9]+)*)")
_COMMAND = re.compile(r"\b(?:secateur|pip|torchrun) [a-z]+[^.,;:`]*")
_VALUE = re.compile(r' (?P<value>"[^"]*"|\{[^}]*\}|\[[^]]*\]|[^\s]*[^\s.,;:()])(?P<end>[.,;:()]*)')
_LOOKS_GIVEN = re.compile(r"[0-9A-Z=/_+*.:]")  # a number, a placeholder, a name or a file, and no word of a sentence
_BARE = re.compile(r"(?:[Ll]eave|[Ww]ithout|no) $")  # before an option that is to be left out
_spoken = "arguments"


@dataclass(frozen=True)
class Argument:
    """What a function calls an option, the words that it may be, and whether it is true or false."""

    name: str
    words: tuple[str, ...] = ()
    truth: bool = False

    @classmethod
    def of(cls, name: str, kind: Any) -> "Argument":
        """The argument of that type."""
        return cls(name, tuple(_words(kind)), kind is bool)


def _words(kind: Any) -> Iterator[str]:
    if get_origin(kind) is Literal:
        yield from (word for word in get_args(kind) if isinstance(word, str))
        return
    for part in get_args(kind):
        yield from _words(part)


def speaks_of_options() -> bool:
    """Whether errors keep to options, because a command is run."""
    return _spoken == "options"


@contextmanager
def command_line() -> Iterator[None]:
    """Errors keep to options inside the block: somebody has typed some."""
    global _spoken
    before, _spoken = _spoken, "options"
    try:
        yield
    finally:
        _spoken = before


@contextmanager
def called(arguments: Callable[[], Mapping[str, Argument]]) -> Iterator[None]:
    """Errors that leave the block speak of these arguments, by the names of their options, where no command is run."""
    try:
        yield
    except SecateurError as error:
        if not speaks_of_options() and error.args and isinstance(error.args[0], str):
            error.args = (in_a_call(error.args[0], arguments()), *error.args[1:])
        raise


def calling(function: Callable[P, R]) -> Callable[P, R]:
    """The function, whose errors speak of its own arguments."""

    def arguments() -> Mapping[str, Argument]:
        hints = get_type_hints(function)
        names = inspect.signature(function).parameters
        return {name.replace("_", "-"): Argument.of(name, hints.get(name)) for name in names}

    @functools.wraps(function)
    def call(*positional: P.args, **keywords: P.kwargs) -> R:
        with called(arguments):
            return function(*positional, **keywords)

    return call


def in_a_call(text: str, arguments: Mapping[str, Argument]) -> str:
    """A message about options in the words of a call that has these arguments, by the names of their options."""
    commands = [match.span() for match in _COMMAND.finditer(text)]
    parts, end = [], 0
    for match in _OPTION.finditer(text):
        argument = arguments.get(match["flag"])
        inside = any(first <= match.start() < last for first, last in commands)
        if argument is None or inside or match.start() < end:
            continue
        own, after = argument.name, match.end()
        value = _VALUE.match(text, after)
        if value is not None and _is_value(value, argument):
            own, after = f"{own}={_written(value['value'])}", value.end("value")
        elif argument.truth and text[after : after + 1] != ":" and not _BARE.search(text, 0, match.start()):
            own = f"{own}=True"
        parts += [text[end : match.start()], own]
        end = after
    return "".join([*parts, text[end:]])


def _is_value(found: re.Match[str], argument: Argument) -> bool:
    """Whether what follows an option is what it is set to, or goes on with the sentence."""
    value = found["value"]
    if argument.truth:
        return False
    if value[0] in '"{[' or value in (*argument.words, "cpu", "auto"):
        return True
    return bool(_LOOKS_GIVEN.search(value)) or found["end"].startswith(":")


def _written(value: str) -> str:
    """A value as Python has it."""
    return value if value[0] in '"{[' or re.fullmatch(r"\d+(\.\d+)?(e-?\d+)?", value) else f'"{value}"'
