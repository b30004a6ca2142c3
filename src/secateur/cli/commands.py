"""From settings to commands: what their options are called, and the sentences for those that are none."""

import inspect
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, Literal, get_origin, get_type_hints

from cyclopts import CoercionError, CycloptsError, Group, MissingArgumentError, Parameter, Token, UnusedCliTokensError

from secateur.collect.settings import CALIBRATION, HOW, WHAT
from secateur.runs.options import ARGUMENTS, OPTIONS, Field, Settings, choices, no_choice, options

COMMON = "Common options"
PANELS = (ARGUMENTS, COMMON, OPTIONS, WHAT, CALIBRATION)  # first in the help, in this order; how to run comes last
KINDS: Mapping[Any, str] = {bool: "true or false", int: "a whole number", float: "a number"}
EMPTY = inspect.Parameter.empty


class _Groups(dict[str, Group]):
    """The panels of the help by name."""

    def __missing__(self, name: str) -> Group:
        self[name] = Group(name, sort_key=(name == HOW, len(self)))
        return self[name]


GROUPS = _Groups()
for _panel in PANELS:
    GROUPS.__missing__(_panel)


def parsed(
    function: Callable[..., None],
    *,
    required: Collection[str] = (),
    hidden: Collection[str] = (),
    common: Sequence[str] = (),
) -> Callable[..., None]:
    """The function as cyclopts calls it: with a parameter for each option, including those of its settings.

    Settings that record the command line receive it here. `required`, `hidden` and `common` are those of `app.command`.
    """
    takers = {
        name: kind
        for name, kind in get_type_hints(function).items()
        if isinstance(kind, type) and issubclass(kind, Settings)
    }
    fields = [field for kind in takers.values() for field in options(kind)] + list(options(function))
    fields.sort(key=lambda field: common.index(field.name) if field.name in common else len(common))
    parameters = [
        _parameter(field, field.name in required, field.name in hidden, field.name in common) for field in fields
    ]
    parameters.sort(key=lambda parameter: parameter.kind)  # those without a name first
    names = [parameter.name for parameter in parameters]

    def invoke(*arguments: Any, **keywords: Any) -> None:
        values: Mapping[str, Any] = dict(zip(names, arguments, strict=False)) | keywords
        taken: dict[str, Any] = {}
        for name, kind in takers.items():
            own = {field.name for field in options(kind)}
            recorded = {"command": ["secateur", *sys.argv[1:]]} if hasattr(kind, "command") else {}
            taken[name] = kind(**kind.filled({key: value for key, value in values.items() if key in own}), **recorded)
        direct = {field.name for field in options(function)}
        function(**taken, **{key: value for key, value in values.items() if key in direct})

    invoke.__doc__ = function.__doc__
    setattr(invoke, "__signature__", inspect.Signature(parameters))  # noqa: B010
    return invoke


def _parameter(field: Field, required: bool, hidden: bool, common: bool) -> inspect.Parameter:
    option = field.option
    positional = option.panel == ARGUMENTS
    shown = Parameter(
        name=option.name.upper() or None if positional else [field.flag, *filter(None, [option.short])],
        help=option.help.replace("*", r"\*"),  # which is no emphasis
        group=GROUPS[COMMON if common else option.panel],
        negative="",
        converter=_whole if field.kind in (int, int | None) else None,
        allow_repeating=None if get_origin(field.kind) is tuple else True,  # the last one counts
        required=True if required else None,
        show=False if hidden else None,
        show_default=_default if field.default and field.default is not EMPTY else False,
    )
    kind = inspect.Parameter.POSITIONAL_ONLY if positional else inspect.Parameter.KEYWORD_ONLY
    default = EMPTY if required else field.default
    return inspect.Parameter(field.name, kind, default=default, annotation=Annotated[field.kind, shown])


def _whole(kind: Any, tokens: Sequence[Token]) -> int:
    """The whole number of an option; cyclopts itself takes 1.5 for 1."""
    try:
        return int(tokens[-1].value)
    except ValueError:
        raise CoercionError(token=tokens[-1], target_type=int) from None


def _default(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def told(error: CycloptsError) -> str:
    """What is wrong with a command line, in a sentence."""
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        return f'unexpected argument "{error.unused_tokens[0]}".'
    argument = error.argument
    if argument is None:
        return str(error)
    if isinstance(error, MissingArgumentError):
        if error.keyword is not None or argument.tokens:
            return f"{error.keyword or argument.name} needs a value."
        return f"{argument.name} is missing: {argument.parameter.help}"
    if isinstance(error, CoercionError) and error.token is not None:
        if get_origin(error.target_type) is Literal:
            return no_choice(argument.name, error.token.value, choices(error.target_type))
        if error.target_type in KINDS:
            return f'{argument.name}: got "{error.token.value}", expected {KINDS[error.target_type]}.'
    return str(error)
