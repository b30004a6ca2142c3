"""Text corpora: named ones, data sets of the Hugging Face Hub, and local files, each as documents by position."""

import codecs
import gzip
import hashlib
import importlib
import os
import platform
import re
import tempfile
import weakref
import zlib
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast, overload

from secateur.errors import CalibrationError
from secateur.files.reading import open_regular, parse_json, read_lines, read_text

Role = Literal["calibration", "evaluation"]

C4_REPOSITORY = "allenai/c4"
C4_FILES: Mapping[Role, str] = {
    "calibration": "en/c4-train.00000-of-01024.json.gz",
    "evaluation": "en/c4-validation.00000-of-00008.json.gz",
}
C4_EVALUATION_DOCUMENTS = 1100
WIKITEXT2_REPOSITORY = "Salesforce/wikitext"
WIKITEXT2_FILES: Mapping[Role, str] = {
    "calibration": "wikitext-2-raw-v1/train-00000-of-00001.parquet",
    "evaluation": "wikitext-2-raw-v1/test-00000-of-00001.parquet",
}
WIKITEXT2_JOINERS: Mapping[Role, str] = {"calibration": " ", "evaluation": "\n\n"}
PYTHON_DOCS_HELD_OUT_STEP = 10
DEFAULT_JOINER = "\n\n"
DEFAULT_FIELD = "text"
SPOOL_BYTES = 64 * 2**20
PLAIN_BYTES = 2**30  # of a file that is read whole; those of JSON lines and Parquet may have any size
PACKED_BYTES, PACKED_SHARE = 2**30, 200  # a gzipped file that unpacks to more than both is no text
CHAT_FIELDS = ("messages", "conversations", "conversation")
HUB_PROBE_SECONDS = 5.0

ACCEPTED_FORMS = (
    "c4[:FILE], wikitext2[:FILE], python-docs, hf:NAME[:CONFIG][:SPLIT][:FIELD], a file FILE.txt, FILE.raw, "
    "FILE.jsonl[:FIELD], FILE.json[:FIELD], FILE.jsonl.gz[:FIELD], FILE.parquet[:FIELD] or FILE.safetensors "
    "(token ids), "
    "each also as WEIGHT*SPEC in a mixture"
)
_TEXT_FILE = re.compile(r"(?P<path>.+\.(?:txt|raw))", re.IGNORECASE)
_ROWS_FILE = re.compile(
    r"(?P<path>.+\.(?:(?P<jsonl>jsonl|json|jsonl\.gz|json\.gz)|parquet))(?::(?P<field>[^:/\\]+))?", re.IGNORECASE
)
_SEPARATOR_LINE = re.compile(r"(?:\r?\n)?^<\|endoftext\|>\r?(?:\n|\Z)", re.MULTILINE)


@dataclass(frozen=True)
class Corpus:
    """A named text: `documents` by position, the `joiner` that makes one text of them, and where they came from."""

    name: str
    documents: Sequence[str]
    joiner: str
    provenance: Mapping[str, Any]


def load_corpus(spec: str, role: Role) -> Corpus:
    """Return the corpus that `spec` names, in its calibration or its evaluation part.

    Blank documents of row corpora are kept: the published samplers draw among all rows.
    `c4:FILE` and `wikitext2:FILE` treat a local file as the papers treat that corpus: for C4 a (gzipped) file of JSON
    lines, for WikiText-2 a parquet file or an official `wiki.*.raw`. The same file without the prefix is read as it
    stands, which for `wiki.test.raw` is a different text with a different perplexity.

    Errors: CalibrationError for an unknown spec, a missing, empty or malformed file, a wrong field, an unreachable
    hub, a missing optional package, and a corpus without text.
    Reference: Wanda and SparseGPT, their data loaders (`get_c4`, `get_wikitext2`).
    """
    if role not in ("calibration", "evaluation"):
        raise CalibrationError(f"role: got {role!r}, expected 'calibration' or 'evaluation'.")
    corpus = _read(spec.strip(), role)
    _require_text(corpus)
    return corpus


def is_token_file(spec: str) -> bool:
    """Return whether `spec` names a file of token ids (`.safetensors`) instead of text."""
    return spec.strip().lower().endswith(".safetensors")


