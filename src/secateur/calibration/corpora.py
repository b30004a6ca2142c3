"""Text corpora by their specs: named ones, data sets of the Hugging Face Hub, and local files."""

import importlib
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

from secateur.calibration.documents import (
    DEFAULT_FIELD,
    Corpus,
    existing_file,
    file_provenance,
    file_text,
    jsonl_texts,
    parquet_documents,
    rows_file,
    spooled,
    text_file,
)
from secateur.calibration.hub import HUB_FILES, Role, cached, hub_dataset, hub_file, hub_parts, hub_trouble
from secateur.calibration.own_text import is_own_text
from secateur.errors import CalibrationError

C4_EVALUATION_DOCUMENTS = 1100
PYTHON_DOCS_HELD_OUT_STEP = 10

ACCEPTED_FORMS = (
    "c4[:FILE], wikitext2[:FILE], python-docs, hf:NAME[:CONFIG][:SPLIT][:FIELD], a file FILE.txt, FILE.raw, "
    "FILE.jsonl[:FIELD], FILE.json[:FIELD], FILE.jsonl.gz[:FIELD], FILE.parquet[:FIELD] or FILE.safetensors "
    "(token ids), self[:PROMPTS] (text of the model's own), "
    "each also as WEIGHT*SPEC in a mixture"
)
_WEIGHTED = re.compile(r"\s*(?P<weight>[-+]?(?:\d+\.?\d*|\.\d+))\s*\*\s*(?P<spec>.+)")
_ROWS_FILE = re.compile(
    r"(?P<path>.+\.(?:jsonl|json|jsonl\.gz|json\.gz|parquet))(?::(?P<field>[^:/\\]+))?", re.IGNORECASE
)


Spec = str | Corpus  # what is one already was given as texts


def load_corpus(spec: Spec, role: Role) -> Corpus:
    """Return the corpus that `spec` names, in its calibration or its evaluation part.

    Blank documents of row corpora are kept: the published samplers draw among all rows.
    `c4:FILE` and `wikitext2:FILE` treat a local file as the papers treat that corpus: for C4 a (gzipped) file of JSON
    lines, for WikiText-2 a parquet file or an official `wiki.*.raw`. The same file without the prefix is read as it
    stands, which for `wiki.test.raw` is a different text with a different perplexity.

    Errors: CalibrationError for an unknown spec, a missing, empty or malformed file, a wrong field, an unreachable
    hub, a missing optional package, and a corpus without text.
    Reference: Wanda and SparseGPT, their data loaders (`get_c4`, `get_wikitext2`).
    """
    corpus = spec if isinstance(spec, Corpus) else _read(spec.strip(), role)
    if not any(document.strip() for document in corpus.documents):
        raise CalibrationError(
            f"{corpus.name}: no text in its {len(corpus.documents)} documents, expected at least one that is not blank."
        )
    return corpus


def names_corpus(text: str) -> bool:
    """Return whether a text is one of `ACCEPTED_FORMS`, whether or not there is such a file."""
    spec = match["spec"].strip() if (match := _WEIGHTED.fullmatch(text)) else text.strip()
    name, colon, rest = spec.partition(":")
    if "\n" in spec or rest[:1].isspace():
        return False
    return (
        name in _NAMED
        or (colon != "" and name in ("hf", "images", "audio", "labelled"))
        or spec.lower().endswith((".txt", ".raw", ".safetensors"))
        or _ROWS_FILE.fullmatch(spec) is not None
        or is_own_text(spec)
    )


def is_token_file(spec: Spec) -> bool:
    """Return whether `spec` names a file of token ids (`.safetensors`) instead of text."""
    return isinstance(spec, str) and spec.strip().lower().endswith(".safetensors")


def weighted(spec: Spec) -> tuple[Spec, Fraction]:
    """A spec without its weight in a mixture, and that weight."""
    if isinstance(spec, Corpus):
        return spec, Fraction(1)
    match = _WEIGHTED.fullmatch(spec)
    if not match:
        return spec.strip(), Fraction(1)
    weight = Fraction(match["weight"])
    if weight <= 0:
        raise CalibrationError(f"{spec}: got the weight {match['weight']}, expected a positive number, as in 0.7*c4.")
    return match["spec"].strip(), weight


def _read(spec: str, role: Role) -> Corpus:
    name, _, local = spec.partition(":")
    if name in _NAMED:
        return _NAMED[name](role, local)
    if name == "hf":
        return hub_dataset(spec, role)
    if spec.lower().endswith((".txt", ".raw")):
        return text_file(spec)
    if match := _ROWS_FILE.fullmatch(spec):
        return rows_file(spec, match["path"], match["field"] or DEFAULT_FIELD)
    if is_token_file(spec):
        raise CalibrationError(f"{spec}: holds token ids, expected text. Pass it to calibration_windows as it is.")
    if is_own_text(spec):
        raise CalibrationError(
            f"{spec}: is text that a model writes itself, and only calibration text can be that. Name a corpus or a "
            "file."
        )
    nearest = get_close_matches(name.lower(), [*_NAMED, "hf"], n=2)
    hint = f" Did you mean {' or '.join(nearest)}?" if nearest else ""
    raise CalibrationError(f"unknown corpus {spec!r}.{hint} Accepted: {ACCEPTED_FORMS}.")


# Named corpora


def _c4(role: Role, local: str) -> Corpus:
    path, provenance = _source("c4", local, role)
    texts = jsonl_texts(path, DEFAULT_FIELD)
    if role == "evaluation":
        return Corpus("c4", list(islice(texts, C4_EVALUATION_DOCUMENTS)), provenance, " ")
    return Corpus("c4", spooled(texts), provenance)


def _wikitext2(role: Role, local: str) -> Corpus:
    path, provenance = _source("wikitext2", local, role)
    rows: Sequence[str]
    if path.suffix == ".parquet":
        rows = parquet_documents(path, DEFAULT_FIELD)
    else:  # the lines of an official raw file are the rows of the data set: with their line end, blank ones emptied
        lines = file_text(path).removesuffix("\n").split("\n")
        rows = [f"{line}\n" if line.strip() else "" for line in lines]
    return Corpus("wikitext2", rows, provenance, " " if role == "calibration" else "\n\n")


def _source(name: str, local: str, role: Role) -> tuple[Path, dict[str, Any]]:
    if not local:
        return hub_file(name, role)
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
    return Corpus("python-docs", [topics[name] for name in chosen], provenance)


_NAMED: Mapping[str, Callable[[Role, str], Corpus]] = {"c4": _c4, "wikitext2": _wikitext2, "python-docs": _python_docs}


def quick_to_read(spec: Spec, most: int) -> str | None:
    """Return None where `load_corpus` reads this calibration corpus without a download and in at most `most` bytes.

    Otherwise a few words that say why not. Errors: what `load_corpus` would raise, as far as looking for it shows.
    """
    if isinstance(spec, Corpus):
        return None
    name, _, local = spec.partition(":")
    if name == "hf":
        there = Path(hub_parts(spec)[0]).is_dir() or hub_trouble() is not None
        return None if there else "it has to be downloaded"
    if (name, "calibration") in HUB_FILES and not local:
        found = cached(name, "calibration")
        if found is None:
            return "it has to be downloaded"
        path = Path(found)
    else:
        rows = _ROWS_FILE.fullmatch(local if name in _NAMED else spec)
        path = Path(rows["path"] if rows else local if name in _NAMED else spec)
    if path.is_file() and (size := path.stat().st_size) > most:
        return f"its {size / 1e6:,.0f} MB take long to read"
    return None
