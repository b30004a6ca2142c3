"""From the strings of a command line to the objects that they name."""

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Mapping

from secateur.core.patterns import Pattern, Unstructured, parse_pattern
from secateur.core.problem import Method, chain
from secateur.errors import PatternError
from secateur.methods import METHODS, REFINEMENTS

_OWN = "; or MODULE:FUNCTION for one of your own"


def pattern_of(sparsity: float | None, pattern: str | None, per: str | None) -> Pattern:
    """The pattern that --sparsity, --pattern and --per name together."""
    if pattern is not None:
        if sparsity is not None:
            raise PatternError(
                f"--sparsity {sparsity:g} and --pattern {pattern} were both given; "
                "the pattern sets the sparsity. Drop one."
            )
        if per is not None:
            raise PatternError(f"--per {per} has no meaning for --pattern {pattern}: N:M compares within groups of M.")
        return parse_pattern(pattern)
    return Unstructured(0.5 if sparsity is None else sparsity, per)  # type: ignore[arg-type]  # checked there


def method_of(name: str, **options: object) -> Method:
    """The method that a name stands for: one of ours, refined by others (wanda+swaps), or MODULE:FUNCTION.

    `options` go to its factory; those that are None were not given. Underscores and hyphens are the same.
    """
    options = {option: value for option, value in options.items() if value is not None}
    if ":" in name:
        if options:
            raise PatternError(f"--{next(iter(options))}: has no meaning for {name}; set it in your own function.")
        return _own_method(name)
    first, *rest = (part.replace("-", "_") for part in name.split("+"))
    _check_known(first, METHODS, "method", _OWN)
    for part in rest:
        _check_known(part, REFINEMENTS, "refinement")
    accepted = inspect.signature(METHODS[first]).parameters
    for option in options:
        if option not in accepted:
            others = [other for other in METHODS if option in inspect.signature(METHODS[other]).parameters]
            raise PatternError(f"--{option}: the method {first} has no such option; {', '.join(others)} do.")
    method = METHODS[first](**options)
    return chain(method, *(REFINEMENTS[part]() for part in rest)) if rest else method


def _check_known(name: str, known: Mapping[str, object], kind: str, also: str = "") -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        raise PatternError(f'unknown {kind} "{name}".{hint} Known: {", ".join(known)}{also}.')


def _own_method(name: str) -> Method:
    module, _, attribute = name.partition(":")
    if not (module and attribute):
        _check_known(name, METHODS, "method", _OWN)
    sys.path.insert(0, os.getcwd())
    try:
        home = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise PatternError(f"--method {name}: {error}. Looked in {os.getcwd()} and on the Python path.") from None
    if not hasattr(home, attribute):
        raise PatternError(f'--method {name}: the module {module} has no "{attribute}".')
    found = getattr(home, attribute)
    if not isinstance(found, Method) and callable(found):
        try:
            inspect.signature(found).bind()
        except TypeError as error:
            raise PatternError(
                f"--method {name}: expected a secateur.Method, or a function without arguments that returns one, and "
                f"this one cannot be called so ({error}). See docs/methods.md."
            ) from None
        found = found()
    if not isinstance(found, Method):
        raise PatternError(f"--method {name}: gives a {type(found).__name__}, expected a secateur.Method.")
    return found
