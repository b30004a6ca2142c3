"""What is asked of a command: settings in dataclasses, whose fields are the options of the command line, the keys of a
configuration file and the keyword arguments of a Python function.
"""

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache
from types import NoneType
from typing import Any, Literal, ParamSpec, TypeVar, cast, get_args, get_origin, get_type_hints

from secateur.arguments import Argument, called
from secateur.errors import CalibrationError, PatternError
from secateur.shown import bar

P = ParamSpec("P")
S = TypeVar("S")
R = TypeVar("R")


ARGUMENTS, OPTIONS = "Arguments", "Options"  # panels of the help; those in the first are passed without a name


@dataclass(frozen=True)
class Option:
    """How a command line and the documentation present a field. A field without one is for Python code alone.

    `panel` is where the help shows it, `short` a second name such as "-m", `name` the first one where it is not that of
    the field. `least` is the lowest whole number that it may be, `positive` says that it must be above zero,
    and `words` that several may be separated by commas.
    """

    panel: str
    help: str
    short: str = ""
    name: str = ""
    least: int | None = None
    positive: bool = False
    words: bool = False
    error: type[Exception] = PatternError  # of a word that is no choice, and of a number that is not positive


@dataclass(frozen=True)
class Field:
    """A field of settings that is an option."""

    name: str
    kind: Any
    option: Option
    default: Any  # inspect.Parameter.empty where there is none

    @property
    def flag(self) -> str:
        """What a command line calls it: --batch-size."""
        return "--" + (self.option.name or self.name).replace("_", "-")

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that it may be; none where it may be anything."""
        return choices(self.kind)


def choices(kind: Any) -> tuple[str, ...]:
    """The words that a type allows, where it allows nothing else (but None)."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    parts = [part for part in get_args(kind) if part is not NoneType]
    return choices(parts[0]) if len(parts) == 1 and get_origin(kind) is not tuple else ()


def options(taker: Any) -> tuple[Field, ...]:
    """The options among the arguments of a function, or among the fields of a class of settings."""
    return _options(taker)


@cache
def _options(taker: Any) -> tuple[Field, ...]:
    hints = get_type_hints(taker, include_extras=True)
    found = []
    for name, parameter in inspect.signature(taker).parameters.items():
        extras = getattr(hints.get(name), "__metadata__", ())
        option = next((extra for extra in extras if isinstance(extra, Option)), None)
        if option is not None:
            found.append(Field(name, hints[name].__origin__, option, parameter.default))
    return tuple(found)


@dataclass(frozen=True, kw_only=True, eq=False)
class Settings:
    """What every class of settings checks: words that are choices, and numbers with a lowest value."""

    def __post_init__(self) -> None:
        for field in options(type(self)):
            value = getattr(self, field.name)
            if field.option.words:
                object.__setattr__(self, field.name, listed(value))
            if value is not None and field.choices and value not in field.choices:
                raise field.option.error(no_choice(field.flag, value, field.choices))
            if field.option.least is not None and isinstance(value, int) and value < field.option.least:
                raise CalibrationError(f"{field.flag}: got {value}, expected at least {field.option.least}.")
            if field.option.positive and value is not None and not 0 < value < math.inf:
                raise field.option.error(f"{field.flag}: got {value:g}, expected a positive number.")

    @classmethod
    def filled(cls, keywords: Mapping[str, Any]) -> Mapping[str, Any]:
        """Keyword arguments with those that they stand for."""
        return keywords


@dataclass(frozen=True, kw_only=True, eq=False)
class ProgressSettings(Settings):
    """Who is told how far a call is: a function of (stage, done, in all), or with True a bar."""

    progress: Callable[[str, int, int], None] | bool | None = None

    def tell(self, stage: str, done: int, total: int) -> None:
        """Tell it."""
        if callable(self.progress):
            self.progress(stage, done, total)


@contextmanager
def watched(settings: S) -> Iterator[S]:
    """The settings with a bar in the place of `progress=True`, which of events shows where they are."""
    asked: Any = settings
    progress = getattr(asked, "progress", None)
    if not hasattr(asked, "on_event") and progress is not True:
        yield settings
        return
    with bar(progress) as tell:
        if tell is None:
            yield settings
        elif hasattr(asked, "on_event"):

            def on_event(event: Any) -> None:
                asked.on_event(event)
                if event.place is not None:
                    tell(*event.place)

            yield replace(asked, progress=None, on_event=on_event)
        else:
            yield replace(asked, progress=tell)


def shared(settings: Settings, *kinds: type[Settings]) -> dict[str, Any]:
    """The values of the fields that settings have in common with these classes of settings, by name."""
    names = dict.fromkeys(field.name for kind in kinds for field in fields(kind))
    return {name: getattr(settings, name) for name in names if hasattr(settings, name)}


def no_choice(flag: str, value: object, known: tuple[str, ...]) -> str:
    """The sentence on a word that is none of those that an option may be."""
    near = difflib.get_close_matches(str(value), known, 1)
    hint = f' Did you mean "{near[0]}"?' if near else ""
    expected = f"{', '.join(known[:-1])} or {known[-1]}" if len(known) > 1 else known[0]
    return f'{flag}: got "{value}", expected {expected}.{hint}'


def taking(settings: Callable[P, S]) -> Callable[[Callable[[S], R]], Callable[P, R]]:
    """The decorator of a function of settings that makes it take the fields of the settings as its arguments."""

    def decorate(function: Callable[[S], R]) -> Callable[P, R]:
        @functools.wraps(function)
        def taken(*arguments: P.args, **keywords: P.kwargs) -> R:
            # A class in truth, whose arguments a `ParamSpec` tells of only where it is a function.
            with called(lambda: called_by_name(settings)):
                filled = cast(Any, settings).filled(keywords)
                with watched(settings(*arguments, **filled)) as made:
                    return function(made)

        signature = inspect.signature(settings)
        hints = get_type_hints(settings)  # without their `Option`s
        parameters = [one.replace(annotation=hints[one.name]) for one in signature.parameters.values()]
        returned = inspect.signature(function).return_annotation
        setattr(taken, "__signature__", inspect.Signature(parameters, return_annotation=returned))  # noqa: B010
        return taken

    return decorate


@cache
def called_by_name(taker: Any) -> Mapping[str, Argument]:
    """The arguments of a function of settings, by the names of its options; those that no option has by their own."""
    arguments = {name.replace("_", "-"): Argument(name) for name in inspect.signature(taker).parameters}
    return arguments | {field.flag[2:]: Argument.of(field.name, field.kind) for field in options(taker)}


def listed(values: Any) -> list[Any]:
    """The words of one text or several, each with commas between them; what is no text stays as it is."""
    several = values if isinstance(values, Iterable) and not isinstance(values, str) else [values]
    found: list[Any] = []
    for value in several:
        found += [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else [value]
    return found


def written(settings: Sequence[str] | Mapping[str, object], part: str = "") -> Iterator[str]:
    """Options as text: "damping=0.02" of {"damping": 0.02}, "swaps.limit=1" of {"swaps": {"limit": 1}}."""
    if not isinstance(settings, Mapping):
        yield from [settings] if isinstance(settings, str) else settings
        return
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from written(value, f"{part}{name}.")
        else:
            yield f"{part}{name}={value}"
