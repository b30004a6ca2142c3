"""From names to the methods and patterns that they stand for, also those of one's own modules and files."""

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

from secateur.core.choices import Group
from secateur.core.own_code import blamed
from secateur.core.patterns import NM, Pattern, Unstructured, parse_pattern, with_group
from secateur.core.problem import Method, Refinement, chain
from secateur.errors import PatternError
from secateur.methods import METHODS, REFINEMENTS
from secateur.plans import ALLOCATIONS
from secateur.plans.allocated import Allocated, read_plan
from secateur.plans.allocation import Allocation
from secateur.plans.plan import Plan
from secateur.pruning.settings import PruneSettings
from secateur.runs.options import written

S = TypeVar("S", bound=PruneSettings)

_OWN = "; or MODULE:FUNCTION or FILE.py:FUNCTION for one of your own"
_SHOWN = 12  # names that an error lists


def method_of(name: str, settings: Sequence[str] = (), **options: object) -> Method:
    """The method that a name stands for, also refined by others (wanda+swaps).

    One of ours, or MODULE:FUNCTION or FILE.py:FUNCTION. `options` go to its factory; those that are None were not
    given. `settings` are options as text: "damping=0.02" of the method, "least_squares.damping=0.02" of a refinement.
    Underscores and hyphens are the same. Raises `PatternError` for names and options that are none, and `MethodError`
    for own code that fails.
    """
    options = {option: value for option, value in options.items() if value is not None}
    home, colon, end = name.rpartition(":")
    first, *rest = end.split("+")
    first, rest = f"{home}{colon}{first}", [part.replace("-", "_") for part in rest]
    own = bool(home and colon and first != f"{home}:")
    if not own:
        first = first.replace("-", "_")
        _check_known(first, METHODS, "method", _OWN)
    for part in rest:
        _check_known(part, REFINEMENTS, "refinement")
    for option in options:
        if own:
            raise PatternError(f"--{option}: has no meaning for {first}; use --option {option}={options[option]}.")
        if option not in inspect.signature(METHODS[first]).parameters:
            others = [other for other in METHODS if option in inspect.signature(METHODS[other]).parameters]
            raise PatternError(f"--{option}: the method {first} has no such option; {', '.join(others)} do.")
    found = _own(first) if own else METHODS[first]
    factories: dict[str, Any] = {first: found, **{part: REFINEMENTS[part] for part in rest}}
    given: dict[str, dict[str, object]] = {part: {} for part in factories}
    given[first] = options
    for setting in settings:
        part, option, value = _setting(setting, first, factories)
        given[part][option] = value
    method = _made(f"--method {first}", found, given[first]) if own else found(**given[first])
    return chain(method, *(REFINEMENTS[part](**given[part]) for part in rest)) if rest else method


def resolved(settings: S) -> S:
    """The settings with the method and the pattern themselves in the place of their names and options."""
    pattern, plan = settings.pattern, settings.plan
    if plan is None:
        pattern = as_pattern(pattern, settings.sparsity, settings.per)
    elif not (isinstance(plan, Allocated) and pattern is plan.plan):
        plan = _given_plan(settings)
        pattern = plan.plan
    method = as_method(settings.method, settings.option, norm=settings.norm, alpha=settings.alpha)
    made = replace(settings, method=method, norm=None, alpha=None, option=())
    return replace(made, pattern=pattern, plan=plan, sparsity=None, per=None)


def _given_plan(settings: PruneSettings) -> Allocated:
    """The plan of `plan`, which nothing else may contradict."""
    given: dict[str, Any] = {"allocation": None if settings.allocation == "uniform" else settings.allocation}
    given |= {name: getattr(settings, name) for name in ("sparsity", "pattern", "per")}
    given |= {name: " ".join(getattr(settings, name)) or None for name in ("only", "skip")}
    for option, value in given.items():
        if value is not None:
            raise PatternError(
                f"--{option} {value}: --plan says already which matrix loses how many weights. Drop one."
            )
    plan: Any = settings.plan
    if isinstance(plan, Plan):
        return Allocated(plan, {})
    return plan if isinstance(plan, Allocated) else read_plan(plan)


def allocation_of(name: str, settings: Sequence[str] | Mapping[str, object] = ()) -> Allocation:
    """The allocation that a name stands for, with options such as "width=0.1". Raises `PatternError`."""
    name = name.replace("-", "_")
    _check_known(name, ALLOCATIONS, "allocation")
    factories: dict[str, Any] = {name: ALLOCATIONS[name]}
    given = [_setting(setting, name, factories, "--allocation-option") for setting in written(settings)]
    return cast(Allocation, factories[name](**{option: value for _, option, value in given}))


