"""`--config`: options from a YAML file. Those of the command line win over it.

A file may hold several runs of a command: a list `runs`, in which each has keys of its own, beside those for all.
"""

import difflib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, get_origin

from cyclopts import App, Token
from cyclopts.argument import Argument, ArgumentCollection
from cyclopts.utils import UNSET

from secateur.errors import CheckpointError
from secateur.runs.options import written

# What a file that somebody passes on must not decide.
COMMAND_LINE_ONLY = {
    "trust_remote_code": "whoever runs a checkpoint's own code has to say so on the command line",
    "ray": "what a cluster answers can hold code, so whoever connects to one has to say so on the command line",
}
NOTHING = (None, "", "null", "~")


RUNS = "runs"

_current: int | None = None  # the run that is under way, of a file with several


def several_runs() -> bool:
    """Whether the command that is under way is one of several runs of a file."""
    return _current is not None


def runs_of(words: Sequence[str]) -> list[str]:
    """What to call the runs of the file that a command line's --config names: their output, or else their model.

    None of them for a file without a list of runs. Raises `CheckpointError` for a list that is none.
    """
    given = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    given += [after for word, after in pairwise(words) if word == "--config"]
    content = _content(Path(given[-1])) if given else {}
    if RUNS not in content:
        return []
    runs = content[RUNS]
    if not isinstance(runs, list) or not runs or not all(isinstance(run, dict) and run for run in runs):
        raise CheckpointError(f'{given[-1]}: "{RUNS}" holds no list of runs, each with keys and values of its own.')
    return [str(run.get("output") or run.get("model") or number + 1) for number, run in enumerate(runs)]


@contextmanager
def run_of_file(number: int) -> Iterator[None]:
    """With this run of the file: its keys beside those for all. The command line is the one that stands for it."""
    global _current
    words, _current = sys.argv, number
    try:
        yield
    finally:
        sys.argv, _current = words, None


def _content(file: Path) -> dict[Any, Any]:
    from secateur.files.reading import read_yaml

    content = read_yaml(file.expanduser())
    if content in NOTHING:
        return {}
    if not isinstance(content, dict):
        kind = "a list" if isinstance(content, list) else "text"
        raise CheckpointError(f"{file}: expected keys and values, found {kind}.")
    return content


def configured(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Give the options that a command line leaves out the values of the file that its --config names.

    Raises `CheckpointError` for a file that cannot be read, unknown keys, and values of another kind.
    """
    own = next((argument for argument in arguments if argument.name == "--config"), None)
    if own is None or not own.tokens:
        return
    file = Path(own.tokens[-1].value)
    content = _content(file)
    if _current is not None:
        content = {key: item for key, item in content.items() if key != RUNS} | content[RUNS][_current]
    places: list[str] = []
    options: list[str] = []
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
            tokens = list(_tokens(file, str(key), item, known[name]))
            for token in tokens:
                known[name].append(token)
            (options if known[name].name.startswith("-") else places).extend(_words(known[name], tokens))
    if _current is not None:
        sys.argv = [sys.argv[0], *_without_config(sys.argv[1:]), *places, *options]


def _words(argument: Argument, tokens: Sequence[Token]) -> list[str]:
    """The words of a command line that stand for tokens."""
    values = [token.value if token.implicit_value is UNSET else json.dumps(token.implicit_value) for token in tokens]
    if not argument.name.startswith("-"):
        return values
    if argument.hint is bool:
        return [argument.name] if values[-1].lower() in ("true", "yes", "on", "1") else []
    return [word for value in values for word in (argument.name, value)]


def _without_config(words: Sequence[str]) -> list[str]:
    at = {place for place, word in enumerate(words) if word == "--config"}
    at |= {place + 1 for place in at}
    return [word for place, word in enumerate(words) if place not in at and not word.startswith("--config=")]


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
