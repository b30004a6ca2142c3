"""Corpora, token windows, their errors and their exactness against the published loops."""

import gzip
import hashlib
import json
import os
import platform
import random
import re
import struct
import sys
import threading
import time
import tracemalloc
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from pydoc_data.topics import topics

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from secateur import calibration
from secateur.calibration import (
    Windows,
    calibration_windows,
    check_vocabulary,
    drawing,
    evaluation_windows,
    load_corpus,
)
from secateur.errors import CalibrationError

DATA = Path(__file__).parents[2] / "shared" / "data"
NAMES = sorted(topics)
WORDS = ["the", "pruning", "of", "trees", "is", "an", "old", "art", "and", "a", "patient", "one"]


def shared(path):
    if not (DATA / path).exists():
        pytest.skip(f"{DATA / path} is not on this machine")
    return DATA / path


@pytest.fixture(scope="module")
def tokenizer():
    """A real byte-level BPE whose texts start with <s>, and whose stated limit every long text exceeds."""
    from tokenizers.processors import TemplateProcessing

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(topics.values(), vocab_size=600, special_tokens=["<s>"], show_progress=False)
    trained._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, bos_token="<s>", model_max_length=16)


@pytest.fixture(scope="module")
def stories_tokenizer():
    return AutoTokenizer.from_pretrained(shared("models/stories260K"))


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def sentences(count, seed):
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(1, 120))) for _ in range(count)]


