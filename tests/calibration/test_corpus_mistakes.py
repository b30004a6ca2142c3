"""Corpora that cannot be read: every mistake is told with its place, and no file takes all memory."""

import gzip
import json
import os
import re
import sys
import tracemalloc
from pathlib import Path

import pytest

from secateur.calibration.corpora import load_corpus
from secateur.calibration.drawing import calibration_windows
from secateur.errors import CalibrationError
from texts import sentences, write_jsonl, write_parquet


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "wikitext",
            r"^unknown corpus 'wikitext'\. Did you mean wikitext2\? Accepted: c4\[:FILE\], wikitext2\[:FILE\],",
        ),
        ("C4", r"unknown corpus 'C4'\. Did you mean c4\?"),
        ("python_docs", r"Did you mean python-docs\?"),
        ("zebra", r"^unknown corpus 'zebra'\. Accepted: .*FILE\.jsonl\[:FIELD\].*WEIGHT\*SPEC in a mixture\.$"),
        ("notes.pdf", r"unknown corpus 'notes\.pdf'\. Accepted: "),
        ("missing.txt", r"^missing\.txt: no such file\. Check the path; it is relative to "),
        ("missing.jsonl:text", r"^missing\.jsonl: no such file"),
        ("c4:missing.gz", r"^missing\.gz: no such file"),
        ("ids.safetensors", r"ids\.safetensors: holds token ids, expected text\. Pass it to calibration_windows"),
        ("python-docs:x", r"python-docs:x: python-docs takes no file"),
    ],
)
def test_wrong_specs(spec, message):
    with pytest.raises(CalibrationError, match=message):
        load_corpus(spec, "calibration")


def test_misspelt_file_names_its_neighbour(tmp_path):
    write_jsonl(tmp_path / "stories.jsonl", ["a"])
    with pytest.raises(CalibrationError, match=r"story\.jsonl: no such file\. Did you mean stories\.jsonl\?"):
        load_corpus(str(tmp_path / "story.jsonl"), "calibration")


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.jsonl.gz", "x.parquet"])
def test_empty_file(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(
        CalibrationError, match=r"x\.\S+: the file is empty, expected text\. Was its download cut off\?"
    ):
        load_corpus(str(tmp_path / name), "calibration")


def test_folder_instead_of_file(tmp_path):
    (tmp_path / "x.txt").mkdir()
    with pytest.raises(CalibrationError, match=r"x\.txt: is a folder, expected a file"):
        load_corpus(str(tmp_path / "x.txt"), "calibration")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "b"', r"x\.jsonl, line 3: not JSON \(.*\)\. Expected one JSON object per line\.$"),
        (b'{"text": "\xff"}', r"x\.jsonl, line 3: not JSON \(.*utf-8.*\)"),
        (b'["b"]', r"x\.jsonl, line 3: got a JSON list, expected an object with the field 'text'"),
        (
            b'{"body": "b", "url": "u"}',
            r"line 3: no field 'text'; fields found: body, url\. Name one of them as .*:FIELD",
        ),
        (b'{"text": null}', r"line 3, field 'text': got NoneType, expected text\. Choose another field or mend"),
        (b'{"text": "\\ud83c"}', r"line 3: half a surrogate pair in the text"),
    ],
)
def test_bad_json_line(tmp_path, line, message):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\n\n' + line + b"\n")
    with pytest.raises(CalibrationError, match=message):
        load_corpus(str(tmp_path / "x.jsonl"), "calibration")


