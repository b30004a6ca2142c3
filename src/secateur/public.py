"""`prune`, `sweep` and `estimate` as Python code calls them: methods and patterns may be given by name."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from secateur.core.patterns import Pattern
from secateur.core.problem import Method
from secateur.plans.plan import Plan
from secateur.pruning import engine, forecast
from secateur.pruning.forecast import Estimate
from secateur.pruning.named import as_method, as_pattern
from secateur.record.manifest import Manifest
from secateur.sweeps import run
from secateur.sweeps.folder import Sweep

_NAMES = """

    A method may also be given by its name ("wanda", "wanda+swaps"), or as the function that makes it; a pattern as 0.5,
    "50%" or "2:4".
    """

NamedMethod = Method | str | Callable[[], Method]
NamedPattern = Pattern | Plan | float | str | None


@functools.wraps(engine.prune)
def prune(model: Any, *, method: NamedMethod, pattern: NamedPattern = None, **options: Any) -> Manifest:  # noqa: D103
    return engine.prune(model, method=as_method(method), pattern=as_pattern(pattern), **options)


@functools.wraps(forecast.estimate)
def estimate(model: Any, *, method: NamedMethod, pattern: NamedPattern = None, **options: Any) -> Estimate:  # noqa: D103
    return forecast.estimate(model, method=as_method(method), pattern=as_pattern(pattern), **options)


@functools.wraps(run.sweep)
def sweep(  # noqa: D103
    model: Any,
    *,
    methods: Sequence[NamedMethod] | Mapping[str, NamedMethod] | str,
    patterns: Sequence[NamedPattern] | NamedPattern = (0.5,),
    **options: Any,
) -> Sweep:
    several = [methods] if isinstance(methods, str) else methods
    chosen: Any
    if isinstance(several, Mapping):
        chosen = {name: as_method(method) for name, method in several.items()}
    else:
        chosen = [as_method(method) for method in several]
    listed = patterns if isinstance(patterns, list | tuple) else [patterns]
    return run.sweep(model, methods=chosen, patterns=[as_pattern(pattern) for pattern in listed], **options)


for _function in (prune, estimate, sweep):
    _function.__doc__ = (_function.__doc__ or "").rstrip() + _NAMES
