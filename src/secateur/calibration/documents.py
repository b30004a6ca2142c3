"""Texts by position: documents kept in memory or on disk, and those of local files."""

import codecs
import gzip
import importlib
import os
import re
import tempfile
import weakref
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO, cast

from secateur.errors import CalibrationError
from secateur.files.checkpoint import file_digest
from secateur.files.reading import open_regular, parse_json, read_lines, read_text

DEFAULT_FIELD = "text"
SPOOL_BYTES = 64 * 2**20
PLAIN_BYTES = 2**30  # of a file that is read whole; those of JSON lines and Parquet may have any size
PACKED_BYTES, PACKED_SHARE = 2**30, 200  # a gzipped file that unpacks to more than both is no text
CHAT_FIELDS = ("messages", "conversations", "conversation")
_SEPARATOR_LINE = re.compile(r"(?:\r?\n)?^<\|endoftext\|>\r?(?:\n|\Z)", re.MULTILINE)
_CHAT = (
    "Chats are not read as such: text has to be given as the model is to see it. Write each chat as one text first, "
    "under a field 'text': tokenizer.apply_chat_template(messages, tokenize=False)."
)


@dataclass(frozen=True, eq=False)
class Corpus:
    """A named text: `documents` by position, where they came from, and the `joiner` that makes one text of them."""

    name: str
    documents: Sequence[str]
    provenance: Mapping[str, Any]
    joiner: str = "\n\n"

    def __str__(self) -> str:
        return self.name


class Documents(Sequence[str]):
    """Texts that are read by their position, each when it is asked for."""

    def __init__(self, read: Callable[[int], str], count: int) -> None:
        self._read, self._count = read, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        positions = range(self._count)[index]
        return self._read(positions) if isinstance(positions, int) else [self._read(place) for place in positions]


def spooled(texts: Iterable[str]) -> Documents:
    """Texts as UTF-8 in one buffer, which moves to an unnamed temporary file when it exceeds `SPOOL_BYTES`."""
    # Memory: the C4 shard is 800 MB of text, of which sampling touches a few thousand documents. The buffer lives as
    # long as the documents, hence no context manager.
    buffer = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115
    ends = array("Q", [0])
    for text in texts:
        ends.append(ends[-1] + buffer.write(text.encode()))

    def read(index: int) -> str:
        buffer.seek(ends[index])
        return buffer.read(ends[index + 1] - ends[index]).decode()

    documents = Documents(read, len(ends) - 1)
    weakref.finalize(documents, buffer.close)
    return documents


def table_rows(read: Callable[[int], Any], count: int, where: str) -> Documents:
    """One field of a table that stays where it is, on disk or memory-mapped."""
    return Documents(lambda index: _as_text(read(index), f"{where}, row {index}"), count)


def existing_file(path: Path) -> Path:
    """Return `path`, with ~ written out, if it is a file with content.

    Raises CalibrationError otherwise; for a file that does not exist, it lists the most similar names.
    """
    with suppress(RuntimeError):  # nobody of that name
        path = path.expanduser()
    if path.is_dir():
        raise CalibrationError(f"{path}: is a folder, expected a file. Pass one file of it.")
    if not path.exists():
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        nearest = get_close_matches(path.name, names, n=3)
        hint = f" Did you mean {', '.join(nearest)}?" if nearest else ""
        raise CalibrationError(f"{path}: no such file.{hint} Check the path; it is relative to {Path.cwd()}.")
    if not path.is_file():
        raise CalibrationError(f"{path}: is a pipe or a device, expected a regular file. Write its text into one.")
    if path.stat().st_size == 0:
        raise CalibrationError(f"{path}: the file is empty, expected text. Was its download cut off?")
    return path


def file_provenance(path: Path) -> dict[str, Any]:
    """Return the path as given, the size in bytes and the SHA-256 of a local file."""
    return {"file": str(path), "bytes": path.stat().st_size, "sha256": file_digest(path)}


def _as_text(value: Any, where: str) -> str:
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        raise CalibrationError(f"{where}: got a list of messages, expected text. {_CHAT}")
    if not isinstance(value, str):
        raise CalibrationError(
            f"{where}: got {type(value).__name__}, expected text. Choose another field or mend the row."
        )
    return value


# Local files


def text_file(spec: str) -> Corpus:
    """The documents of a plain text file, which lines "<|endoftext|>" separate."""
    path = existing_file(Path(spec))
    documents = [document for document in _SEPARATOR_LINE.split(file_text(path)) if document.strip()]
    return Corpus(spec, documents, {"corpus": spec, **file_provenance(path)})


def file_text(path: Path) -> str:
    """The whole text of a file."""
    # Exact: line ends stay as they are, because the tokenizer sees them.
    return read_text(path, limit=PLAIN_BYTES, error=CalibrationError).removeprefix("\ufeff")