def test_damaged_gzip(tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(b'{"text": "a"}\n')
    with pytest.raises(CalibrationError, match=r"x\.jsonl\.gz: cannot be read: Not a gzipped file"):
        load_corpus(str(tmp_path / "x.jsonl.gz"), "calibration")
    whole = gzip.compress(b'{"text": "a"}\n' * 100)
    (tmp_path / "x.jsonl.gz").write_bytes(whole[:-10])
    with pytest.raises(CalibrationError, match=r"x\.jsonl\.gz: cannot be read: .* Is the file complete"):
        load_corpus(str(tmp_path / "x.jsonl.gz"), "calibration")


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "x.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(CalibrationError, match=r"x\.txt, line 1: not UTF-8 text \(byte 3: .*\)\. Convert it"):
        load_corpus(str(tmp_path / "x.txt"), "calibration")


def test_bad_parquet(tmp_path):
    spec = write_parquet(tmp_path / "x.parquet", ["a", None])
    with pytest.raises(CalibrationError, match=r"x\.parquet: no field 'body'; fields found: url, text\."):
        load_corpus(f"{spec}:body", "calibration")
    with pytest.raises(CalibrationError, match=r"x\.parquet, field 'text', row 1: got NoneType, expected text"):
        list(load_corpus(spec, "calibration").documents)
    (tmp_path / "y.parquet").write_bytes(b"PAR1, but no more")
    with pytest.raises(CalibrationError, match=r"y\.parquet: cannot be read as parquet: "):
        load_corpus(str(tmp_path / "y.parquet"), "calibration")


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([1, 2], "x.parquet, field 'text': is a column of int64, expected text. Choose another field."),
        ([b"a", b"b"], "is a column of binary, expected text"),
        ([["a"], ["b"]], "is a column of list<"),
        (
            [[{"role": "user", "content": "a"}]] * 2,
            "is a column of lists of messages, expected text. Chats",
        ),
    ],
)
def test_parquet_columns_that_are_no_text(tmp_path, column, message):
    spec = write_parquet(tmp_path / "x.parquet", column)
    with pytest.raises(CalibrationError, match=re.escape(message)):
        load_corpus(spec, "calibration")


def test_parquet_columns_of_other_kinds_of_text(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    for kind in (pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        spec = write_parquet(tmp_path / "x.parquet", pyarrow.array(["a", "b"]).cast(kind))
        assert list(load_corpus(spec, "calibration").documents) == ["a", "b"]


ROWS = [{"text": "one\u2028 line"}, {"text": "zwei – Zeilen\n", "url": "u"}]


@pytest.mark.parametrize("name", ["x.json", "x.JSON"])
@pytest.mark.parametrize("form", ["lines", "list", "indented list", "one object", "lines behind a mark"])
def test_json_files_hold_lines_or_a_list(tmp_path, name, form):
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    text = {
        "lines": lines,
        "list": json.dumps(ROWS, ensure_ascii=False),
        "indented list": json.dumps(ROWS, indent=1, ensure_ascii=False),
        "one object": json.dumps(ROWS[0], indent=1),
        "lines behind a mark": f"\ufeff\n{lines}\n",
    }[form]
    (tmp_path / name).write_text(text, encoding="utf-8")
    expected = [row["text"] for row in ROWS][: 1 if form == "one object" else 2]
    assert list(load_corpus(str(tmp_path / name), "calibration").documents) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"text": "a"}, {"body": "b"}]', "x.json, entry 2: no field 'text'; fields found: body"),
        ('["a"]', "x.json, entry 1: got a JSON str, expected an object"),
        ("{", "x.json: not JSON (Expecting property name"),
        ("[" * 200_000, "x.json: lists and objects lie more than 100 deep inside each other"),
        ('{"text": "a"}\n{"text": 1}\n', "x.json, line 2, field 'text': got int, expected text"),
    ],
)
def test_bad_json_files(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(CalibrationError, match=re.escape(message)):
        load_corpus(str(tmp_path / "x.json"), "calibration")


CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]


def test_chats_are_told_what_to_do(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps({"messages": CHAT}) + "\n")
    told = r"Write each chat as one text first, under a field 'text': tokenizer\.apply_chat_template\(messages, tok"
    with pytest.raises(CalibrationError, match=rf"x\.jsonl, line 1: no field 'text', but 'messages'\. .*{told}"):
        load_corpus(str(file), "calibration")
    with pytest.raises(CalibrationError, match=rf"line 1, field 'messages': got a list of messages, .*{told}"):
        load_corpus(f"{file}:messages", "calibration")
    file.write_text(json.dumps({"conversations": [{"from": "human", "value": "Hello"}]}) + "\n")
    with pytest.raises(CalibrationError, match="no field 'text', but 'conversations'"):
        load_corpus(str(file), "calibration")