def existing_file(path: Path) -> Path:
    """Return `path`, with ~ written out, if it is a file with content.

    Otherwise CalibrationError, with the nearest names beside it.
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
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": str(path), "bytes": path.stat().st_size, "sha256": digest}


def _read(spec: str, role: Role) -> Corpus:
    name, _, local = spec.partition(":")
    if name in _NAMED:
        return _NAMED[name](role, local)
    if name == "hf":
        return _hub_dataset(spec, role)
    if _TEXT_FILE.fullmatch(spec):
        return _text_file(spec)
    if match := _ROWS_FILE.fullmatch(spec):
        return (_jsonl_file if match["jsonl"] else _parquet_file)(spec, match["path"], match["field"] or DEFAULT_FIELD)
    if is_token_file(spec):
        raise CalibrationError(f"{spec}: holds token ids, expected text. Pass it to calibration_windows as it is.")
    nearest = get_close_matches(name.lower(), [*_NAMED, "hf"], n=2)
    hint = f" Did you mean {' or '.join(nearest)}?" if nearest else ""
    raise CalibrationError(f"unknown corpus {spec!r}.{hint} Accepted: {ACCEPTED_FORMS}.")


def _require_text(corpus: Corpus) -> None:
    if not any(document.strip() for document in corpus.documents):
        count = len(corpus.documents)
        raise CalibrationError(
            f"{corpus.name}: no text in its {count} documents, expected at least one that is not blank."
        )


# Documents by position


class _LazyDocuments(Sequence[str]):
    """Documents read when asked for; subclasses give `_text` and `__len__`."""

    @abstractmethod
    def _text(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        positions = range(len(self))[index]
        return self._text(positions) if isinstance(positions, int) else [self._text(position) for position in positions]


class _SpooledDocuments(_LazyDocuments):
    """Texts as UTF-8 in one buffer that moves to an unnamed temporary file beyond `SPOOL_BYTES`."""

    def __init__(self, texts: Iterable[str]) -> None:
        # Memory: the C4 shard is 800 MB of text, of which sampling touches a few thousand documents. The buffer lives
        # as long as the corpus, hence no context manager.
        self._buffer = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115
        weakref.finalize(self, self._buffer.close)
        self._ends = array("Q", [0])
        for text in texts:
            self._ends.append(self._ends[-1] + self._buffer.write(text.encode()))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def _text(self, index: int) -> str:
        self._buffer.seek(self._ends[index])
        return self._buffer.read(self._ends[index + 1] - self._ends[index]).decode()


class _RowDocuments(_LazyDocuments):
    """One field of a table that stays where it is, on disk or memory-mapped."""

    def __init__(self, read: Callable[[int], Any], count: int, where: str) -> None:
        self._read, self._count, self._where = read, count, where

    def __len__(self) -> int:
        return self._count

    def _text(self, index: int) -> str:
        return _as_text(self._read(index), f"{self._where}, row {index}")


_CHAT = (
    "Chats are not read as such: text has to be given as the model is to see it. Write each chat as one text first, "
    "under a field 'text': tokenizer.apply_chat_template(messages, tokenize=False)."
)


def _as_text(value: Any, where: str) -> str:
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        raise CalibrationError(f"{where}: got a list of messages, expected text. {_CHAT}")
    if not isinstance(value, str):
        raise CalibrationError(
            f"{where}: got {type(value).__name__}, expected text. Choose another field or mend the row."
        )
    return value


# Local files


def _text_file(spec: str) -> Corpus:
    path = existing_file(Path(spec))
    documents = [document for document in _SEPARATOR_LINE.split(_file_text(path)) if document.strip()]
    return Corpus(spec, documents, DEFAULT_JOINER, {"corpus": spec, **file_provenance(path)})


def _file_text(path: Path) -> str:
    # Exact: line ends stay as they are, because the tokenizer sees them.
    return read_text(path, limit=PLAIN_BYTES, error=CalibrationError).removeprefix("\ufeff")


def _jsonl_file(spec: str, path: str, field: str) -> Corpus:
    file = existing_file(Path(path))
    texts = _json_texts if file.suffix.lower() == ".json" else _jsonl_texts
    documents = _SpooledDocuments(texts(file, field))
    return Corpus(spec, documents, DEFAULT_JOINER, {"corpus": spec, "field": field, **file_provenance(file)})


def _json_texts(path: Path, field: str) -> Iterator[str]:
    """The texts of a file that holds a list of objects, or one, or JSON lines."""
    with open_regular(path, error=CalibrationError) as stream:
        lines = read_lines(stream, path, error=CalibrationError)
        first = next(filter(None, (line.removeprefix(codecs.BOM_UTF8).strip() for _, line in lines)), b"")
    if first.startswith(b"{") and first.endswith(b"}"):
        yield from _jsonl_texts(path, field)
        return
    advice = "Expected a list of objects, or one object per line."
    text = read_text(path, limit=PLAIN_BYTES, error=CalibrationError).removeprefix("\ufeff")
    content = parse_json(text, path, error=CalibrationError, advice=advice)
    for number, row in enumerate(content if isinstance(content, list) else [content], start=1):
        yield _field_text(row, field, path, f"{path}, entry {number}")


def _jsonl_texts(path: Path, field: str) -> Iterator[str]:
    try:
        with open_regular(path, error=CalibrationError) as raw, _unpacked(raw, path) as stream:
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


def _unpacked(raw: BinaryIO, path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if path.suffix.lower() == ".gz" else raw


def _field_text(row: Any, field: str, path: Path, where: str) -> str:
    if not isinstance(row, dict):
        raise CalibrationError(
            f"{where}: got a JSON {type(row).__name__}, expected an object with the field {field!r}."
        )
    if field not in row:
        raise _wrong_field(where, field, row, f"{path}:FIELD")
    text = _as_text(row[field], f"{where}, field {field!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CalibrationError(
            f"{where}: half a surrogate pair in the text ({error}). Mend or drop the line."
        ) from error
    return text


def _wrong_field(where: str, field: str, fields: Iterable[str], form: str) -> CalibrationError:
    chat = next((name for name in CHAT_FIELDS if name in fields), None)
    if chat is not None and field == DEFAULT_FIELD:
        return CalibrationError(f"{where}: no field {field!r}, but {chat!r}. {_CHAT}")
    known = ", ".join(fields) or "none"
    return CalibrationError(f"{where}: no field {field!r}; fields found: {known}. Name one of them as {form}.")


def _parquet_file(spec: str, path: str, field: str) -> Corpus:
    file = existing_file(Path(path))
    documents = _parquet_documents(file, field)
    return Corpus(spec, documents, DEFAULT_JOINER, {"corpus": spec, "field": field, **file_provenance(file)})


def _parquet_documents(path: Path, field: str) -> Sequence[str]:
    parquet = _optional("pyarrow.parquet", str(path))
    arrow = importlib.import_module("pyarrow")
    try:
        schema = parquet.read_schema(path)
        if field not in schema.names:
            raise _wrong_field(str(path), field, schema.names, f"{path}:FIELD")
        _check_column(arrow, schema.field(field).type, f"{path}, field {field!r}")
        column = parquet.read_table(path, columns=[field], memory_map=True).column(field)
    except (OSError, ValueError, LookupError, arrow.lib.ArrowException) as error:
        if isinstance(error, CalibrationError):
            raise
        raise CalibrationError(f"{path}: cannot be read as parquet: {error}. Is the file complete?") from error
    return _RowDocuments(lambda index: column[index].as_py(), len(column), f"{path}, field {field!r}")


def _check_column(arrow: Any, kind: Any, where: str) -> None:
    """Raise CalibrationError for a column of something else than text."""
    inner = kind.value_type if arrow.types.is_dictionary(kind) else kind
    if str(inner) in ("string", "large_string", "string_view", "null"):
        return
    if arrow.types.is_list(inner) and arrow.types.is_struct(inner.value_type):
        raise CalibrationError(f"{where}: is a column of lists of messages, expected text. {_CHAT}")
    raise CalibrationError(f"{where}: is a column of {kind}, expected text. Choose another field.")


def _optional(module: str, where: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise CalibrationError(
            f'{where}: needs the package {package}, which is not installed. Run: pip install "secateur[datasets]"'
        ) from error


# Named corpora


def _c4(role: Role, local: str) -> Corpus:
    path, provenance = _source("c4", local, C4_REPOSITORY, C4_FILES[role], role)
    texts = _jsonl_texts(path, DEFAULT_FIELD)
    if role == "evaluation":
        return Corpus("c4", list(islice(texts, C4_EVALUATION_DOCUMENTS)), " ", provenance)
    return Corpus("c4", _SpooledDocuments(texts), DEFAULT_JOINER, provenance)


def _wikitext2(role: Role, local: str) -> Corpus:
    path, provenance = _source("wikitext2", local, WIKITEXT2_REPOSITORY, WIKITEXT2_FILES[role], role)
    rows = _parquet_documents(path, DEFAULT_FIELD) if path.suffix == ".parquet" else _wikitext_rows(path)
    return Corpus("wikitext2", rows, WIKITEXT2_JOINERS[role], provenance)


def _wikitext_rows(path: Path) -> list[str]:
    """Return the lines of an official raw file as the rows of the data set: with their line end, blank ones emptied."""
    lines = _file_text(path).removesuffix("\n").split("\n")
    return [f"{line}\n" if line.strip() else "" for line in lines]


def _source(name: str, local: str, repository: str, file: str, role: Role) -> tuple[Path, dict[str, Any]]:
    if not local:
        return _hub_file(name, repository, file, role)
    path = existing_file(Path(local))
    return path, {"corpus": name, **file_provenance(path)}


def _python_docs(role: Role, local: str) -> Corpus:
    if local:
        raise CalibrationError(f"python-docs:{local}: python-docs takes no file. Pass python-docs alone.")
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise CalibrationError(
            "python-docs: this Python comes without pydoc_data. Pass a local text file instead, such as my.jsonl."
        ) from error
    names = sorted(topics)
    held_out = set(names[::PYTHON_DOCS_HELD_OUT_STEP])
    chosen = [name for name in names if (name in held_out) == (role == "evaluation")]
    provenance = {"corpus": "python-docs", "python": platform.python_version(), "topics": len(chosen)}
    return Corpus("python-docs", [topics[name] for name in chosen], DEFAULT_JOINER, provenance)


_NAMED: Mapping[str, Callable[[Role, str], Corpus]] = {"c4": _c4, "wikitext2": _wikitext2, "python-docs": _python_docs}


# The Hugging Face Hub


def _hub_file(name: str, repository: str, file: str, role: Role) -> tuple[Path, dict[str, Any]]:
    """Return the local path of one file of a data set repository, from the cache if it is there, and its origin."""
    import huggingface_hub

    found = _cached(name, repository, file, role)
    if found is None:
        try:
            found = huggingface_hub.hf_hub_download(repository, file, repo_type="dataset")
        except Exception as error:  # whatever the transport raises, the user needs the same advice
            raise _unreachable(name, f"{repository}/{file} could not be fetched ({error})", role) from error
    revision = Path(found).parents[file.count("/")].name
    return Path(found), {"corpus": name, "repository": repository, "file": file, "revision": revision}


def _cached(name: str, repository: str, file: str, role: Role) -> str | None:
    """Return a hub file's path in the cache, or None where it can be fetched; CalibrationError where it cannot."""
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(repository, file, repo_type="dataset")
    if isinstance(found, str):
        return found
    if trouble := _hub_trouble():
        raise _unreachable(name, f"{trouble}, and {repository}/{file} is not in the local cache", role)
    return None