def write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({"url": "u", field: text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def write_parquet(path, texts, field="text"):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({"url": ["u"] * len(texts), field: texts}), path)
    return str(path)


def published_document_loop(documents, tokenizer, samples, length, seed):
    """The sampling of the published code, with the global generator, written anew from its description."""
    random.seed(seed)
    rows = []
    for _ in range(samples):
        ids = []
        while len(ids) <= length:
            ids = tokenizer(documents[random.randint(0, len(documents) - 1)], verbose=False).input_ids
        start = random.randint(0, len(ids) - length - 1)
        rows.append(ids[start : start + length])
    return torch.tensor(rows)


def published_concat_loop(text, tokenizer, samples, length, seed):
    random.seed(seed)
    ids = tokenizer(text, verbose=False).input_ids
    starts = [random.randint(0, len(ids) - length - 1) for _ in range(samples)]
    return torch.tensor([ids[start : start + length] for start in starts])


# Public names


def test_public_names_are_sorted_and_there():
    assert calibration.__all__ == sorted(calibration.__all__)
    assert all(hasattr(calibration, name) for name in calibration.__all__)


# Corpora


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


# The hub


def cache_hub_file(cache, repository, file, write):
    """Put a file into the hub cache, in the layout that its client documents."""
    root = cache / f"datasets--{repository.replace('/', '--')}"
    target = root / "snapshots" / "c0ffee" / file
    target.parent.mkdir(parents=True)
    write(target)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("c0ffee")


def test_cached_c4_loads_offline(offline, tmp_path):
    plain = Path(write_jsonl(tmp_path / "x.jsonl", ["a", "b"]))
    content = gzip.compress(plain.read_bytes())
    cache_hub_file(
        offline, "allenai/c4", "en/c4-train.00000-of-01024.json.gz", lambda target: target.write_bytes(content)
    )
    corpus = load_corpus("c4", "calibration")
    assert list(corpus.documents) == ["a", "b"]
    assert corpus.provenance["revision"] == "c0ffee"
    with pytest.raises(CalibrationError, match=r"c4: .*c4-validation\.00000-of-00008\.json\.gz is not in the local"):
        load_corpus("c4", "evaluation")


def test_cached_wikitext2_loads_offline(offline):
    cache_hub_file(
        offline,
        "Salesforce/wikitext",
        "wikitext-2-raw-v1/test-00000-of-00001.parquet",
        lambda target: write_parquet(target, ["", " = A = \n"]),
    )
    assert list(load_corpus("wikitext2", "evaluation").documents) == ["", " = A = \n"]


@pytest.mark.parametrize("spec", ["c4", "wikitext2", "hf:someone/something:config"])
def test_offline_fails_fast_and_says_what_to_do(offline, spec):
    if spec.startswith("hf:"):
        pytest.importorskip("datasets")
    start = time.monotonic()
    with pytest.raises(
        CalibrationError,
        match=r"^(c4|wikitext2|hf:someone/something:config): needs the Hugging Face Hub: offline mode is on "
        r"\(HF_HUB_OFFLINE or HF_DATASETS_OFFLINE\), and .* is not in the local cache.*\. Pass a local file, such as "
        r"--calibration my\.jsonl, or python-docs, which needs no network; or run once with network",
    ):
        load_corpus(spec, "calibration")
    assert time.monotonic() - start < 5


def test_offline_switch_of_datasets_counts_too(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with pytest.raises(CalibrationError, match=r"offline mode is on .* such as my\.jsonl, or python-docs"):
        load_corpus("c4", "evaluation")


@pytest.mark.parametrize("spec", ["c4", "hf:someone/something"])
def test_an_unreachable_hub_fails_without_long_retries(monkeypatch, tmp_path, spec):
    if spec.startswith("hf:"):
        pytest.importorskip("datasets")
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(CalibrationError, match=r"http://127\.0\.0\.1:9 does not answer \(.*Pass a local file"):
        load_corpus(spec, "calibration")
    assert time.monotonic() - start < 8


@pytest.fixture
def local_hub(monkeypatch, tmp_path):
    """A server on this machine that answers as the hub does for one file of C4, and with 404 for everything else."""
    content = gzip.compress(b'{"text": "fetched"}\n')

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            known = self.path in ("/", "/datasets/allenai/c4/resolve/main/en/c4-validation.00000-of-00008.json.gz")
            self.send_response(200 if known else 404)
            headers = {"ETag": '"e7a6"', "X-Repo-Commit": "c0ffee", "Content-Length": str(len(content) if known else 0)}
            for header in headers.items():
                self.send_header(*header)
            self.end_headers()
            return known

        def do_GET(self):
            if self.do_HEAD():
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield
        server.shutdown()


def test_fetched_from_a_hub_that_answers_and_then_cached(local_hub, monkeypatch):
    assert list(load_corpus("c4", "evaluation").documents) == ["fetched"]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert load_corpus("c4", "evaluation").provenance["revision"] == "c0ffee"


def test_a_hub_without_the_file(local_hub):
    with pytest.raises(CalibrationError, match=r"c4: .*c4-train\.00000-of-01024\.json\.gz could not be fetched \("):
        load_corpus("c4", "calibration")


@pytest.fixture
def dataset_folder(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "trees"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", ["a", "b"])
    write_jsonl(folder / "validation.jsonl", ["c"])
    return folder


def test_hf_data_set_of_a_local_folder(dataset_folder):
    corpus = load_corpus(f"hf:{dataset_folder}", "calibration")
    assert list(corpus.documents) == ["a", "b"]
    assert corpus.provenance["split"] == "train"
    assert list(load_corpus(f"hf:{dataset_folder}", "evaluation").documents) == ["c"]
    assert list(load_corpus(f"hf:{dataset_folder}::validation:url", "calibration").documents) == ["u"]
    json.dumps(corpus.provenance)


def test_hf_names_the_splits_and_fields_it_found(dataset_folder):
    with pytest.raises(CalibrationError, match=r"no split 'dev'; splits found: train, validation\. Name one of them"):
        load_corpus(f"hf:{dataset_folder}::dev", "calibration")
    with pytest.raises(CalibrationError, match=r"no field 'body'; fields found: url, text\. Name one of them as hf:"):
        load_corpus(f"hf:{dataset_folder}:::body", "calibration")


def test_hf_passes_on_what_the_library_says(dataset_folder):
    with pytest.raises(CalibrationError, match=r"datasets library cannot load it: .*'prose'.*Check the name and"):
        load_corpus(f"hf:{dataset_folder}:prose", "calibration")


@pytest.mark.parametrize("spec", ["hf:", "hf:a:b:c:d:e"])
def test_hf_form(spec):
    with pytest.raises(CalibrationError, match=r"expected hf:NAME\[:CONFIG\]\[:SPLIT\]\[:FIELD\], such as hf:allenai"):
        load_corpus(spec, "calibration")


def test_cached_hf_data_set_loads_offline(dataset_folder, offline):
    datasets = pytest.importorskip("datasets")
    made = datasets.load_dataset(str(dataset_folder), name="default")
    source = Path(made["train"].cache_files[0]["filename"]).parent
    target = dataset_folder.parent / "cache" / "someone___trees" / "default" / "0.0.0" / "c0ffee"
    target.mkdir(parents=True)
    info = json.loads((source / "dataset_info.json").read_text())
    (target / "dataset_info.json").write_text(
        json.dumps({**info, "config_name": "default", "dataset_name": "trees", "builder_name": "json"})
    )
    for split in made.values():
        arrow = Path(split.cache_files[0]["filename"])
        (target / arrow.name.replace(info["dataset_name"], "trees")).write_bytes(arrow.read_bytes())
    before = datasets.config.HF_HUB_OFFLINE
    assert list(load_corpus("hf:someone/trees", "calibration").documents) == ["a", "b"]
    assert before == datasets.config.HF_HUB_OFFLINE


# Errors of corpora


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
    with pytest.raises(CalibrationError, match=r"x\.txt: not UTF-8 text \(byte 3: .*\)\. Convert it"):
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
        with pytest.raises(
            CalibrationError, match=rf"{file.name}, line 2: is longer than 67,108,864 bytes, and at most"
        ):
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


# Sampling by document


@pytest.mark.parametrize("seed", [0, 1, 1234])
@pytest.mark.parametrize("length", [64, 777])
def test_document_sampling_is_the_published_loop(tokenizer, seed, length):
    documents = load_corpus("python-docs", "calibration").documents
    expected = published_document_loop(documents, tokenizer, 12, length, seed)
    found = calibration_windows("python-docs", tokenizer, samples=12, length=length, seed=seed, sampling="document")
    assert torch.equal(found.input_ids, expected)
    assert torch.equal(
        found.input_ids, calibration_windows("python-docs", tokenizer, samples=12, length=length, seed=seed).input_ids
    )


def test_document_sampling_of_real_c4(stories_tokenizer):
    file = shared("lm/c4_train_1000.jsonl")
    documents = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    expected = published_document_loop(documents, stories_tokenizer, 8, 2048, 0)
    found = calibration_windows(str(file), stories_tokenizer, samples=8)
    assert torch.equal(found.input_ids, expected)
    assert torch.equal(calibration_windows(f"c4:{file}", stories_tokenizer, samples=8).input_ids, expected)
    assert found.provenance["sources"][0]["draws"] > 8


def test_sampling_leaves_the_global_generators_alone(tokenizer):
    random.seed(7)
    torch.manual_seed(7)
    before = random.getstate(), torch.get_rng_state()
    calibration_windows(["python-docs", "python-docs"], tokenizer, samples=4, length=32)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_a_document_of_exactly_the_length_is_not_long_enough(tokenizer, tmp_path):
    text = "the pruning of trees"
    count = len(tokenizer(text).input_ids)
    (tmp_path / "x.txt").write_text(text)
    spec = str(tmp_path / "x.txt")
    with pytest.raises(CalibrationError, match=f"the longest has {count} tokens"):
        calibration_windows(spec, tokenizer, samples=1, length=count)
    found = calibration_windows(spec, tokenizer, samples=3, length=count - 1)
    assert found.input_ids.tolist() == [tokenizer(text).input_ids[:-1]] * 3


def test_giving_up_when_all_documents_are_known_to_be_short(tokenizer, tmp_path):
    spec = write_jsonl(tmp_path / "x.jsonl", sentences(9, seed=1))
    with pytest.raises(
        CalibrationError,
        match=r"x\.jsonl: expected documents of more than 5000 tokens, gave up after \d+ draws with 0 of 2 windows; "
        r"9 of 9 documents tried, the longest has (\d+) tokens\. Use --sampling concat or a --length below \1\.$",
    ):
        calibration_windows(spec, tokenizer, samples=2, length=5000)


def test_giving_up_after_the_draws_are_spent(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "DRAWS_PER_SAMPLE", 5)
    spec = write_jsonl(tmp_path / "x.jsonl", sentences(200, seed=1))
    with pytest.raises(CalibrationError, match=r"gave up after 5 draws with 0 of 2 windows; 5 of 200 documents tried"):
        calibration_windows(spec, tokenizer, samples=2, length=5000)


def test_long_texts_are_tokenised_without_a_warning_and_without_touching_the_tokenizer(tokenizer):
    # The tokenizer notes in `deprecation_warnings` that it has warned of a text beyond its limit of 16 tokens.
    before = (tokenizer.model_max_length, dict(tokenizer.deprecation_warnings))
    calibration_windows("python-docs", tokenizer, samples=2, length=64)
    calibration_windows("python-docs", tokenizer, samples=2, length=64, sampling="concat")
    evaluation_windows("python-docs", tokenizer, length=64)
    assert (tokenizer.model_max_length, dict(tokenizer.deprecation_warnings)) == before
    tokenizer("the pruning of trees " * 9)
    assert dict(tokenizer.deprecation_warnings) != before[1], "the warning that must not be there is still made"
    tokenizer.deprecation_warnings.clear()


def test_progress_counts_every_window(tokenizer):
    seen = []
    calibration_windows(
        ["python-docs", "2*python-docs"], tokenizer, samples=6, length=32, progress=lambda *pair: seen.append(pair)
    )
    assert seen == [(done, 6) for done in range(1, 7)]


# Sampling from one long sequence


def test_concat_sampling_is_the_published_loop(tokenizer):
    corpus = load_corpus("python-docs", "calibration")
    expected = published_concat_loop("\n\n".join(corpus.documents), tokenizer, 9, 500, 3)
    found = calibration_windows("python-docs", tokenizer, samples=9, length=500, seed=3, sampling="concat")
    assert torch.equal(found.input_ids, expected)
    assert found.provenance["sources"][0]["whole_corpus"] is True


def test_wikitext2_is_concatenated_with_blanks_unless_asked_otherwise(tokenizer):
    file = shared("lm/wiki.valid.head.raw")
    rows = load_corpus(f"wikitext2:{file}", "calibration").documents
    expected = published_concat_loop(" ".join(rows), tokenizer, 5, 300, 0)
    found = calibration_windows(f"wikitext2:{file}", tokenizer, samples=5, length=300)
    assert torch.equal(found.input_ids, expected)
    assert found.provenance["sources"][0]["sampling"] == "concat"
    with pytest.raises(CalibrationError, match=r"wikitext2: expected documents of more than 3000 tokens"):
        calibration_windows(f"wikitext2:{file}", tokenizer, samples=5, length=3000, sampling="document")


def test_concat_of_a_huge_corpus_reads_a_bounded_seeded_part(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "FEWEST_CHARACTERS", 0)
    spec = write_jsonl(tmp_path / "x.jsonl", sentences(500, seed=2))
    draw = lambda seed: calibration_windows(spec, tokenizer, samples=4, length=16, seed=seed, sampling="concat")  # noqa: E731
    facts = draw(0).provenance["sources"][0]
    assert facts["whole_corpus"] is False
    assert 64 * 4 * 16 - 2 <= facts["characters"] <= 64 * 4 * 16
    assert draw(0).digest == draw(0).digest != draw(1).digest


def test_concat_of_one_huge_document_takes_a_stretch_of_it(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "FEWEST_CHARACTERS", 0)
    text = " ".join(sentences(400, seed=3))
    (tmp_path / "x.txt").write_text(text)
    corpus = load_corpus(str(tmp_path / "x.txt"), "calibration")
    stretch = drawing._random_text(corpus, 5000, seed=1)
    assert len(stretch) == 5000
    assert stretch in text
    assert not text.startswith(stretch)


def test_concat_too_short(tokenizer, tmp_path):
    (tmp_path / "x.txt").write_text("a short text")
    with pytest.raises(
        CalibrationError,
        match=r"x\.txt: the whole text has \d+ tokens, a window of 100 needs at least 101\. Use a shorter --length or",
    ):
        calibration_windows(str(tmp_path / "x.txt"), tokenizer, samples=2, length=100, sampling="concat")


# Mixtures


def test_mixture_apportions_by_largest_remainder(tokenizer, tmp_path):
    specs = [write_jsonl(tmp_path / f"{name}.jsonl", sentences(40, seed)) for seed, name in enumerate("abc")]
    mixture = [f"0.5*{specs[0]}", f" 0.3 * {specs[1]}", f".2*{specs[2]}"]
    found = calibration_windows(mixture, tokenizer, samples=7, length=20, seed=5)
    sources = found.provenance["sources"]
    assert [source["samples"] for source in sources] == [4, 2, 1]
    assert [source["weight"] for source in sources] == [0.5, 0.3, 0.2]
    parts = [
        calibration_windows(spec, tokenizer, samples=count, length=20, seed=5 + position).input_ids
        for position, (spec, count) in enumerate(zip(specs, [4, 2, 1], strict=True))
    ]
    expected = torch.cat(parts)
    assert sorted(found.input_ids.tolist()) == sorted(expected.tolist())
    assert not torch.equal(found.input_ids, expected)
    assert found.digest == calibration_windows(mixture, tokenizer, samples=7, length=20, seed=5).digest


def test_mixture_of_equal_weights_and_of_one(tokenizer):
    alone = calibration_windows("python-docs", tokenizer, samples=5, length=32)
    assert calibration_windows(["3*python-docs"], tokenizer, samples=5, length=32).digest == alone.digest
    pair = calibration_windows(["python-docs", Path("python-docs")], tokenizer, samples=5, length=32)
    assert [source["samples"] for source in pair.provenance["sources"]] == [3, 2]
    assert len({tuple(row) for row in pair.input_ids.tolist()}) == 5


def test_mixture_with_token_ids(tokenizer, tmp_path):
    ids = torch.arange(4 * 32).reshape(4, 32)
    save_file({"input_ids": ids}, tmp_path / "x.safetensors")
    spec = str(tmp_path / "x.safetensors")
    found = calibration_windows(["python-docs", spec], tokenizer, samples=6, length=32)
    assert sum(row in ids[:3].tolist() for row in found.input_ids.tolist()) == 3
    with pytest.raises(CalibrationError, match=r"x\.safetensors: 4 windows, expected 5 for its share of the mixture"):
        calibration_windows(["python-docs", spec], tokenizer, samples=10, length=32)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], r"calibration: got no corpus, expected at least one"),
        (
            ["0*python-docs", "python-docs"],
            r"0\*python-docs: got the weight 0, expected a positive number, as in 0\.7\*c4",
        ),
        ("-1*python-docs", r"got the weight -1, expected a positive number"),
        (
            ["0.01*python-docs", "python-docs"],
            r"weight 0\.0099 of 8 samples is less than one window\. Raise the weight",
        ),
        (["python-docs", 3], r"calibration: got int, expected corpus specs, or alone a tensor or Windows"),
        (["python-docs", torch.ones(1, 4).long()], r"calibration: got Tensor, expected corpus specs"),
        (None, r"calibration: got NoneType, expected corpus specs"),
    ],
)
def test_wrong_mixtures(tokenizer, source, message):
    with pytest.raises(CalibrationError, match=message):
        calibration_windows(source, tokenizer, samples=8, length=32)


