"""Small files that anybody may have written, read within limits of size and depth and checked against a type.

Configurations, indices, manifests, headers and lists of cells come from other people and other machines. They are never
trusted to be files, to be small, to be flat, or to hold what their names promise.
"""

import codecs
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from secateur.errors import CheckpointError, SecateurError

TEXT_BYTES = 256 << 20  # a manifest of a model with 100,000 experts has some 100 MB
LINE_BYTES = 64 << 20  # a long book has 10 MB
DEPTH = 100  # lists and objects inside each other; what people write has about ten
YAML_NODES = 100_000  # with every alias written out

Raise = type[SecateurError]


def open_regular(file: Path, *, error: Raise = CheckpointError) -> BinaryIO:
    """A regular file, open for reading bytes. Raises `error` for anything else, without waiting as a pipe would."""
    try:
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        raise error(f"{file}: no such file.") from None
    except (OSError, ValueError) as problem:
        raise error(f"{file}: cannot be read ({getattr(problem, 'strerror', None) or problem}).") from None
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device or socket"
            raise error(f"{file}: is {kind}, expected a regular file.")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_inside(file: Path, folder: Path, *, error: Raise = CheckpointError) -> None:
    """Raise `error` for a file of a folder that is a symbolic link, or lies behind one, to a place outside the folder.

    Whoever hands over a folder could otherwise name any file of this machine, and have it read into what is written.
    A snapshot in the hub's cache may link to the blobs of its own repository.
    """
    real, root = Path(os.path.realpath(file)), Path(os.path.realpath(folder))
    if real.is_relative_to(root):
        return
    if root.parent.name == "snapshots" and real.parent == root.parent.parent / "blobs":
        return
    raise error(
        f"{file}: is a symbolic link to {real}, outside {folder}, and links out of a folder are not followed. Copy the "
        "file there, or give the folder in which it lies."
    )


def read_text(file: Path, *, limit: int = TEXT_BYTES, error: Raise = CheckpointError) -> str:
    """The text of a UTF-8 file, line ends and all. Raises `error` for other files, and above `limit` bytes."""
    with open_regular(file, error=error) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > limit:
            raise error(f"{file}: has {size:,} bytes, and at most {limit:,} are read. Is it the right file?")
        try:
            return stream.read(size + 1).decode("utf-8")
        except UnicodeDecodeError as problem:
            before = problem.object[: problem.start]
            line, byte = before.count(b"\n") + 1, len(before) - before.rfind(b"\n") - 1
            raise error(f"{file}, line {line}: not UTF-8 text (byte {byte}: {problem.reason}). Convert it.") from None
        except OSError as problem:
            raise error(f"{file}: cannot be read ({problem.strerror}).") from None


def read_lines(stream: BinaryIO, where: Any, *, error: Raise) -> Iterator[tuple[int, bytes]]:
    """(number, line) of every line of an open file, with its end; in the memory of one line.

    Raises `error` for a line longer than `LINE_BYTES`, before the rest of it is read.
    """
    for number, line in enumerate(iter(lambda: stream.readline(LINE_BYTES + 1), b""), start=1):
        if len(line) > LINE_BYTES:
            raise error(
                f"{where}, line {number}: is longer than {LINE_BYTES:,} bytes, the most that is read. "
                "Split it into several lines."
            )
        yield number, line


