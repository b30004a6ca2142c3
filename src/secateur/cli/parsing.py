"""From the strings of a command line to the objects that they name."""

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Mapping, Sequence

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


def patterns_of(sparsities: Sequence[str], patterns: Sequence[str], per: str | None) -> list[Pattern]:
    """The patterns that lists of --sparsity and --pattern name together, in this order; half the weights by default."""
    fractions = []
    for text in listed(sparsities):
        try:
            fractions.append(float(text))
        except ValueError:
            raise PatternError(f'--sparsity: got "{text}", expected numbers such as 0.5,0.6.') from None
    found = [pattern_of(fraction, None, per) for fraction in fractions]
    found += [pattern_of(None, text, None if fractions else per) for text in listed(patterns)]
    return found or [pattern_of(None, None, per)]


def methods_of(names: Sequence[str], settings: Sequence[str]) -> dict[str, Method]:
    """The methods of a list, by label: each what `method_of` takes, or LABEL=METHOD.

    `settings` are options as text, with the label before what `method_of` takes: "gblm.norm=l2".
    """
    chosen: dict[str, str] = {}
    for text in listed(names):
        label, _, name = (part.strip() for part in text.rpartition("="))
        label = label or name.replace("-", "_")
        if label in chosen:
            raise PatternError(f"--methods: {label} is named twice. Give them labels: --methods one={name},two={name}.")
        chosen[label] = name
    own: dict[str, list[str]] = {label: [] for label in chosen}
    for setting in settings:
        labels = [label for label in chosen if setting.replace("-", "_").startswith(f"{label.replace('-', '_')}.")]
        if not labels:
            raise PatternError(
                f"--option {setting}: expected METHOD.NAME=VALUE, of a method among {', '.join(chosen)}."
            )
        label = max(labels, key=len)
        own[label].append(setting[len(label) + 1 :])
    return {label: method_of(name, own[label]) for label, name in chosen.items()}


def listed(texts: Sequence[str]) -> list[str]:
    """The words of options that may be repeated, and hold several words separated by commas."""
    return [word.strip() for text in texts for word in text.split(",") if word.strip()]


def method_of(name: str, settings: Sequence[str] = (), **options: object) -> Method:
    """The method that a name stands for: one of ours or MODULE:FUNCTION, also refined by others (wanda+swaps).

    `options` go to its factory; those that are None were not given. `settings` are options as text: "damping=0.02" of
    the method, "least_squares.damping=0.02" of a refinement. Underscores and hyphens are the same.
    """
    options = {option: value for option, value in options.items() if value is not None}
    first, *rest = name.split("+")
    own, rest = ":" in first, [part.replace("-", "_") for part in rest]
    if not own:
        first = first.replace("-", "_")
        _check_known(first, METHODS, "method", _OWN)
    for part in rest:
        _check_known(part, REFINEMENTS, "refinement")
    for option in options:
        if own:
            raise PatternError(f"--{option}: has no meaning for {first}; set it in your own function.")
        if option not in inspect.signature(METHODS[first]).parameters:
            others = [other for other in METHODS if option in inspect.signature(METHODS[other]).parameters]
            raise PatternError(f"--{option}: the method {first} has no such option; {', '.join(others)} do.")
    given: dict[str, dict[str, object]] = {part: {} for part in (first, *rest)}
    given[first] = options
    for setting in settings:
        part, option, value = _setting(setting, first, rest)
        given[part][option] = value
    method = _own_method(first) if own else METHODS[first](**given[first])
    return chain(method, *(REFINEMENTS[part](**given[part]) for part in rest)) if rest else method


def _setting(text: str, method: str, refinements: Sequence[str]) -> tuple[str, str, object]:
    """(method or refinement, option, value) of "option=value" or "refinement.option=value"."""
    key, equals, value = text.partition("=")
    part, dot, option = key.replace("-", "_").rpartition(".")
    part = part if dot else method
    if not (equals and option):
        raise PatternError(f'--option {text}: expected NAME=VALUE, such as "damping=0.02".')
    if part not in (method, *refinements):
        raise PatternError(f"--option {text}: {part} is no part of {'+'.join((method, *refinements))}.")
    if part == method and ":" in method:
        raise PatternError(f"--option {text}: has no meaning for {method}; set it in your own function.")
    factory = METHODS[part] if part == method else REFINEMENTS[part]
    known = inspect.signature(factory).parameters
    if option not in known:
        others = [other for other in refinements if option in inspect.signature(REFINEMENTS[other]).parameters]
        hint = f" Did you mean {others[0]}.{option}?" if others else ""
        names = f"it has {', '.join(known)}" if known else "it has none"
        raise PatternError(f"--option {text}: {part} has no option {option}; {names}.{hint}")
    kind = type(known[option].default)
    words: dict[str, object] = {"true": True, "false": False}
    try:
        return part, option, words[value.lower()] if kind is bool else kind(value)
    except (ValueError, KeyError):
        raise PatternError(f'--option {text}: got "{value}", expected {_KINDS[kind]}.') from None


_KINDS = {bool: "true or false", int: "a whole number", float: "a number"}


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