def as_method(value: object, settings: Sequence[str] | Mapping[str, object] = (), **options: object) -> Method:
    """The method that somebody asks for: a `Method`, its name, or the function that makes it, which is called.

    `settings` and `options` are those of `method_of`, for a name. Raises `PatternError` for anything else.
    """
    if isinstance(value, str):
        return method_of(value, list(written(settings)), **options)
    given = next((option for option, own in {"option": settings or None, **options}.items() if own is not None), None)
    if given is not None:
        raise PatternError(f"{given}: is for a method that is named; give it to the function that makes the method.")
    if isinstance(value, Method):
        return value
    if isinstance(value, Refinement) or (callable(value) and value in REFINEMENTS.values()):
        name = value.name if isinstance(value, Refinement) else getattr(value, "__name__", "it")
        raise PatternError(f"method: {name} refines a method and is none: secateur.chain(secateur.wanda(), {name}()).")
    if callable(value):
        return _made(f"method {getattr(value, '__name__', type(value).__name__)}", value, {})
    raise PatternError(f"method: got {value!r}, expected a secateur.Method such as secateur.wanda(), or its name.")


def as_pattern(value: object, sparsity: float | None = None, per: Group | None = None) -> Any:
    """The pattern that somebody asks for: a `Pattern` or `Plan`, or 0.5, "50%" or "2:4", or one of these for each glob.

    `sparsity` names one where `value` is None (default: half the weights), and `per` what it compares. Raises
    `PatternError` for anything else.
    """
    if value is None:
        return Unstructured(0.5 if sparsity is None else sparsity, per)
    if sparsity is not None:
        raise PatternError(
            f"--sparsity {sparsity:g} and --pattern {value} were both given; the pattern sets the sparsity. Drop one."
        )
    if isinstance(value, Mapping) and not isinstance(value, Plan):
        return {str(glob): as_pattern(own, None, per) for glob, own in value.items()}
    if isinstance(value, str) and value.lstrip().startswith("{"):
        return as_pattern(_of_each_glob(value), None, per)
    pattern = _pattern(value)
    if per is None:
        return pattern
    if isinstance(pattern, Unstructured) and pattern.per is None:
        return with_group(pattern, per)
    why = "N:M compares within groups of M" if isinstance(pattern, NM) else "it says that itself"
    raise PatternError(f"--per {per} has no meaning for --pattern {value}: {why}.")


def _of_each_glob(text: str) -> Mapping[str, object]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise PatternError(
            f"--pattern {text}: is no JSON ({error}); expected a pattern for each glob, such as "
            '{"*.down_proj": "4:8", "*": 0.5}.'
        ) from None
    return dict(found)  # what begins with { and is JSON is an object


def _pattern(value: object) -> Any:
    if isinstance(value, Plan | Pattern):
        return value
    if isinstance(value, float | int) and not isinstance(value, bool):
        return Unstructured(float(value))
    if isinstance(value, str):
        text = value.strip()
        try:
            return Unstructured(float(text[:-1]) / 100 if text.endswith("%") else float(text))
        except ValueError as error:
            if isinstance(error, PatternError):
                raise
            return parse_pattern(text)
    raise PatternError(
        f'pattern: got {value!r}, expected a secateur.Unstructured or secateur.NM, or 0.5, "50%" or "2:4".'
    )


def _setting(text: str, method: str, factories: Mapping[str, Any], flag: str = "--option") -> tuple[str, str, object]:
    """(method or refinement, option, value) of "option=value" or "refinement.option=value"."""
    key, equals, value = text.partition("=")
    part, dot, option = key.replace("-", "_").rpartition(".")
    part = part if dot else method
    if not (equals and option):
        raise PatternError(f'{flag} {text}: expected NAME=VALUE, such as "damping=0.02".')
    if part not in factories:
        raise PatternError(f"{flag} {text}: {part} is no part of {'+'.join(factories)}.")
    if isinstance(factories[part], Method):
        raise PatternError(
            f"{flag} {text}: {part} is a Method already, with its options. Name a function that takes some and "
            "returns a Method."
        )
    known = inspect.signature(factories[part]).parameters
    if option not in known:
        refinements = [other for other in factories if other != method]
        others = [other for other in refinements if option in inspect.signature(factories[other]).parameters]
        hint = f" Did you mean {others[0]}.{option}?" if others else ""
        names = f"it has {', '.join(known)}" if known else "it has none"
        raise PatternError(f"{flag} {text}: {part} has no option {option}; {names}.{hint}")
    default = known[option].default
    kind: Any = type(default) if default is not known[option].empty else type(None)
    if ":" in part and kind in (int, type(None)):
        return part, option, _guessed(value, numbers_only=kind is int, text=text)
    try:
        return part, option, _TRUTH[value.lower()] if kind is bool else kind(value)
    except (ValueError, KeyError, TypeError):
        raise PatternError(f'{flag} {text}: got "{value}", expected {_KINDS.get(kind, kind.__name__)}.') from None