@pytest.mark.parametrize("role", ["calibration", "evaluation"])
def test_a_line_that_is_too_long_is_named_in_flat_memory(tmp_path, role):
    plain, packed = tmp_path / "x.jsonl", tmp_path / "x.jsonl.gz"
    part = b"abcdefg " * 2**17
    with plain.open("wb") as one, gzip.open(packed, "wb", compresslevel=1) as two:
        for file in (one, two):
            file.write(b'{"text": "short"}\n{"text":"')
            for _ in range(100):
                file.write(part)
            file.write(b'"}\n')
    del part
    for file in (plain, packed):
        tracemalloc.start()
        with pytest.raises(CalibrationError, match=rf"{file.name}, line 2: is longer than 67,108,864 bytes, the most"):
            load_corpus(str(file), role)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 3 * 64 * 2**20


def test_a_file_that_unpacks_to_what_no_text_is(tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.calibration.documents.PACKED_BYTES", 2**20)
    with gzip.open(tmp_path / "x.jsonl.gz", "wb") as file:
        for _ in range(4000):
            file.write(b" " * 1000 + b"\n")
    with pytest.raises(CalibrationError, match=r"\.gz, line \d+: [\d,]+ bytes have become more than 1,[\d,]+, which"):
        load_corpus(str(tmp_path / "x.jsonl.gz"), "calibration")


def test_a_deep_line(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n' + "[" * 200_000)
    with pytest.raises(CalibrationError, match=r"x\.jsonl, line 2: lists and objects lie more than 100 deep"):
        load_corpus(str(tmp_path / "x.jsonl"), "calibration")


def test_a_plain_text_beyond_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.calibration.documents.PLAIN_BYTES", 100)
    (tmp_path / "x.txt").write_text("a" * 101)
    with pytest.raises(CalibrationError, match=r"x\.txt: has 101 bytes, and at most 100 are read"):
        load_corpus(str(tmp_path / "x.txt"), "calibration")


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.json", "x.jsonl.gz", "x.parquet", "x.safetensors"])
def test_pipes_and_devices_are_refused_at_once(tmp_path, name, tokenizer):
    os.mkfifo(tmp_path / name)
    with pytest.raises(CalibrationError, match=rf"{name}: is a pipe or a device, expected a regular file"):
        calibration_windows(str(tmp_path / name), tokenizer, samples=1, length=2)


@pytest.mark.parametrize("form", ["~/x.jsonl", "c4:~/x.jsonl", "0.5*~/x.jsonl", "~/x.jsonl:text"])
def test_the_home_folder_in_a_spec(tmp_path, monkeypatch, tokenizer, form):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / "x.jsonl", sentences(40, seed=1))
    made = calibration_windows(form, tokenizer, samples=2, length=8)
    assert made.provenance["sources"][0]["file"] == str(tmp_path / "x.jsonl")
    with pytest.raises(CalibrationError, match=r"~nobody-at-all/x\.jsonl: no such file"):
        load_corpus("~nobody-at-all/x.jsonl", "calibration")


@pytest.mark.parametrize(("name", "count"), [("x.txt", 0), ("x.jsonl", 2), ("x.parquet", 2)])
def test_nothing_but_blanks(tmp_path, name, count):
    path = tmp_path / name
    if name == "x.txt":
        path.write_text(" \n<|endoftext|>\n\n")
    else:
        {"x.jsonl": write_jsonl, "x.parquet": write_parquet}[name](path, [" \n", ""])
    with pytest.raises(CalibrationError, match=rf"no text in its {count} documents, expected at least one that is not"):
        load_corpus(str(path), "calibration")


@pytest.mark.parametrize(
    ("module", "spec", "package"), [("datasets", "hf:a/b", "datasets"), ("pyarrow.parquet", "x.parquet", "pyarrow")]
)
def test_missing_package(tmp_path, monkeypatch, module, spec, package):
    monkeypatch.chdir(tmp_path)
    Path("x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        CalibrationError,
        match=rf'{spec}: needs the package {package}, which is not installed\. Run: pip install "secateur\[datasets\]"',
    ):
        load_corpus(spec, "calibration")


def test_python_without_its_topics(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(CalibrationError, match=r"python-docs: this Python comes without pydoc_data"):
        load_corpus("python-docs", "calibration")
