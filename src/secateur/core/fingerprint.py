"""What a method depends on, by name and value: what must be the same for its earlier results to stand for new ones.

Of functions that are not ours that is their compiled code, their defaults, the values that they close over, and all
this again of the functions, classes, values and modules that they mention. Compiled code, and not the text of a file,
because it is what runs: the file may have changed since it was read, and what was typed into an interpreter has none.
Of our own methods it is name, options and `revision`, which is raised when their results change.
"""

import contextlib
import dis
import enum
import functools
import hashlib
import importlib
import inspect
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.core.needs import gradient_kind, input_statistics
from secateur.core.own_code import installed
from secateur.core.problem import Method, Refinement
from secateur.errors import PatternError

REVISION = 1  # of what all methods stand on (patterns, statistics, the loop); raise it when that changes results

_OURS = "secateur"
_SPOKEN = 40  # characters of a value that an error shows
_LONG = 80  # characters of a value that is recorded as it is; longer ones by their digest
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), range, torch.dtype, torch.device)
_ALL_NAMES = {"globals", "vars", "eval", "exec", "getattr", "__import__", "import_module"}  # may reach any global


def fingerprint(method: Method) -> dict[str, str]:
    """What the results of a method depend on beside its problem: names of values, and values, or digests of them.

    Two methods with equal fingerprints return equal solutions. Raises `PatternError` for a method that holds
    something that cannot be compared in that way, such as an open file.
    """
    try:
        walk = _Walk(method.name)
        walk.follow(method, "")
        return {"revision": str(REVISION), **walk.parts}
    except RecursionError:
        raise PatternError(f"{method.name}: what it depends on is nested too deeply to be told apart later.") from None


def recorded(method: Method) -> dict[str, str]:
    """The fingerprint, or, for a method that can have none, why: for records that nothing is compared with."""
    try:
        return fingerprint(method)
    except PatternError as error:
        return {"unknown": str(error)}