def rows_file(spec: str, path: str, field: str) -> Corpus:
    """The texts in one field of JSON lines, of a JSON list, or of a Parquet table."""
    file = existing_file(Path(path))
    if file.suffix.lower() == ".parquet":
        documents = parquet_documents(file, field)
    else:
        documents = spooled((_json_texts if file.suffix.lower() == ".json" else jsonl_texts)(file, field))
    return Corpus(spec, documents, {"corpus": spec, "field": field, **file_provenance(file)})


def _json_texts(path: Path, field: str) -> Iterator[str]:
    """The texts of a file that holds a list of objects, or one, or JSON lines."""
    with open_regular(path, error=CalibrationError) as stream:
        lines = read_lines(stream, path, error=CalibrationError)
        first = next(filter(None, (line.removeprefix(codecs.BOM_UTF8).strip() for _, line in lines)), b"")
    if first.startswith(b"{") and first.endswith(b"}"):
        yield from jsonl_texts(path, field)
        return
    advice = "Expected a list of objects, or one object per line."
    content = parse_json(file_text(path), path, error=CalibrationError, advice=advice)
    for number, row in enumerate(content if isinstance(content, list) else [content], start=1):
        yield _field_text(row, field, path, f"{path}, entry {number}")


def jsonl_texts(path: Path, field: str) -> Iterator[str]:
    """The texts of a file of JSON lines, which may be gzipped."""
    try:
        with open_regular(path, error=CalibrationError) as raw:
            stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if path.suffix.lower() == ".gz" else raw
            packed, read = os.fstat(raw.fileno()).st_size, 0
            for number, line in read_lines(stream, path, error=CalibrationError):
                read += len(line)
                if read > max(PACKED_BYTES, PACKED_SHARE * packed):
                    raise CalibrationError(
                        f"{path}, line {number}: {packed:,} bytes have become more than {read - len(line):,}, which no "
                        "text does. Is it the right file?"
                    )
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line.strip():
                    where = f"{path}, line {number}"
                    row = parse_json(line, where, error=CalibrationError, advice="Expected one JSON object per line.")
                    yield _field_text(row, field, path, where)
    except (OSError, EOFError, zlib.error) as error:
        raise CalibrationError(f"{path}: cannot be read: {error}. Is the file complete, and really gzip?") from error


def _field_text(row: Any, field: str, path: Path, where: str) -> str:
    if not isinstance(row, dict):
        raise CalibrationError(
            f"{where}: got a JSON {type(row).__name__}, expected an object with the field {field!r}."
        )
    if field not in row:
        raise wrong_field(where, field, row, f"{path}:FIELD")
    text = _as_text(row[field], f"{where}, field {field!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"{where}: half a surrogate pair in the text ({error}). Mend or drop the line."
        ) from error
    return text


def wrong_field(where: str, field: str, fields: Iterable[str], form: str) -> CalibrationError:
    """The error that names the fields there are."""
    chat = next((name for name in CHAT_FIELDS if name in fields), None)
    if chat is not None and field == DEFAULT_FIELD:
        return CalibrationError(f"{where}: no field {field!r}, but {chat!r}. {_CHAT}")
    known = ", ".join(fields) or "none"
    return CalibrationError(f"{where}: no field {field!r}; fields found: {known}. Name one of them as {form}.")


def parquet_documents(path: Path, field: str) -> Sequence[str]:
    """The texts of a Parquet table, which stays on disk."""
    parquet = optional("pyarrow.parquet", str(path))
    arrow = importlib.import_module("pyarrow")
    try:
        schema = parquet.read_schema(path)
        if field not in schema.names:
            raise wrong_field(str(path), field, schema.names, f"{path}:FIELD")
        _check_column(arrow, schema.field(field).type, f"{path}, field {field!r}")
        column = parquet.read_table(path, columns=[field], memory_map=True).column(field)
    except (OSError, ValueError, LookupError, arrow.lib.ArrowException) as error:
        if isinstance(error, CalibrationError):
            raise
        raise CalibrationError(f"{path}: cannot be read as parquet: {error}. Is the file complete?") from error
    return table_rows(lambda index: column[index].as_py(), len(column), f"{path}, field {field!r}")


def _check_column(arrow: Any, kind: Any, where: str) -> None:
    """Raise CalibrationError for a column of something else than text."""
    inner = kind.value_type if arrow.types.is_dictionary(kind) else kind
    if str(inner) in ("string", "large_string", "string_view", "null"):
        return
    if arrow.types.is_list(inner) and arrow.types.is_struct(inner.value_type):
        raise CalibrationError(f"{where}: is a column of lists of messages, expected text. {_CHAT}")
    raise CalibrationError(f"{where}: is a column of {kind}, expected text. Choose another field.")


def optional(module: str, where: str) -> Any:
    """A module of an optional package. Raises `CalibrationError` that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise CalibrationError(
            f'{where}: needs the package {package}, which is not installed. Run: pip install "secateur[datasets]"'
        ) from error