def quick_to_read(spec: str, most: int) -> str | None:
    """Return None where `load_corpus` reads this calibration corpus without a download and in at most `most` bytes.

    Otherwise a few words that say why not. Errors: what `load_corpus` would raise, as far as looking for it shows.
    """
    name, _, local = spec.partition(":")
    if name == "hf":
        there = Path(_hub_parts(spec)[0]).is_dir() or _hub_trouble() is not None
        return None if there else "it has to be downloaded"
    if name in ("c4", "wikitext2") and not local:
        repository = C4_REPOSITORY if name == "c4" else WIKITEXT2_REPOSITORY
        files = C4_FILES if name == "c4" else WIKITEXT2_FILES
        found = _cached(name, repository, files["calibration"], "calibration")
        if found is None:
            return "it has to be downloaded"
        path = Path(found)
    else:
        rows = _ROWS_FILE.fullmatch(local if name in _NAMED else spec)
        path = Path(rows["path"] if rows else local if name in _NAMED else spec)
    if path.is_file() and (size := path.stat().st_size) > most:
        return f"its {size / 1e6:,.0f} MB take long to read"
    return None


def _hub_trouble() -> str | None:
    """Return why the hub cannot be asked, or None when it answers."""
    import huggingface_hub.constants

    # Read here because `datasets` keeps a switch of its own, which must hold for the corpora that do not need it too.
    own_switch = os.environ.get("HF_DATASETS_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    if huggingface_hub.constants.HF_HUB_OFFLINE or own_switch:
        return "offline mode is on (HF_HUB_OFFLINE or HF_DATASETS_OFFLINE)"
    try:
        # One short question first: the hub's own client retries for half a minute before it gives up.
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=HUB_PROBE_SECONDS)
    except Exception as error:
        return f"{huggingface_hub.constants.ENDPOINT} does not answer ({error})"
    return None


