"""Corpora: python-docs, text, JSON lines and Parquet files, document by document."""

import gzip
import hashlib
import platform
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from secateur.calibration.corpora import load_corpus
from texts import NAMES, sentences, shared, write_jsonl, write_parquet


def test_python_docs_parts_are_disjoint_and_complete():
    kept = load_corpus("python-docs", "calibration")
    held_out = load_corpus("python-docs", "evaluation")
    assert list(held_out.documents) == [topics[name] for name in NAMES[::10]]
    assert len(kept.documents) + len(held_out.documents) == len(NAMES)
    assert Counter([*kept.documents, *held_out.documents]) == Counter(topics.values())
    assert kept.provenance["python"] == platform.python_version()


def test_text_file_is_one_document_with_its_line_ends(tmp_path):
    (tmp_path / "book.txt").write_bytes(b"\xef\xbb\xbfone\r\n\n two\n")
    corpus = load_corpus(str(tmp_path / "book.txt"), "calibration")
    assert list(corpus.documents) == ["one\r\n\n two\n"]
    assert corpus.provenance["bytes"] == 14
    assert corpus.provenance["sha256"] == hashlib.sha256((tmp_path / "book.txt").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "text",
    [
        "a b\n<|endoftext|>\nc\n\nd\n<|endoftext|>\n<|endoftext|>\ne",
        "<|endoftext|>\na b\r\n<|endoftext|>\r\nc\n\nd\n<|endoftext|>\ne\n<|endoftext|>",
        "a b\n<|endoftext|>\nc\n\nd\n<|endoftext|>\ne\n<|endoftext|>\n",
    ],
)
def test_separator_lines_part_documents(tmp_path, text):
    (tmp_path / "x.RAW").write_bytes(text.encode())
    assert list(load_corpus(str(tmp_path / "x.RAW"), "calibration").documents) == ["a b", "c\n\nd", "e"]


def test_separator_inside_a_line_does_not_part(tmp_path):
    (tmp_path / "x.txt").write_text("say <|endoftext|> aloud\n<|endoftext|> so\n")
    assert len(load_corpus(str(tmp_path / "x.txt"), "calibration").documents) == 1


def test_real_stories_file_parts_into_its_stories():
    assert len(load_corpus(str(shared("lm/tinystories_sample.txt")), "calibration").documents) == 2316


@pytest.mark.parametrize("spool_bytes", [0, 2**20], ids=["on disk", "in memory"])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json.gz"])
def test_json_lines_by_position(tmp_path, monkeypatch, suffix, spool_bytes):
    monkeypatch.setattr("secateur.calibration.documents.SPOOL_BYTES", spool_bytes or 1)
    texts = ["plain", "", "naïve \u2028 line 漢字 🌳", "last"]
    file = Path(write_jsonl(tmp_path / "x.jsonl", texts))
    target = tmp_path / f"y{suffix}"
    target.write_bytes(gzip.compress(file.read_bytes()) if suffix.endswith("gz") else b"\n" + file.read_bytes())
    documents = load_corpus(str(target), "calibration").documents
    assert list(documents) == texts
    assert (documents[-2], documents[1:3], len(documents)) == (texts[2], texts[1:3], 4)
    with pytest.raises(IndexError):
        documents[4]


def test_json_lines_of_another_field(tmp_path):
    spec = write_jsonl(tmp_path / "x.jsonl", ["a", "b"], field="content")
    assert list(load_corpus(f"{spec}:content", "evaluation").documents) == ["a", "b"]


def test_parquet_by_position(tmp_path):
    spec = write_parquet(tmp_path / "x.parquet", ["a", "", "c"], field="content")
    documents = load_corpus(f"{spec}:content", "calibration").documents
    assert list(documents) == ["a", "", "c"]
    assert documents[-1] == "c"


def test_wikitext_raw_file_as_rows_of_the_data_set(tmp_path):
    file = shared("lm/wiki.test.raw")
    rows = [("" if not line.strip() else line + "\n") for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
    corpus = load_corpus(f"wikitext2:{file}", "evaluation")
    assert list(corpus.documents) == rows
    assert len(rows) == 4358
    assert (corpus.name, corpus.joiner) == ("wikitext2", "\n\n")
    parquet = write_parquet(tmp_path / "test.parquet", rows)
    assert list(load_corpus(f"wikitext2:{parquet}", "calibration").documents) == rows
    assert load_corpus(f"wikitext2:{parquet}", "calibration").joiner == " "


def test_c4_evaluation_takes_the_first_1100_documents_joined_by_a_blank(tmp_path):
    texts = sentences(1200, seed=0)
    corpus = load_corpus(f"c4:{write_jsonl(tmp_path / 'x.jsonl', texts)}", "evaluation")
    assert (list(corpus.documents), corpus.joiner) == (texts[:1100], " ")