def parse_json(
    text: str | bytes,
    where: Any,
    kind: Any = None,
    *,
    error: Raise = CheckpointError,
    advice: str = "",
    unique: bool = False,
) -> Any:
    """The value of a JSON text, of type `kind` (None: anything).

    `kind` is a type as msgspec understands them: `dict[str, str]`, a dataclass, a TypedDict. `where` names the file in
    errors, and `advice` says what to do. Raises `error` for text that is no JSON, too deep, or of another type, and
    with `unique` for an object that names a key twice; the message names the first place that is wrong.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique else None)
        _check_depth(value)
    except RecursionError:
        raise error(
            _message(where, f"lists and objects lie more than {DEPTH} deep inside each other", advice)
        ) from None
    except ValueError as problem:  # also UnicodeDecodeError, and numbers of thousands of digits
        raise error(_message(where, f"not JSON ({problem})", advice)) from None
    return value if kind is None else checked(value, where, kind, error=error, advice=advice)


def json_lines(file: Path, kind: Any, *, error: Raise, advice: str) -> Iterator[tuple[Any, bytes]]:
    """(value, of type `kind`, and the bytes) of every line that is not blank, of a file with a JSON text in each."""
    with open_regular(file, error=error) as stream:
        for number, line in read_lines(stream, file, error=error):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield parse_json(line, f"{file}, line {number}", kind, error=error, advice=advice), line


def checked(value: Any, where: Any, kind: Any, *, error: Raise = CheckpointError, advice: str = "") -> Any:
    """A plain value as the type `kind`. Raises `error` that names the first entry of another type."""
    import msgspec

    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as problem:
        raise error(_message(where, f"damaged, or not what its name says: {problem}", advice)) from None


def read_json(file: Path, kind: Any = None, *, limit: int = TEXT_BYTES, advice: str = "") -> Any:
    """The value of a JSON file, of type `kind`: `read_text`, then `parse_json`."""
    return parse_json(read_text(file, limit=limit), file, kind, advice=advice)


def digest_of(value: Mapping[str, Any]) -> str:
    """The sha256 of a record's JSON, without the entry "digest" that holds it."""
    plain = {key: item for key, item in value.items() if key != "digest"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def read_yaml(file: Path) -> Any:
    """The value of a YAML file, in which every scalar stays the text that it is: lists, objects and strings.

    Raises `CheckpointError` for what is no YAML, too deep, or too large once its aliases are written out.
    """
    import yaml

    text = read_text(file, limit=1 << 20)
    try:
        # Values stay text, as on a command line: YAML 1.1 would read `pattern: 2:4` as the number 124.
        _check_yaml(yaml.compose(text, yaml.BaseLoader), yaml)
        return yaml.load(text, yaml.BaseLoader)  # nosec B506 # makes texts, lists and objects alone
    except RecursionError:
        raise CheckpointError(f"{file}: nested too deeply; lists and objects may be {DEPTH} deep.") from None
    except (yaml.YAMLError, ValueError, TypeError) as problem:
        raise CheckpointError(f"{file}: not YAML: {problem}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
    return found


def _message(where: Any, what: str, advice: str) -> str:
    return f"{where}: {what}.{' ' + advice if advice else ''}"


def _check_depth(value: Any) -> None:
    """Raise `RecursionError` for a value that is deeper than `DEPTH`; without recursion of its own."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEPTH + 1):
        if not level:
            return
        level = [
            item
            for parent in level
            for item in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(item, dict | list)
        ]
    raise RecursionError


def _check_yaml(root: Any, yaml: Any) -> None:
    """Raise `RecursionError` for a tree that is deeper than `DEPTH`, `ValueError` for too many nodes or a loop."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: Any, depth: int) -> int:
        if depth > DEPTH:
            raise RecursionError
        if id(node) in open_nodes:
            raise ValueError("an alias stands inside what it names")
        if id(node) not in sizes:
            open_nodes.add(id(node))
            if isinstance(node, yaml.MappingNode):
                children = [part for pair in node.value for part in pair]
            elif isinstance(node, yaml.SequenceNode):
                children = node.value
            else:
                children = []
            sizes[id(node)] = 1 + sum(size(child, depth + 1) for child in children)
            open_nodes.remove(id(node))
        if sizes[id(node)] > YAML_NODES:
            raise ValueError(f"more than {YAML_NODES:,} values once its aliases are written out")
        return sizes[id(node)]

    size(root, 0)
