"""Corpora of the hub: from its cache, from a server on this machine, and without a network."""

import gzip
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

from command_line import call, save_model  # noqa: F401 - a fixture
from secateur.calibration.corpora import load_corpus
from secateur.calibration.hub import default_text
from secateur.errors import CalibrationError
from secateur.record.manifest import read_manifest
from texts import write_jsonl, write_parquet


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


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


def test_the_text_where_none_is_named(offline, call, caplog):  # noqa: F811
    """Without the hub and a copy of C4 or WikiText-2: text that ships inside Python, and a line that says so."""
    model, out = save_model(offline.parent / "model"), offline.parent / "pruned"
    default_text.cache_clear()
    done = call("prune", model, "-o", out, "--samples", "4", "--length", "32")
    assert done.code == 0
    assert "c4 is not on this machine and the hub cannot be asked: this run takes python-docs" in caplog.text
    (source,) = read_manifest(out).calibration["sources"]
    assert (source["corpus"], source["sampling"]) == ("python-docs", "concat")
    found = call("eval", out, "--length", "32", "--windows", "2", "--json")
    assert found.json["data"] == "python-docs"
    assert "wikitext2 is not on this machine" in caplog.text
    assert call("compare", model, out, "--length", "32", "--windows", "2").out.count("python-docs") == 1
    recovered = ("--length", "32", "--held-out", "2")
    assert call("recover", out, "-o", out.with_name("full"), "-m", "full", "--steps", "1", *recovered).code == 0
    assert call("recover", out, "-o", out.with_name("block"), "-m", "block", "--samples", "4", *recovered).code == 0
    assert read_manifest(out.with_name("full")).recovery["data"]["name"] == "python-docs"
    (source,) = read_manifest(out.with_name("block")).recovery["calibration"]["sources"]
    assert source["corpus"] == "python-docs"
    named = call("eval", out, "--data", "wikitext2")
    assert (named.code, named.message.startswith("Error: wikitext2: needs the Hugging Face Hub")) == (2, True)
    default_text.cache_clear()
