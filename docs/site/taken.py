"""The true arguments of functions that `taking` gives the fields of their settings, for mkdocstrings."""

import inspect
from importlib import import_module
from typing import Any, get_type_hints

import griffe

from secateur.runs.options import options


class Taken(griffe.Extension):
    """Reads them from the imported function, and what each is from its option."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Give a function that was read from its source the arguments that it takes."""
        if not any(str(decorator.value).startswith("taking(") for decorator in func.decorators):
            return
        taken = getattr(import_module(func.module.path), func.name)
        (settings,) = [kind for name, kind in get_type_hints(taken.__wrapped__).items() if name != "return"]
        func.parameters = griffe.Parameters(*map(_parameter, inspect.signature(taken).parameters.values()))
        func.decorators = []
        assert func.docstring is not None
        said = "\n".join(f"    {field.name}: {field.option.help}" for field in options(settings)).replace("][", "]\\[")
        func.docstring.value += f"\n\nArgs:\n{said}"


def _parameter(parameter: inspect.Parameter) -> griffe.Parameter:
    return griffe.Parameter(
        parameter.name,
        annotation=inspect.formatannotation(parameter.annotation),
        kind=getattr(griffe.ParameterKind, parameter.kind.name.lower()),
        default=None if parameter.default is parameter.empty else repr(parameter.default),
    )
