"""`--config`: options from a YAML file. Those of the command line win over it."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_origin

from cyclopts import App, Token
from cyclopts.argument import Argument, ArgumentCollection

from secateur.errors import CheckpointError
from secateur.runs.options import written

# What a file that somebody passes on must not decide.
COMMAND_LINE_ONLY = {
    "trust_remote_code": "whoever runs a checkpoint's own code has to say so on the command line",
    "ray": "what a cluster answers can hold code, so whoever connects to one has to say so on the command line",
}
NOTHING = (None, "", "null", "~")


def configured(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Give the options that a command line leaves out the values of the file that its --config names.

    Raises `CheckpointError` for a file that cannot be read, unknown keys, and values of another kind.
    """
    own = next((argument for argument in arguments if argument.name == "--config"), None)
    if own is None or not own.tokens:
        return
    from secateur.files.reading import read_yaml

    file = Path(own.tokens[-1].value)
    content = read_yaml(file.expanduser())
    if content in NOTHING:
        return
    if not isinstance(content, dict):
        kind = "a list" if isinstance(content, list) else "text"
        raise CheckpointError(f"{file}: expected keys and values, found {kind}.")
    known = {_key(argument.name): argument for argument in arguments if argument is not own}
    for key, item in content.items():
        name = _key(str(key))
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f' Did you mean "{near[0]}"?' if near else f" Known keys: {', '.join(sorted(known))}."
            raise CheckpointError(f'{file}: unknown key "{key}".{hint}')
        if name in COMMAND_LINE_ONLY:
            raise CheckpointError(
                f'{file}: "{key}" is not taken from a file: {COMMAND_LINE_ONLY[name]}. Remove it, and give '
                f"--{name.replace('_', '-')} there if you trust the code."
            )
        if item not in NOTHING and not known[name].tokens:
            for token in _tokens(file, str(key), item, known[name]):
                known[name].append(token)


def _key(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower()


def _tokens(file: Path, key: str, item: Any, argument: Argument) -> Iterator[Token]:
    """The tokens of a key of the file, as if they stood on the command line."""
    several = get_origin(argument.hint) is tuple
    keyword, source = f"--{key.replace('_', '-')}", str(file)
    if isinstance(item, Mapping) and argument.field_info.is_any:
        yield Token(keyword=keyword, source=source, implicit_value=item)
        return
    if isinstance(item, Mapping) and several and key == "option":
        item = list(written(item))
    items: Iterable[Any] = item if isinstance(item, list) and several else [item]
    for index, part in enumerate(items):
        if not isinstance(part, str):
            kind = "a list" if isinstance(part, list) else "keys and values"
            expected = "text or a list of texts" if several else "one text"
            raise CheckpointError(f'{file}: "{key}" holds {kind}, expected {expected}.')
        text = str(Path(part).expanduser()) if part.startswith("~/") else part
        yield Token(keyword=keyword, value=text, source=source, index=index)