def _unreachable(name: str, reason: str, role: Role) -> CalibrationError:
    file = "--calibration my.jsonl" if role == "calibration" else "my.jsonl"
    return CalibrationError(
        f"{name}: needs the Hugging Face Hub: {reason}. "
        f"Pass a local file, such as {file}, or python-docs, which needs no network; "
        "or run once with network, then the cached copy is used."
    )


def _hub_dataset(spec: str, role: Role) -> Corpus:
    name, config, split, field = _hub_parts(spec)
    table = _split(spec, _load_dataset(spec, name, config, role), split, role)
    if field not in table.column_names:
        raise _wrong_field(spec, field, table.column_names, "hf:NAME:CONFIG:SPLIT:FIELD")
    column = table.select_columns([field])
    documents = _RowDocuments(lambda index: column[index][field], len(column), f"{spec}, field {field!r}")
    # The fingerprint of `datasets` names the content as loaded.
    origin = {"split": str(table.split), "field": field, "fingerprint": table._fingerprint}
    return Corpus(spec, documents, DEFAULT_JOINER, {"corpus": spec, "dataset": name, "config": config, **origin})


def _hub_parts(spec: str) -> tuple[str, str | None, str | None, str]:
    """Return name, configuration, split and field; an empty part, as in `hf:NAME::test`, means the default."""
    parts = spec.split(":")[1:]
    if not parts[0] or len(parts) > 4:
        raise CalibrationError(
            f"{spec}: expected hf:NAME[:CONFIG][:SPLIT][:FIELD], such as hf:allenai/c4:en:train:text."
        )
    name, config, split, field = [part or None for part in parts] + [None] * (4 - len(parts))
    return str(name), config, split, field or DEFAULT_FIELD


