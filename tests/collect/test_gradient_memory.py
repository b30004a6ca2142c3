"""Gradients in parts that fit into memory, on disk, and after failures."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

import tiny
from full_autograd import LENGTH, assert_same_totals, contents, interrupting, pinned, routes, take
from mapped_files import mapped_files
from secateur.collect.gradient_pass import chunk_sizes
from secateur.errors import CalibrationError, CheckpointError
from secateur.models.opening.opened import open_model


def with_memory_for(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the host have memory for the states of so many samples of the tiny models in float64."""
    each = (tiny.BLOCKS + 3) * LENGTH * tiny.HIDDEN * 8
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * samples * each + 1))


@pytest.mark.parametrize("name", ["llama", "gemma3n_text", "mixtral"])
@pytest.mark.parametrize("scope", ["model", "block"])
def test_samples_in_parts_that_fit(name, scope, tmp_path, monkeypatch):
    source = tiny.save(name, tmp_path / "source")
    ids = tiny.tokens(samples=5, length=LENGTH)
    size = 1 if routes(source) else 2
    skip = ["*.experts.*"] if name == "mixtral" else []
    options = {"dtype": "float64", "batch_size": size, "scope": scope, "skip": skip}
    whole = take(source, tmp_path / "whole", ids, **options)
    stages: list[str] = []
    with_memory_for(2, monkeypatch)
    if scope == "block":  # nothing is saved there but the states between two blocks, in and out
        monkeypatch.setattr(
            psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * 2 * 2 * LENGTH * tiny.HIDDEN * 8)
        )
    parts = take(source, tmp_path / "parts", ids, **options, progress=lambda stage, *_: stages.append(stage))
    assert {stage.rpartition(" ")[2] for stage in stages if stage.startswith("record")} == {"1/3", "2/3", "3/3"}
    assert_same_totals(whole, parts, 1e-12)
    for key in ("samples", "length", "tokens_digest", "model_digest"):
        assert whole.provenance[key] == parts.provenance[key]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "source", "whole"]


def test_a_zero_in_one_part_is_no_zero_in_the_whole(tmp_path, monkeypatch):
    """An expert that one part of the samples never reaches has a gradient from the others."""
    source = tiny.save("mixtral", tmp_path / "source")
    ids = tiny.tokens(samples=8, length=4)
    whole = take(source, tmp_path / "whole", ids, dtype="float64")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    stages: list[str] = []
    parts = take(source, tmp_path / "parts", ids, dtype="float64", progress=lambda stage, *_: stages.append(stage))
    assert "backward 8/8" in stages
    assert_same_totals(whole, parts, 1e-12)


def test_chunks_are_whole_batches_and_never_none(llama, monkeypatch):
    skeleton = open_model(llama).skeleton
    each = (tiny.BLOCKS + 3) * LENGTH * tiny.HIDDEN * 4

    def sizes(available: int, **changed: Any) -> Any:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
        given = {"samples": 100, "batch_size": 4, "scope": "model", "offload": "auto", "first": 0} | changed
        return chunk_sizes(skeleton, length=LENGTH, **given)

    assert (sizes(10**12).samples, sizes(10**12).bytes, sizes(10**12).folder) == (100, 100 * each, None)
    assert sizes(2 * 11 * each).samples == 8, "whole batches only"
    assert sizes(2 * 11 * each, offload="never").samples == 8
    assert sizes(0).samples == 4, "one batch at least"
    assert sizes(0, samples=3).samples == 3
    assert sizes(2 * 10 * each, batch_size=1).samples == 10
    assert sizes(2 * 10 * each, first=2, batch_size=1).samples == 15, "earlier blocks keep nothing: 4 states, not 6"
    assert sizes(2 * 10 * each, scope="block", batch_size=1).samples == 25, "2 states, not 6"
    assert sizes(2 * 99 * each, batch_size=1).samples == 50, "parts of equal size"


def test_offloaded_chunks_are_measured_by_the_disk(llama, tmp_path, monkeypatch):
    skeleton = open_model(llama).skeleton
    each = (tiny.BLOCKS + 3) * LENGTH * tiny.HIDDEN * 4
    asked: list[Path] = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=2 * 5 * each)

    monkeypatch.setattr("shutil.disk_usage", usage)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    deep = tmp_path / "not" / "there"
    sizes = chunk_sizes(skeleton, 100, LENGTH, 1, "model", str(deep), 0)
    assert (sizes.samples, sizes.folder) == (5, deep)
    assert asked == [tmp_path]