def difference(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """In words, the first thing in which two fingerprints differ, or None."""
    for name in [*before, *(name for name in now if name not in before)]:
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if old is None or new is None:
            return f"{name} is {'new' if old is None else 'gone'}"
        if name.startswith("code of "):
            return f"the {name} has changed"
        if max(len(old), len(new)) > _SPOKEN or old.startswith("sha256 ") or new.startswith("sha256 "):
            return f"{name} has changed"
        return f"{name} was {old}, is {new}"
    return None


class _Walk:
    """One walk over all that a method holds."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.parts: dict[str, str] = {}
        self.names: dict[int, str] = {}  # of what was met, by identity
        self.alive: list[Any] = []  # so that no identity is used twice
        self.packages: set[str] = set()  # to follow although they are installed

    def follow(self, value: Method | Refinement, inside: str) -> str:
        self._part(f"{inside}name", repr(value.name))
        self._part(f"{inside}revision of {value.name}", str(value.revision))
        for option, chosen in value.options.items():
            self._part(f"{inside}option {option}", self._text(chosen, f"option {option}"))
        kinds = sorted(input_statistics(value.needs), key=lambda kind: f"{kind.__module__}.{kind.__qualname__}")
        self._part(f"{inside}needs", ", ".join(self._class(kind) for kind in kinds))
        if isinstance(value, Method):
            self._part(f"{inside}per", repr(value.per))
            self._part(f"{inside}gradient", repr(value.gradient))
        for text in sorted(self._text(need, "a need") for need in value.needs - {*kinds, gradient_kind(value.needs)}):
            self._part(f"{inside}need", text)
        self._given(value.solve if isinstance(value, Method) else value.refine)
        return value.name

    def _part(self, name: str, value: str) -> str:
        """Record a value, under another name where this one is taken by something else; returns the name."""
        place, number = name, 1
        while self.parts.setdefault(place, value) != value:
            number += 1
            place = f"{name} ({number})"
        return place

    def _text(self, value: Any, where: str) -> str:
        """A text that is equal for equal values. What is to be compared by itself becomes a part of its own."""
        if isinstance(value, _PLAIN):
            return _short(f"{type(value).__name__}({value!r})" if isinstance(value, enum.Enum) else repr(value))
        if id(value) in self.names:
            return self.names[id(value)]
        self.alive.append(value)
        self.names[id(value)] = f"what is in {where}"
        text = self._object(value, where)
        self.names[id(value)] = text
        return text

    def _object(self, value: Any, where: str) -> str:
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.device.type == "meta":
                raise self._unknown(where, value)
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            return f"{value.dtype} {tuple(value.shape)} {_digest(data)}"
        if isinstance(value, Mapping):
            items = [(self._text(key, where), self._text(item, f"{where}[{key!r}]")) for key, item in value.items()]
            return _short(f"{type(value).__name__}({items})")
        if isinstance(value, list | tuple | set | frozenset):
            texts = [self._text(item, where) for item in value]
            return _short(f"{type(value).__name__}({sorted(texts) if isinstance(value, set | frozenset) else texts})")
        if isinstance(value, Method | Refinement):
            return self.follow(value, f"{value.name}: ")
        if isinstance(value, types.ModuleType):
            return self._module(value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, functools.partial):
            return _short(f"partial({[self._text(part, where) for part in (value.func, value.args, value.keywords)]})")
        if isinstance(value, types.MethodType):
            return _short(f"method({[self._text(part, where) for part in (value.__func__, value.__self__)]})")
        if isinstance(value, staticmethod | classmethod):
            return self._text(value.__func__, where)
        if isinstance(value, property):
            return _short(repr([self._text(part, where) for part in (value.fget, value.fset)]))
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if inspect.isroutine(value) and not hasattr(value, "__wrapped__"):
            return f"{getattr(value, '__module__', None)}.{value.__qualname__}"
        return self._instance(value, where)

    def _instance(self, value: Any, where: str) -> str:
        """Any other object, by its class and by what a copy of it would be made of."""
        kind = self._class(type(value))
        if hasattr(value, "__wrapped__"):
            return _short(f"{kind}({self._text(value.__wrapped__, where)})")
        if is_dataclass(value):
            state = {entry.name: getattr(value, entry.name) for entry in fields(value)}
            return _short(f"{kind}({self._text(state, where)})")
        try:
            made = value.__reduce_ex__(4)
        except Exception:  # whatever an object of somebody's does
            raise self._unknown(where, value) from None
        if isinstance(made, str):
            return f"{kind}.{made}"
        maker, arguments, *state = made
        contents = [list(part) if isinstance(part, Iterator) else part for part in state]
        return _short(f"{kind}({[self._text(part, where) for part in (maker, arguments, contents)]})")

    def _unknown(self, where: str, value: Any) -> PatternError:
        return PatternError(
            f"{self.method}: {where} holds a {type(value).__module__}.{type(value).__qualname__}, of which nobody can "
            "say later whether it is the same, and what is kept must name all that it depends on. Make the method from "
            "numbers, text, tensors and functions."
        )

    def _follows(self, module: str) -> bool:
        """Whether the code of a module is to be looked into: somebody's own, and not an installed library."""
        top = module.partition(".")[0]
        if top in self.packages:
            return True
        if top == _OURS or top in sys.stdlib_module_names:
            return False
        file = getattr(sys.modules.get(module) or sys.modules.get(top), "__file__", None)
        if file is None:  # an interpreter, or a module made by hand
            return module in sys.modules or top == "__main__"
        return not any(Path(file).resolve().is_relative_to(folder) for folder in installed())

    def _library(self, module: str, name: str) -> str:
        version = getattr(sys.modules.get(module.partition(".")[0]), "__version__", "")
        return name if module.startswith(_OURS) else f"{name} {version}".rstrip()

    def _class(self, kind: type) -> str:
        name = f"{kind.__module__}.{kind.__qualname__}"
        if not self._follows(kind.__module__):
            return self._library(kind.__module__, name)
        if id(kind) not in self.names:
            self.alive.append(kind)
            self.names[id(kind)] = name
            for base in kind.__bases__:
                self._class(base)
            skipped = {"__module__", "__dict__", "__weakref__", "__doc__", "__abstractmethods__", "_abc_impl"}
            for entry, value in vars(kind).items():
                if entry not in skipped and not isinstance(value, types.MemberDescriptorType):
                    text = self._text(value, f"{name}.{entry}")
                    if not isinstance(value, types.FunctionType):
                        self._part(f"{entry} in {name}", text)
        return name

    def _module(self, module: types.ModuleType) -> str:
        if not self._follows(module.__name__):
            return self._library(module.__name__, module.__name__)
        self.names[id(module)] = module.__name__
        for name, value in vars(module).items():
            if not name.startswith("__"):
                self._global(name, value, vars(module))
        return module.__name__

    def _function(self, function: types.FunctionType) -> str:
        module, ours = function.__module__ or "", (function.__module__ or "").partition(".")[0] == _OURS
        name = f"{module}.{function.__qualname__}"
        closed = _closed_over(function)
        if ours:
            # Our values are in the options; what others gave us is not.
            for value in closed.values():
                self._given(value)
            return name
        if not self._follows(module):
            for key, value in closed.items():
                self._part(f"{key} in {name}", self._text(value, f"{key} in {name}"))
            return self._library(module, name)
        self.parts.setdefault("python", f"{sys.version_info.major}.{sys.version_info.minor}")
        self.names[id(function)] = name
        place = self._part(f"code of {name}", f"sha256 {_digest(_code(function.__code__).encode())}")
        name = place.removeprefix("code of ")
        self.names[id(function)] = name
        parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
        defaults = {own.name: own.default for own in parameters if own.default is not own.empty}
        for key, value in {**defaults, **closed}.items():
            self._part(f"{key} in {name}", self._text(value, f"{key} in {name}"))
        mentioned = set(_mentioned(function.__code__, "LOAD_GLOBAL", "LOAD_NAME"))
        every = [key for key in function.__globals__ if not key.startswith("__")] if mentioned & _ALL_NAMES else []
        for key in sorted({*mentioned, *every} & function.__globals__.keys()):
            self._global(key, function.__globals__[key], function.__globals__)
        for key in sorted(set(_mentioned(function.__code__, "IMPORT_NAME"))):
            self._imported(key, str(function.__globals__.get("__package__") or ""))
        return name

    def _given(self, value: Any) -> None:
        """What a function of ours was given by others: the code of a method, and its parts."""
        if isinstance(value, tuple | list):
            for item in value:
                self._given(item)
        elif isinstance(value, Method | Refinement):
            self._text(value, value.name)
        elif callable(value) and not isinstance(value, type | contextlib.ContextDecorator):
            home = (getattr(value, "__module__", None) or type(value).__module__).partition(".")[0]
            if home not in (_OURS, "torch", "numpy") and home not in sys.stdlib_module_names:
                self.packages.add(home)
            text = self._text(value, "its score or solve")
            if not isinstance(value, types.FunctionType):
                self._part("its score or solve", text)

    def _global(self, name: str, value: Any, home: Mapping[str, Any]) -> None:
        where = f"{name} in {home.get('__name__', '?')}"
        try:
            text = self._text(value, where)
        except PatternError:
            # Made by the module itself, when it was read.
            file = home.get("__file__")
            if file is None:
                raise
            text = f"sha256 {_digest(Path(file).read_bytes())}"
        if not isinstance(value, types.FunctionType | types.ModuleType | type):
            self._part(where, text)

    def _imported(self, name: str, package: str) -> None:
        for found in (name, f"{package}.{name}"):
            if found in sys.modules:
                self._text(sys.modules[found], found)
                return
        try:
            self._text(importlib.import_module(name), name)
        except PatternError:
            raise
        except Exception as error:  # which is for the function itself to meet
            self._part(f"import of {name}", type(error).__name__)


def _closed_over(function: types.FunctionType) -> dict[str, Any]:
    values = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a cell that nothing was put into
            values[name] = cell.cell_contents
    return values


def _mentioned(code: types.CodeType, *operations: str) -> Iterator[str]:
    for instruction in dis.get_instructions(code):
        if instruction.opname in operations:
            yield str(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _mentioned(constant, *operations)


def _code(code: types.CodeType) -> str:
    """All that decides what compiled code does, without where it stands."""
    shape = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    return repr((code.co_code, code.co_exceptiontable, shape, names, [_constant(item) for item in code.co_consts]))


def _constant(value: Any) -> str:
    if isinstance(value, types.CodeType):
        return _code(value)
    if isinstance(value, tuple | frozenset):
        texts = [_constant(item) for item in value]
        return f"{type(value).__name__}({sorted(texts) if isinstance(value, frozenset) else texts})"
    return repr(value)


def _short(text: str) -> str:
    return text if len(text) <= _LONG else f"sha256 {_digest(text.encode())}"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