def _load_dataset(spec: str, name: str, config: str | None, role: Role) -> Mapping[str, Any]:
    """Return the splits of a data set; without a connection, of a local folder or from the cache of `datasets`."""
    datasets = _optional("datasets", spec)
    trouble = None if Path(name).is_dir() else _hub_trouble()
    try:
        with _cache_only(datasets) if trouble else nullcontext():
            loaded: Mapping[str, Any] = datasets.load_dataset(name, config)
    except Exception as error:  # the library raises many kinds; each text is the best account there is
        if trouble:
            raise _unreachable(spec, f"{trouble}, and it is not in the local cache ({error})", role) from error
        raise CalibrationError(
            f"{spec}: the datasets library cannot load it: {error}. Check the name and the configuration."
        ) from error
    return loaded


@contextmanager
def _cache_only(datasets: Any) -> Iterator[None]:
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _split(spec: str, splits: Mapping[str, Any], split: str | None, role: Role) -> Any:
    wanted = [split] if split else ["train"] if role == "calibration" else ["test", "validation"]
    for name in wanted:
        if name in splits:
            return splits[name]
    raise CalibrationError(
        f"{spec}: no split {' or '.join(map(repr, wanted))}; splits found: {', '.join(splits)}. "
        "Name one of them as hf:NAME:CONFIG:SPLIT."
    )