@pytest.mark.parametrize("scope", ["model", "block"])
@pytest.mark.parametrize("name", ["llama", "gemma3n_text"])
def test_states_on_disk_change_nothing(name, scope, tmp_path):
    source = tiny.save(name, tmp_path / "source")
    ids = tiny.tokens(samples=5, length=LENGTH)
    options = {"batch_size": 1 if routes(source) else 2, "scope": scope}
    in_memory = take(source, tmp_path / "memory", ids, offload_states="never", **options)
    fast = tmp_path / "fast"
    seen: set[int] = set()

    def look(stage: str, done: int, total: int) -> None:
        seen.add(len(mapped_files(fast)))

    (tmp_path / "fast").mkdir()
    (tmp_path / "fast" / "precious.txt").write_text("mine")
    on_disk = take(source, tmp_path / "disk", ids, offload_states=str(fast), progress=look, **options)
    assert_same_totals(in_memory, on_disk)
    assert max(seen) >= 3, seen
    assert contents(fast) == ["precious.txt"]


FAILURES = [
    *(("model", stage) for stage in ("calibrate", "record", "forward", "head", "backward", "write")),
    *(("block", stage) for stage in ("record", "forward and backward")),
]


@pytest.mark.parametrize(("scope", "stage"), FAILURES)
@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_leaves_what_is_finished(scope, stage, existing, llama, ids, tmp_path):
    fast, target = tmp_path / "fast", tmp_path / "gradients"
    fast.mkdir()
    if existing:
        take(llama, target, ids, only=["*.0.*"])
    held = target.read_bytes() if existing else None
    before = contents(tmp_path)
    options = {"scope": scope, "offload_states": str(fast), "overwrite": existing, "progress": interrupting(stage)}
    if stage == "calibrate":
        text = tmp_path.parent / "text.txt"
        text.write_text("words " * 1000)
        options |= {"calibration": str(text), "samples": 2, "length": 12, "tokenizer": Words()}
    with pytest.raises(KeyboardInterrupt):
        take(llama, target, ids, **options)
    kept = ["gradients.partial", *(f"gradients.partial/{name}" for name in ("journal.jsonl", "lock", "result"))]
    finished = stage in ("backward", "forward and backward", "write")
    assert contents(tmp_path) == sorted([*before, *(kept if finished else [])])
    assert not existing or target.read_bytes() == held


class Words:
    """A tokenizer that knows one word."""

    name_or_path = "words"

    def __call__(self, text: Any, **_: Any) -> dict[str, Any]:
        one = [5] * 1000
        return {"input_ids": one if isinstance(text, str) else [one for _ in text]}


def test_a_full_disk_leaves_nothing(llama, ids, tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("secateur.files.writer.reserve", full)
    with pytest.raises(CheckpointError, match=r"cannot reserve [\d,]+ bytes \(No space left on device\)"):
        take(llama, tmp_path / "gradients", ids)
    assert contents(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norms": []}, "norm: got none, expected l1, l2 or both."),
        ({"batch_size": 0}, "--batch-size: got 0, expected at least 1."),
        ({"batch_size": -1}, "--batch-size: got -1, expected at least 1."),
        (
            {"calibration": torch.full((2, 1), 5)},
            "--length: got 1, expected at least 2: the loss is that of predicting the next token.",
        ),
    ],
    ids=["no norm", "batches of none", "batches of less", "one token"],
)
def test_mistakes(options, message, llama, ids, tmp_path):
    with pytest.raises(CalibrationError, match=pinned(message)):
        take(llama, tmp_path / "gradients", ids, **options)
    assert contents(tmp_path) == []


def test_one_glob_and_one_norm_need_no_list(llama, ids, tmp_path):
    one = take(llama, tmp_path / "one", ids, norms="l2", only="*.q_proj", skip="*.2.*")
    assert sorted(one.matrices) == [f"model.layers.{block}.self_attn.q_proj.weight" for block in (0, 1)]
    assert one.provenance["norms"] == ["l2"]