# Token ids as they are


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_tensor_is_copied_to_int64(dtype):
    ids = torch.arange(12, dtype=dtype).reshape(3, 4)
    found = calibration_windows(ids, None)
    ids[0, 0] = 9
    assert found.input_ids.tolist() == torch.arange(12).reshape(3, 4).tolist()
    assert found.input_ids.dtype == torch.int64
    assert found.provenance == {"source": "tensor", "samples": 3, "length": 4}


def test_windows_pass_through_and_can_be_shortened():
    first = calibration_windows(torch.arange(12).reshape(3, 4), None)
    assert calibration_windows(first, None).digest == first.digest
    shorter = evaluation_windows(first, None, windows=2, length=4)
    assert torch.equal(shorter.input_ids, first.input_ids[:2])
    assert shorter.provenance["samples"] == 2


@pytest.mark.parametrize("make", [calibration_windows, evaluation_windows])
def test_token_file(tmp_path, make):
    ids = torch.arange(12, dtype=torch.int32).reshape(3, 4)
    save_file({"input_ids": ids, "other": torch.ones(1)}, tmp_path / "x.safetensors")
    found = make(tmp_path / "x.safetensors", None)
    assert found.input_ids.tolist() == ids.tolist()
    assert (found.provenance["samples"], found.provenance["length"]) == (3, 4)
    assert found.provenance["sha256"] == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
    with pytest.raises(
        CalibrationError, match=r"windows of 4 tokens, expected --length 8\. Leave --length out, or make"
    ):
        make(str(tmp_path / "x.safetensors"), None, length=8)


