"""The store of evaluations, and the digest of a model that they are kept by."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import secateur
from command_line import forked, save_model
from secateur.errors import CheckpointError
from secateur.evaluate.results import Results
from secateur.files.digest import model_digest


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("results") / "model")


def found(perplexity: float) -> dict[str, Any]:
    """What is kept of a perplexity."""
    numbers = {"nats": 2.0, "standard_error": None, "perplexity": perplexity, "perplexity_error": None}
    return {"data": "c4", "digest": "d", "windows": 1, "length": 128, "window_nats": [2.0], **numbers}


def test_what_was_added_is_found(tmp_path: Path) -> None:
    store = Results(tmp_path / "deep" / "store")
    assert store.find("abc", "perplexity", {"data": "c4"}) is None
    assert store.of("abc") == []
    store.add("abc", "perplexity", {"data": "c4", "length": 128}, found(7.0))
    store.add("abc", "tasks", {"task": "boolq"}, {"results": []})
    store.add("other", "perplexity", {"data": "c4", "length": 128}, found(8.0))
    record = store.find("abc", "perplexity", {"length": 128, "data": "c4"})  # the order of keys is nothing
    assert record is not None
    assert (record.kind, record.result, record.key) == (
        "perplexity",
        found(7.0),
        {"data": "c4", "length": 128},
    )
    assert record.versions["secateur"] == secateur.__version__
    assert record.created.endswith("+00:00")
    assert store.find("abc", "agreement", {"data": "c4", "length": 128}) is None
    assert sorted(record.kind for record in store.of("abc")) == ["perplexity", "tasks"]
    store.add("abc", "perplexity", {"data": "c4", "length": 128}, found(6.0))
    assert [record.result for record in store.of("abc") if record.kind == "perplexity"] == [found(6.0)]
    assert not list(tmp_path.rglob(".*"))


def test_two_processes_write_whole_files(tmp_path: Path) -> None:
    def write() -> None:
        for number in range(30):
            Results(tmp_path).add("abc", "tasks", {"task": "boolq"}, {"results": [], "x": [number] * 5000})

    writers = {forked(write) for _ in range(2)}
    store, seen, codes = Results(tmp_path), 0, []
    while writers:
        seen += sum(len(record.result["x"]) == 5000 for record in store.of("abc"))
        for writer, status in [os.waitpid(writer, os.WNOHANG) for writer in writers]:
            if writer:
                writers.remove(writer)
                codes.append(os.waitstatus_to_exitcode(status))
    assert codes == [0, 0]
    assert seen
    (record,) = store.of("abc")
    assert record.result["x"] == [29] * 5000
    assert len(list((tmp_path / "abc").iterdir())) == 1


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "deep inside each other"),
        ("[]", "Expected `object`"),
        ('{"kind": "perplexity", "key": {}, "result": {"windows": 1}, "created": "", "versions": {}}', "damaged"),
        ('{"kind": "nothing", "key": {}, "result": {}, "created": "", "versions": {}}', "Invalid enum value"),
        ('{"kind": "tasks", "key": {}, "result": {"results": [1]}, "created": "", "versions": {}}', r"results\[0\]"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, text: str, what: str) -> None:
    store = Results(tmp_path)
    store.add("abc", "tasks", {}, {"results": []})
    (file,) = (tmp_path / "abc").iterdir()
    file.write_text(text)
    with pytest.raises(CheckpointError, match=rf"{file.name}: .*{what}.* (remove it|Remove it)\."):
        store.of("abc")


@pytest.mark.parametrize("part", ["evaluation", "torch", "transformers"])
def test_what_other_versions_found_is_not_taken_for_ones_own(part: str, tmp_path: Path) -> None:
    store = Results(tmp_path)
    store.add("abc", "tasks", {"task": "boolq"}, {"results": []})
    (file,) = (tmp_path / "abc").iterdir()
    value = json.loads(file.read_text())
    value["versions"]["secateur"] = "0.0.1"
    file.write_text(json.dumps(value))
    assert store.find("abc", "tasks", {"task": "boolq"}) is not None  # for ours, its revision counts
    value["versions"][part] = "0"
    file.write_text(json.dumps(value))
    assert store.find("abc", "tasks", {"task": "boolq"}) is None
    assert len(store.of("abc")) == (part != "evaluation")  # still told, but for figures that are made otherwise now


def test_the_digest_is_of_what_decides(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    digest = model_digest(model)
    for name in ("README.md", "LICENSE.txt", "secateur.json", "report.html", "NOTICE"):
        (copy / name).write_text("{}")
    assert model_digest(copy) == digest
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        value = json.loads((model / name).read_text())
        (copy / name).write_text(json.dumps({**value, "added": 1}))
        assert model_digest(copy) != digest, name
        shutil.copy(model / name, copy / name)
    (copy / "modeling_own.py").touch()
    assert model_digest(copy) != digest
    (copy / "modeling_own.py").unlink()
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert model_digest(copy) != digest
    with pytest.raises(CheckpointError, match=r"nope\.gguf: no such file"):
        model_digest(tmp_path / "nope.gguf")
