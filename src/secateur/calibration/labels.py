"""What samples are labelled with: the folders that files lie in, tables beside them, and tables of texts."""

import csv
import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import CalibrationError
from secateur.files.reading import json_lines, read_text

PREFIX = "labelled:"
FORM = (
    f"{PREFIX}FILE.jsonl or {PREFIX}FILE.csv, with columns as {PREFIX}FILE:TEXT:LABEL or {PREFIX}FILE:TEXT,TEXT:LABEL"
)
_SPEC = re.compile(r"(?P<file>.+\.(?:csv|jsonl))(?::(?P<texts>[^:]*))?(?::(?P<label>[^:]*))?", re.IGNORECASE)
# Columns that data sets call their texts, and what is to be said of them, where nobody names others.
TEXTS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("source",),
    ("text",),
    ("sentence",),
)
LABELS = ("label", "target")
TABLES = ("metadata.csv", "metadata.jsonl", "labels.csv")
FILE_NAME, LABEL = "file_name", "label"


@dataclass(frozen=True)
class Label:
    """What a sample is said to be, as it is written, and where that stands."""

    value: str
    where: str


def files_in(folder: Path, endings: Sequence[str]) -> list[Path]:
    """The files of a folder that end so in the order of their names, or else those in its folders, by turns."""

    def fits(file: Path) -> bool:
        return file.suffix.lower() in endings and file.is_file()

    found = sorted(filter(fits, folder.iterdir()))
    if found:
        return found
    # One of each folder after the other: where folders are classes, the first few files are of many.
    turns = [enumerate(sorted(filter(fits, inner.rglob("*")))) for inner in folder.iterdir() if inner.is_dir()]
    return [file for _, file in sorted(pair for inner in turns for pair in inner)]


@dataclass(frozen=True)
class Texts:
    """Texts of a table in their order, each alone or with a second one, and their labels where it has some."""

    file: Path
    texts: Sequence[tuple[str, ...]]
    labels: Sequence[Label] | None


def texts_of(source: Any) -> str | None:
    """The file after `labelled:`, with its columns, or None for another source."""
    if isinstance(source, Sequence) and not isinstance(source, str) and len(source) == 1:
        source = source[0]
    if isinstance(source, str | os.PathLike) and os.fspath(source).startswith(PREFIX):
        return os.fspath(source).removeprefix(PREFIX)
    return None


def read_texts(spec: str) -> Texts:
    """The texts of a file after `labelled:`. Raises `CalibrationError` for columns that it does not have."""
    found = _SPEC.fullmatch(spec)
    if found is None:
        raise CalibrationError(f"{PREFIX}{spec}: is no file of labelled texts. Expected {FORM}.")
    file = Path(found["file"]).expanduser()
    rows = table_rows(file)
    if not rows:
        raise CalibrationError(f"{file}: has no rows. Expected a text and a label in each.")
    there = list(rows[0][1])
    named = tuple(name.strip() for name in (found["texts"] or "").split(",") if name.strip())
    columns = named or next((known for known in TEXTS if all(name in there for name in known)), ())
    label = found["label"] or next((known for known in LABELS if known in there and known not in columns), None)
    if not 1 <= len(columns) <= 2:
        raise CalibrationError(
            f"{file}: which columns are texts? Columns found: {', '.join(there)}. Name one or two: {FORM}."
        )
    texts = [tuple(_cell(where, row, column) for column in columns) for where, row in rows]
    labels = None if label is None else [Label(_cell(where, row, label), where) for where, row in rows]
    return Texts(file, texts, labels)


def _cell(where: str, row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str | int | float):
        raise CalibrationError(
            f'{where}: has no text under "{column}" ({type(value).__name__}). Columns found: {", ".join(row)}. Name '
            f"others: {FORM}."
        )
    return str(value)


def file_labels(folder: Path, files: Sequence[Path]) -> list[Label] | None:
    """The label of each picture or recording of a folder, or None where it has none.

    They stand in a table `labels.csv`, `metadata.csv` or `metadata.jsonl` of the folder, with the columns file_name and
    label, or else are the names of the folders that the files lie in. Raises `CalibrationError` for a file that is not
    in the table.
    """
    for name in TABLES:
        if (folder / name).is_file():
            rows = [row for row in table_rows(folder / name) if LABEL in row[1]]
            if rows:
                return _from_table(folder, files, folder / name, rows)
    if any(file.parent == folder for file in files):
        return None
    return [Label(file.relative_to(folder).parts[0], str(file)) for file in files]


def _from_table(
    folder: Path, files: Sequence[Path], table: Path, rows: Sequence[tuple[str, Mapping[str, Any]]]
) -> list[Label]:
    known = {}
    for where, row in rows:
        if FILE_NAME not in row:
            raise CalibrationError(f"{where}: has no {FILE_NAME}; columns found: {', '.join(row)}.")
        known[(folder / str(row[FILE_NAME])).resolve()] = Label(str(row[LABEL]), f"{where}, {row[FILE_NAME]}")
    missing = [file for file in files if file.resolve() not in known]
    if missing:
        raise CalibrationError(
            f"{table}: has labels of {len(known):,} files, and none of {missing[0].relative_to(folder)} "
            f"({len(missing):,} of {len(files):,} are missing). Add a row {FILE_NAME},{LABEL} for each file."
        )
    return [known[file.resolve()] for file in files]


def table_rows(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """(where it stands, its values by column) of every row of a .csv file with a head line, or a .jsonl file."""
    if file.suffix.lower() == ".csv":
        text = read_text(file, error=CalibrationError).removeprefix("\ufeff")
        reader = csv.DictReader(io.StringIO(text, newline=""))
        try:
            found = []
            for row in reader:
                if None in row or None in row.values():
                    raise CalibrationError(
                        f"{file}, line {reader.line_num}: has another number of values than the head line, which has "
                        f"{len(reader.fieldnames or ())}. Values with commas stand in quotes."
                    )
                found.append((f"{file}, line {reader.line_num}", row))
            return found
        except csv.Error as error:
            raise CalibrationError(f"{file}, line {reader.line_num}: cannot be read as .csv: {error}.") from None
    advice = "Expected one JSON object per line."
    rows = json_lines(file, dict[str, Any], error=CalibrationError, advice=advice)
    return [(f"{file}, entry {number}", row) for number, (row, _) in enumerate(rows, 1)]