_KINDS = {bool: "true or false", int: "a whole number", float: "a number"}
_TRUTH = {"true": True, "false": False}


def _guessed(value: str, numbers_only: bool, text: str) -> object:
    """A number, truth or text, of an option whose default says no more."""
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    if numbers_only:
        raise PatternError(f'--option {text}: got "{value}", expected a number.')
    return _TRUTH.get(value.lower(), value)


def _check_known(name: str, known: Mapping[str, object], kind: str, also: str = "") -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        raise PatternError(f'unknown {kind} "{name}".{hint} Known: {", ".join(known)}{also}.')


def _own(name: str) -> Any:
    """What MODULE:NAME or FILE.py:NAME names: a method, or a function that makes one."""
    home, _, attribute = name.rpartition(":")
    module = _file(name, home) if home.endswith(".py") or "/" in home or os.sep in home else _module(name, home)
    if not hasattr(module, attribute):
        there = [key for key, value in vars(module).items() if _of_module(key, value, module)]
        what = f"It has {', '.join(there[:_SHOWN])}" if there else "It has no function and no Method"
        near = difflib.get_close_matches(attribute, there, 1)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        raise PatternError(f'--method {name}: the module {home} has no "{attribute}".{hint} {what}.')
    return getattr(module, attribute)


def _of_module(key: str, value: object, module: ModuleType) -> bool:
    own = callable(value) and getattr(value, "__module__", None) == module.__name__
    return not key.startswith("_") and (own or isinstance(value, Method))


def _module(name: str, module: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    with blamed(f"--method {name}: the module {module} cannot be imported:", always=True):
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise
            there = sorted(file.stem for file in Path(here).glob("*.py"))
            what = f" There are {', '.join(there[:_SHOWN])}." if there else ""
            raise PatternError(f"--method {name}: {error}. Looked in {here} and on the Python path.{what}") from None


def _file(name: str, text: str) -> ModuleType:
    """The module of a Python file, whose folder is where its own imports are looked for first."""
    file = Path(text).expanduser().absolute()
    if file.suffix != ".py" or not file.is_file():
        there = sorted(found.name for found in file.parent.glob("*.py"))
        near = difflib.get_close_matches(file.name, there, 1)
        hint = f" Did you mean {near[0]}?" if near else f" There are {', '.join(there[:_SHOWN])}." if there else ""
        raise PatternError(f"--method {name}: {file} is no Python file.{hint} Expected FILE.py:FUNCTION.")
    module = file.stem
    if module in sys.modules and getattr(sys.modules[module], "__file__", None) != str(file):
        module = f"{module}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if module in sys.modules:
        return sys.modules[module]
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    specification = importlib.util.spec_from_file_location(module, file)
    assert specification is not None
    assert specification.loader is not None
    made = importlib.util.module_from_spec(specification)
    sys.modules[module] = made
    try:
        with blamed(f"--method {name}: {file} cannot be imported:", always=True):
            specification.loader.exec_module(made)
    except BaseException:
        del sys.modules[module]
        raise
    return made


def _made(where: str, found: Any, options: Mapping[str, object]) -> Method:
    """The method that somebody's own function makes with these options, or that it is."""
    if not isinstance(found, Method) and callable(found):
        try:
            inspect.signature(found).bind(**options)
        except (TypeError, ValueError) as error:
            raise PatternError(
                f"{where}: expected a secateur.Method, or a function without arguments that returns one, and "
                f"this one cannot be called so ({error}). See docs/methods.md."
            ) from None
        with blamed(f"{where} failed:", always=True):
            found = found(**options)
        if options and isinstance(found, Method) and not found.options:
            found = replace(found, options=dict(options))
    if not isinstance(found, Method):
        raise PatternError(f"{where}: got a {type(found).__name__}, expected a secateur.Method.")
    return found