def test_token_file_gives_the_first_samples_or_fewer_than_asked(tmp_path):
    save_file({"input_ids": torch.arange(12).reshape(3, 4)}, tmp_path / "x.safetensors")
    assert calibration_windows(tmp_path / "x.safetensors", None, samples=2).input_ids.tolist()[-1] == [4, 5, 6, 7]
    assert calibration_windows(tmp_path / "x.safetensors", None, samples=99).samples == 3


@pytest.mark.parametrize(
    "ids", [torch.ones(2, 2), torch.ones(4).long(), torch.ones(0, 4).long(), torch.ones(2, 2).bool()]
)
def test_token_ids_of_a_wrong_shape_or_type(tmp_path, ids):
    message = (
        r"got token ids of shape \([\d, ]*\) and torch\.\w+, expected \(samples, length\), not empty, in an integer"
    )
    with pytest.raises(CalibrationError, match=f"^tensor: {message}"):
        calibration_windows(ids, None)
    save_file({"input_ids": ids}, tmp_path / "x.safetensors")
    with pytest.raises(CalibrationError, match=rf"x\.safetensors: {message}"):
        calibration_windows(str(tmp_path / "x.safetensors"), None)


def test_bad_token_files(tmp_path):
    with pytest.raises(CalibrationError, match=r"x\.safetensors: no such file"):
        calibration_windows(str(tmp_path / "x.safetensors"), None)
    save_file({"ids": torch.ones(2, 2).long()}, tmp_path / "x.safetensors")
    with pytest.raises(CalibrationError, match=r"no tensor 'input_ids'; found: ids\. Save the ids under 'input_ids'"):
        calibration_windows(str(tmp_path / "x.safetensors"), None)
    (tmp_path / "x.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(CalibrationError, match=r"x\.safetensors: cannot be read as safetensors: "):
        calibration_windows(str(tmp_path / "x.safetensors"), None)


@pytest.mark.parametrize("make", [calibration_windows, evaluation_windows])
def test_text_needs_a_tokenizer(make):
    with pytest.raises(
        CalibrationError,
        match=r"^python-docs: text needs a tokenizer, got None\. Pass the model's tokenizer, or token ids: "
        r"a \(samples, length\) tensor or a \.safetensors file with the key 'input_ids'\.$",
    ):
        make("python-docs", None)


@pytest.mark.parametrize(("option", "value"), [("samples", 0), ("length", 0), ("samples", -3)])
def test_counts_are_positive(tokenizer, option, value):
    with pytest.raises(CalibrationError, match=f"--{option}: got {value}, expected at least 1"):
        calibration_windows("python-docs", tokenizer, **{option: value})


def test_unknown_sampling(tokenizer):
    with pytest.raises(CalibrationError, match=r"--sampling: got 'pack', expected document or concat"):
        calibration_windows("python-docs", tokenizer, sampling="pack")


# Windows


def test_digest_is_of_the_shape_and_the_ids():
    ids = torch.arange(12).reshape(3, 4)
    digest = hashlib.sha256(struct.pack("<14q", 3, 4, *range(12))).hexdigest()
    assert Windows(ids, {}).digest == digest
    assert Windows(ids.reshape(4, 3), {}).digest != digest
    assert Windows(ids.T.contiguous().T, {}).digest == digest
    changed = ids.clone()
    changed[2, 3] += 1
    assert Windows(changed, {}).digest != digest


def test_windows_refuse_other_shapes_and_types():
    with pytest.raises(
        CalibrationError, match=r"got input_ids of shape \(4,\) and torch\.int64, expected \(samples, len"
    ):
        Windows(torch.arange(4), {})
    with pytest.raises(CalibrationError, match=r"torch\.int32, expected"):
        Windows(torch.ones(2, 2, dtype=torch.int32), {})


def test_provenance_is_json_and_tells_the_choices(tokenizer):
    found = calibration_windows("python-docs", tokenizer, samples=3, length=40, seed=11)
    provenance = json.loads(json.dumps(found.provenance))
    assert provenance == found.provenance
    assert {key: provenance[key] for key in ("role", "samples", "length", "seed")} == {
        "role": "calibration",
        "samples": 3,
        "length": 40,
        "seed": 11,
    }
    assert provenance["tokenizer"]["class"] == type(tokenizer).__name__
    [source] = provenance["sources"]
    assert (source["corpus"], source["sampling"], source["weight"]) == ("python-docs", "document", 1.0)
    assert source["draws"] >= 3
    json.dumps(evaluation_windows("python-docs", tokenizer, length=40).provenance)


def test_defaults_are_128_windows_of_2048_tokens(tokenizer):
    assert calibration_windows("python-docs", tokenizer, sampling="concat").input_ids.shape == (128, 2048)
    assert evaluation_windows("python-docs", tokenizer).length == 2048


def test_check_vocabulary():
    found = Windows(torch.tensor([[0, 1, 2], [3, 511, 512], [600, 0, 0]]), {})
    check_vocabulary(found, 601)
    with pytest.raises(
        CalibrationError,
        match=r"^sample 1, position 2: token id 512 is outside the vocabulary of 512 ids \(2 such ids in all\); "
        r"does the tokenizer belong to this model\?$",
    ):
        check_vocabulary(found, 512)
    with pytest.raises(CalibrationError, match=r"sample 0, position 1: token id -1 is outside"):
        check_vocabulary(Windows(torch.tensor([[0, -1]]), {}), 512)


# Evaluation


def test_evaluation_is_one_call_cut_without_overlap(tokenizer):
    ids = tokenizer("\n\n".join(topics[name] for name in NAMES[::10]), verbose=False).input_ids
    found = evaluation_windows("python-docs", tokenizer, length=100)
    assert found.input_ids.shape == (len(ids) // 100, 100)
    assert found.input_ids.flatten().tolist() == ids[: len(ids) // 100 * 100]
    assert found.provenance["tokens_dropped"] == len(ids) % 100
    assert (found.input_ids == 0).sum() == 1, "one <s>, at the very start"
    assert torch.equal(
        evaluation_windows("python-docs", tokenizer, length=100, windows=3).input_ids, found.input_ids[:3]
    )
    assert evaluation_windows("python-docs", tokenizer, length=100, windows=10**6).digest == found.digest


def test_evaluation_of_the_official_wikitext_test_file(stories_tokenizer):
    file = shared("lm/wiki.test.raw")
    rows = [("" if not line.strip() else line + "\n") for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
    ids = stories_tokenizer("\n\n".join(rows), verbose=False).input_ids
    found = evaluation_windows(f"wikitext2:{file}", stories_tokenizer, length=512)
    assert found.input_ids.flatten().tolist() == ids[: len(ids) // 512 * 512]
    plain = evaluation_windows(str(file), stories_tokenizer, length=512)
    assert plain.samples == len(stories_tokenizer(file.read_text(encoding="utf-8"), verbose=False).input_ids) // 512
    assert plain.samples < found.samples


def test_a_few_windows_of_a_long_text_need_only_its_start(stories_tokenizer, monkeypatch):
    file = shared("lm/wiki.test.raw")
    whole = evaluation_windows(str(file), stories_tokenizer, length=128)
    monkeypatch.setattr(drawing, "FEWEST_CHARACTERS", 0)
    part = evaluation_windows(str(file), stories_tokenizer, length=128, windows=9)
    assert torch.equal(part.input_ids, whole.input_ids[:9])
    assert part.provenance["sources"][0]["characters"] == 64 * 128 * 9


def test_a_start_of_few_tokens_is_not_trusted(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "FEWEST_CHARACTERS", 0)
    monkeypatch.setattr(drawing, "CHARACTERS_PER_TOKEN", 1)
    spec = write_jsonl(tmp_path / "x.jsonl", sentences(50, seed=4))
    found = evaluation_windows(spec, tokenizer, length=100, windows=2)
    ids = tokenizer("\n\n".join(sentences(50, seed=4)), verbose=False).input_ids
    assert found.input_ids.flatten().tolist() == ids[:200]


def test_c4_evaluation_gives_256_windows_unless_asked_otherwise(tokenizer, tmp_path):
    spec = f"c4:{write_jsonl(tmp_path / 'x.jsonl', sentences(1100, seed=5))}"
    assert evaluation_windows(spec, tokenizer, length=32).samples == 256
    assert evaluation_windows(spec, tokenizer, length=32, windows=300).samples == 300


def test_evaluation_errors(tokenizer, tmp_path):
    (tmp_path / "x.txt").write_text("a short text")
    with pytest.raises(CalibrationError, match=r"x\.txt: the whole text has \d+ tokens, one window needs 64\. Use a"):
        evaluation_windows(str(tmp_path / "x.txt"), tokenizer, length=64)
    with pytest.raises(CalibrationError, match=r"evaluation: got list, expected one corpus, a tensor or Windows"):
        evaluation_windows(["python-docs", "python-docs"], tokenizer)
    with pytest.raises(CalibrationError, match=r"--windows: got 0, expected at least 1"):
        evaluation_windows("python-docs", tokenizer, windows=0)


def test_exact_fit_is_one_window(tokenizer, tmp_path):
    (tmp_path / "x.txt").write_text("a short text")
    ids = tokenizer("a short text").input_ids
    assert evaluation_windows(str(tmp_path / "x.txt"), tokenizer, length=len(ids)).input_ids.tolist() == [ids]
