"""A run that was ended goes on where it was, to the same bytes; and never with another one's work."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import killed_runs
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import secateur
import tiny
from command_line import ended, forked, process
from secateur.collect.gradient_file import GradientFile
from secateur.collect.gradient_parts import GradientParts, other_file
from secateur.collect.gradient_pass import ChunkSizes
from secateur.core.problem import Problem
from secateur.errors import CheckpointError, PatternError
from secateur.runs import stopping
from secateur.runs.events import Event
from secateur.runs.journal import Journal

TIMES = ("seconds", "created", "digest", "command")  # what differs from run to run in a manifest


class PowerCutError(Exception):
    """Not an error of ours: whatever ends a run."""


def cut(stage: str, block: int) -> Callable[[Event], None]:
    """Ends a run when it gets to a stage of a block."""

    def on_event(event: Event) -> None:
        if event.stage == stage and event.block == block:
            raise PowerCutError

    return on_event


def contents(folder: Path) -> dict[str, Any]:
    """Every file of an output, but for the card, and for the times that its manifest tells."""
    found: dict[str, Any] = {
        file.name: file.read_bytes()
        for file in folder.iterdir()
        if file.name not in ("README.md", "secateur.json", "secateur_adapter.json")
    }
    manifest = json.loads((folder / "secateur.json").read_text())
    found["secateur.json"] = json.dumps(json.loads(json.dumps(manifest), object_hook=_without_times))  # in its order
    return found


def _without_times(value: dict[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if key not in TIMES}


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "wanda": ("llama", {"method": "wanda"}),
    "packed": ("llama", {"method": "wanda", "packed": True}),
    "magnitude": ("llama", {"method": "magnitude"}),
    "gradients first": ("llama", {"method": "gblm"}),
    "gradients of blocks": ("llama", {"method": "wanda_plus"}),
    "sites": ("qwen2", {"method": "sparsegpt", "within": "site"}),
    "residual targets": ("llama", {"method": "alps", "within": "site", "targets": "residual"}),
    "dense targets": ("llama", {"method": "sparsegpt", "targets": "dense"}),
    "dense propagation": ("llama", {"method": "wanda", "propagate": "dense"}),
    "experts": ("mixtral", {"method": "wanda", "pattern": "2:4", "within": "site"}),
    "shared keys and values": ("gemma3n_text", {"method": "wanda"}),
    "transposed": ("gpt2", {"method": "sparsegpt"}),
    "channels": (
        "qwen2",
        {"method": "wanda", "pattern": "2:4", "permute": True, "only": ["*.down_proj*", "*.o_proj*"]},
    ),
    "channels by site": ("gpt2", {"method": "sparsegpt", "pattern": "2:4", "permute": True, "within": "site"}),
    "some blocks": ("llama", {"method": "wanda", "skip": ["*layers.1.*"]}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_to_the_same_bytes(tmp_path: Path, name: str) -> None:
    architecture, options = RUNS[name]
    model = tiny.save(architecture, tmp_path / "model")
    options = {"calibration": tiny.tokens(6), "batch_size": 2, **options}
    if architecture == "mixtral":
        options["batch_size"] = None
    secateur.prune(model, output=tmp_path / "whole", **options)
    out = tmp_path / "out"
    solved: list[str | None] = []
    for block in (1, 2):
        with pytest.raises(PowerCutError):
            secateur.prune(model, output=out, resume=block > 1, on_event=cut("read", block), **options)
        assert not out.exists()
    manifest = secateur.prune(
        model,
        output=out,
        resume=True,
        on_event=lambda event: solved.append(event.matrix) if event.stage == "solve" else None,
        **options,
    )
    assert contents(out) == contents(tmp_path / "whole")
    assert solved == [name for name, entry in manifest.matrices.items() if entry["block"] == 2]
    assert {path.name for path in tmp_path.iterdir()} == {"model", "whole", "out"}
    assert secateur.verify(out).ok


def test_gradients_are_not_taken_again(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    options: dict[str, Any] = {"method": "gblm", "calibration": tiny.tokens()}
    secateur.prune(model, output=tmp_path / "whole", **options)
    with pytest.raises(PowerCutError):
        secateur.prune(model, output=tmp_path / "out", on_event=cut("record", 0), **options)
    seen: list[str] = []
    secateur.prune(
        model, output=tmp_path / "out", resume=True, on_event=lambda event: seen.append(event.stage), **options
    )
    assert not [stage for stage in seen if stage.startswith("gradients")]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_gradients_that_were_taken_in_part_are_not_taken_again(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    options: dict[str, Any] = {"method": "gblm", "calibration": tiny.tokens(), "output": tmp_path / "out"}
    secateur.prune(model, **{**options, "output": tmp_path / "whole"})

    def stop(event: Event) -> None:
        if event.stage == "gradients: backward" and event.done == 2:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        secateur.prune(model, on_event=stop, **options)
    with pytest.raises(CheckpointError, match="the gradients of 2 of 3 blocks of an unfinished run are kept there"):
        secateur.prune(model, **options)
    secateur.prune(model, resume=True, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "whole", "out"}


def gradients(model: Path, output: Path, **options: Any) -> GradientFile:
    chosen = {"calibration": tiny.tokens(4), "batch_size": 1, "norms": ["l1", "l2"], **options}
    return secateur.gradients(model, output, **chosen)


def cut_after(stage: str, done: int) -> Callable[[str, int, int], None]:
    """Ends the taking of gradients when a stage has done so much."""

    def progress(now: str, count: int, total: int) -> None:
        if (now, count) == (stage, done):
            raise PowerCutError

    return progress


# By turns an architecture has one number of parts in each scope in the tests that are not slow.
@pytest.mark.parametrize(
    ("architecture", "scope", "parts"),
    [
        pytest.param(name, scope, parts, marks=[] if (number + turn) % 3 == parts - 1 else pytest.mark.slow)
        for number, name in enumerate(["llama", "gemma3n_text", "mixtral", "gpt2"])
        for turn, scope in enumerate(["model", "block"])
        for parts in (1, 2, 3)
    ],
)
def test_gradients_go_on_to_the_same_sums(
    architecture: str, scope: str, parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each block of each part of the samples; how many parts there are is decided once."""
    model = tiny.save(architecture, tmp_path / "model")
    place = "secateur.collect.gradient_pass.chunk_sizes"
    sizes = ChunkSizes({1: 6, 2: 3, 3: 2}[parts], 0, None)
    monkeypatch.setattr(place, lambda *_: sizes)
    skip = ["*experts*"] if architecture == "mixtral" else []
    options = {"scope": scope, "calibration": tiny.tokens(6), "skip": skip}
    whole, out = gradients(model, tmp_path / "whole", **options), tmp_path / "out"
    taken: list[int] = []
    add = GradientParts.add
    monkeypatch.setattr(GradientParts, "add", lambda *args: (taken.append(args[2]), add(*args)))
    stage = "backward" if scope == "model" else "forward and backward"
    for part in range(parts):
        for block in range(tiny.BLOCKS):
            now = f"{stage} {part + 1}/{parts}" if parts > 1 else stage
            with pytest.raises(PowerCutError):
                gradients(model, out, resume=True, progress=cut_after(now, block + 1), **options)
            assert not out.exists()
            monkeypatch.setattr(place, lambda *_: ChunkSizes(1, 0, None))
    with pytest.raises(CheckpointError, match="the gradients of 3 of 3 blocks of an unfinished run are kept there"):
        gradients(model, out, **options)
    made = gradients(model, out, resume=True, **options)
    assert len(taken) == parts * tiny.BLOCKS, "none is taken twice"
    first, second = load_file(whole.path), load_file(made.path)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    different = {key for key, value in whole.provenance.items() if value != made.provenance[key]}
    assert different <= {"created"}
    assert {path.name for path in tmp_path.iterdir()} == {"model", "whole", "out"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"norms": ["l2"]}, "differs from this one: gradients no longer has "),
        ({"calibration": tiny.tokens(4, seed=1)}, "differs from this one: tokens was "),
        ({"batch_size": 2}, "differs from this one: batch size was 1 and is 2"),
        (
            {"skip": ["*q_proj*"]},
            "differs from this one: matrices no longer has model.layers.0.self_attn.q_proj.weight",
        ),
        ({"dtype": "float64"}, "differs from this one: dtype was torch.float32 and is torch.float64"),
        ({"unseen": "skip"}, "differs from this one: unseen was error and is skip"),
        ({"on_nonfinite": "skip-matrix"}, "differs from this one: on_nonfinite was error and is skip-matrix"),
        ({}, "has changed since its gradients were begun: the digest of its tensors was "),
    ],
)
def test_other_gradients_are_refused(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    model, out = tiny.save("llama", tmp_path / "model"), tmp_path / "out"
    with pytest.raises(PowerCutError):
        gradients(model, out, progress=cut_after("backward", 2))
    if not change:
        _flip(model / "model.safetensors", "model.embed_tokens.weight")
    before = {file: file.read_bytes() for file in (tmp_path / "out.partial").iterdir()}
    with pytest.raises(CheckpointError, match=told):
        gradients(model, out, resume=True, **change)
    assert {file: file.read_bytes() for file in (tmp_path / "out.partial").iterdir()} == before


@pytest.mark.parametrize("what", ["gradients", "prune"])
def test_a_run_that_ended_after_its_last_gradients_goes_on(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the samples came in parts, and the file of the part before is gone."""
    model, out = tiny.save("llama", tmp_path / "model"), tmp_path / "out"
    monkeypatch.setattr("secateur.collect.gradient_pass.chunk_sizes", lambda *_: ChunkSizes(2, 0, None))

    def run(**options: Any) -> None:
        if what == "gradients":
            gradients(model, out, **options)
        else:
            secateur.prune(model, output=out, method="gblm", calibration=tiny.tokens(4), batch_size=1, **options)

    def end(parts: GradientParts) -> None:
        other_file(parts.target).unlink()
        raise PowerCutError

    with monkeypatch.context() as patch:
        patch.setattr(GradientParts, "complete", end)
        with pytest.raises(PowerCutError):
            run()
    run(resume=True)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


def test_the_same_tokens_may_come_from_elsewhere(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    for name in ("one", "two"):
        save_file({"input_ids": tiny.tokens(4)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(PowerCutError):
        gradients(
            model,
            tmp_path / "out",
            calibration=str(tmp_path / "one.safetensors"),
            progress=cut_after("backward", 2),
        )
    made = gradients(model, tmp_path / "out", calibration=str(tmp_path / "two.safetensors"), resume=True)
    assert "one.safetensors" in json.dumps(made.provenance["calibration"])


@pytest.mark.parametrize("what", ["prune", "gradients"])
def test_another_configuration_of_the_same_weights_is_refused(what: str, tmp_path: Path) -> None:
    model, out = tiny.save("llama", tmp_path / "model"), tmp_path / "out"

    def run(*, resume: bool, cut_it: bool) -> None:
        if what == "gradients":
            ends = {"progress": cut_after("backward", 2)} if cut_it else {}
            gradients(model, out, resume=resume, **ends)
        else:
            ends = {"on_event": cut("read", 2)} if cut_it else {}
            secateur.prune(model, output=out, calibration=tiny.tokens(), resume=resume, **ends)

    with pytest.raises(PowerCutError):
        run(resume=False, cut_it=True)
    configuration = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**configuration, "rms_norm_eps": 0.5}))
    with pytest.raises(CheckpointError, match="differs from this one: model configuration was "):
        run(resume=True, cut_it=False)
    (model / "config.json").write_text(json.dumps(configuration))
    run(resume=True, cut_it=False)


def test_recovery_with_another_configuration_is_refused(tmp_path: Path) -> None:
    model, out = tiny.save("llama", tmp_path / "model"), tmp_path / "out"
    secateur.prune(model, output=tmp_path / "pruned", calibration=tiny.tokens())
    options: dict[str, Any] = {"output": out, "calibration": tiny.tokens(8), "epochs": 1}
    with pytest.raises(PowerCutError):
        secateur.reconstruct(tmp_path / "pruned", on_event=cut("tune", 2), **options)
    configuration = json.loads((tmp_path / "pruned" / "config.json").read_text())
    (tmp_path / "pruned" / "config.json").write_text(json.dumps({**configuration, "rms_norm_eps": 0.5}))
    with pytest.raises(CheckpointError, match="differs from this one: model configuration was "):
        secateur.reconstruct(tmp_path / "pruned", resume=True, **options)


def test_settings_of_libraries_are_a_part_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.save("llama", tmp_path / "model")
    with pytest.raises(PowerCutError):
        secateur.prune(model, output=tmp_path / "out", calibration=tiny.tokens(), on_event=cut("read", 2))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    with pytest.raises(CheckpointError, match="machine environment was nothing and is"):
        secateur.prune(model, output=tmp_path / "out", calibration=tiny.tokens(), resume=True)


def test_a_plan_tells_of_a_run_that_is_going_on(tmp_path: Path) -> None:
    model, notes = tiny.save("llama", tmp_path / "model"), []

    def look(event: Event) -> None:
        if event.stage == "read" and event.block == 2:
            notes.extend(secateur.estimate(model, output=tmp_path / "out", calibration=tiny.tokens()).notes)

    secateur.prune(model, output=tmp_path / "out", calibration=tiny.tokens(), on_event=look)
    assert notes == [f"{tmp_path / 'out'}: another run is writing it now."]


def test_block_by_block_recovery_goes_on(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    secateur.prune(model, output=tmp_path / "pruned", calibration=tiny.tokens())
    for targets in ("dense", "pruned"):
        whole, out = tmp_path / f"whole-{targets}", tmp_path / f"out-{targets}"
        options: dict[str, Any] = {"calibration": tiny.tokens(8), "epochs": 2, "targets": targets, "learning_rate": 0.1}
        secateur.reconstruct(tmp_path / "pruned", output=whole, **options)
        with pytest.raises(PowerCutError):
            secateur.reconstruct(tmp_path / "pruned", output=out, on_event=cut("tune", 2), **options)
        tuned: list[int] = []
        secateur.reconstruct(
            tmp_path / "pruned",
            output=out,
            resume=True,
            on_event=lambda event, tuned=tuned: tuned.append(event.block) if event.stage == "tune" else None,
            **options,
        )
        assert set(tuned) == {2}
        assert contents(out) == contents(whole)
        assert secateur.verify(out).ok


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """A model, and beside it what a run on it has left after two of three blocks."""
    model = tiny.save("llama", tmp_path / "model")
    with pytest.raises(PowerCutError):
        secateur.prune(model, output=tmp_path / "out", calibration=tiny.tokens(), on_event=cut("read", 2))
    return tmp_path


def test_an_unfinished_run_is_reported_with_what_can_be_done(
    unfinished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    partial = unfinished / "out.partial"
    before = {file: file.read_bytes() for file in partial.rglob("*") if file.is_file()}
    with pytest.raises(CheckpointError) as caught:
        secateur.prune(unfinished / "model", output=unfinished / "out", calibration=tiny.tokens())
    size = sum(len(content) for content in before.values())
    assert str(caught.value) == (
        f"{partial}: 2 of 3 blocks of an unfinished run are kept there ({size / 1000:.1f} kB). The same command with "
        "--resume goes on after them; with --overwrite it starts anew."
    )
    assert {file: file.read_bytes() for file in partial.rglob("*") if file.is_file()} == before
    with caplog.at_level(logging.WARNING):
        secateur.prune(unfinished / "model", output=unfinished / "out", calibration=tiny.tokens(), overwrite=True)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"{partial}: left by a run that ended before it was complete")
    assert not partial.exists()


def test_a_dry_run_tells_of_it(unfinished: Path) -> None:
    partial = unfinished / "out.partial"
    before = {file: file.read_bytes() for file in partial.rglob("*") if file.is_file()}
    found = secateur.estimate(unfinished / "model", output=unfinished / "out", calibration=tiny.tokens())
    assert found.notes == [
        f"{partial}: 2 of 3 blocks of an unfinished run are kept there "
        f"({sum(map(len, before.values())) / 1000:.1f} kB). The same command with --resume goes on after them; with "
        "--overwrite it starts anew."
    ]
    assert {file: file.read_bytes() for file in partial.rglob("*") if file.is_file()} == before
    assert secateur.estimate(unfinished / "model", output=unfinished / "other", calibration=tiny.tokens()).notes == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sparsity": 0.6}, "plan model.layers.0.mlp.down_proj.weight sparsity was 0.5 and is 0.6"),
        ({"method": "magnitude"}, "settings statistics no longer has SquaredNorm"),
        ({"calibration": tiny.tokens(seed=1)}, "tokens was "),
        ({"batch_size": 1}, "settings batch_size was auto and is 1"),
        ({"propagate": "dense"}, "settings propagate was pruned and is dense"),
        ({"dtype": "float64"}, "settings dtype was float32 and is float64"),
        ({"skip": ["*q_proj*"]}, "is nothing"),
        ({"packed": True}, "packed was false and is true"),
    ],
)
def test_another_run_is_refused(unfinished: Path, change: dict[str, Any], told: str) -> None:
    partial = unfinished / "out.partial"
    before = {file: file.read_bytes() for file in partial.rglob("*") if file.is_file()}
    options: dict[str, Any] = {"calibration": tiny.tokens(), "resume": True, **change}
    with pytest.raises(CheckpointError, match="the unfinished run differs from this one") as caught:
        secateur.prune(unfinished / "model", output=unfinished / "out", **options)
    assert told in str(caught.value)
    assert {file: file.read_bytes() for file in partial.rglob("*") if file.is_file()} == before


def test_another_number_of_threads_is_refused(unfinished: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(CheckpointError, match=f"machine threads was {threads} and is {threads + 1}"):
            secateur.prune(unfinished / "model", output=unfinished / "out", calibration=tiny.tokens(), resume=True)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("where", ["a planned tensor", "a norm", "the embeddings"])
def test_a_changed_model_is_refused(unfinished: Path, where: str) -> None:
    name = {
        "a planned tensor": "model.layers.0.mlp.up_proj.weight",
        "a norm": "model.layers.1.input_layernorm.weight",
        "the embeddings": "model.embed_tokens.weight",
    }[where]
    _flip(unfinished / "model" / "model.safetensors", name)
    with pytest.raises(CheckpointError, match=f"the model has changed since this run was begun: {name}"):
        secateur.prune(unfinished / "model", output=unfinished / "out", calibration=tiny.tokens(), resume=True)


def test_changed_work_is_refused(unfinished: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    _flip(unfinished / "out.partial" / "result" / "model.safetensors", name)
    with pytest.raises(CheckpointError, match=f"{name} was changed since it was written"):
        secateur.prune(unfinished / "model", output=unfinished / "out", calibration=tiny.tokens(), resume=True)


def _flip(shard: Path, name: str) -> None:
    """Change one bit of a tensor."""
    from secateur.files.checkpoint import read_header

    place = read_header(shard).tensors[name].start
    with shard.open("r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 1]))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("first line", "line 1: damaged or altered"),
        ("middle", "line 2: damaged or altered"),
        ("format", "format 99, expected 1; another version of Secateur began this run"),
        ("link", "is a symbolic link"),
    ],
)
def test_a_damaged_journal_is_refused(unfinished: Path, damage: str, told: str) -> None:
    file = unfinished / "out.partial" / "journal.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    if damage == "first line":
        lines[0] = lines[0].replace('"propagate": "pruned"', '"propagate": "dense"')
    elif damage == "middle":
        lines[1] = lines[1][:30] + "\n"
    elif damage == "format":
        lines[0] = lines[0].replace('"format": 1', '"format": 99')
    if damage == "link":
        file.rename(unfinished / "elsewhere")
        file.symlink_to(unfinished / "elsewhere")
    else:
        assert lines != file.read_text().splitlines(keepends=True)
        file.write_text("".join(lines))
    with pytest.raises(CheckpointError, match=told if damage != "middle" else "line 2: "):
        secateur.prune(unfinished / "model", output=unfinished / "out", calibration=tiny.tokens(), resume=True)
    secateur.prune(unfinished / "model", output=unfinished / "out", calibration=tiny.tokens(), overwrite=True)
    assert secateur.verify(unfinished / "out").ok


@pytest.mark.parametrize("left", [1, 40, -1])
def test_a_line_that_was_being_written_does_not_count(unfinished: Path, left: int) -> None:
    file = unfinished / "out.partial" / "journal.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]) + lines[-1][:left])
    solved: set[int] = set()
    secateur.prune(
        unfinished / "model",
        output=unfinished / "out",
        calibration=tiny.tokens(),
        resume=True,
        on_event=lambda event: solved.add(event.block) if event.stage == "solve" else None,
    )
    assert solved == {1, 2}
    secateur.prune(unfinished / "model", output=unfinished / "whole", calibration=tiny.tokens())
    assert contents(unfinished / "out") == contents(unfinished / "whole")


def test_where_nothing_is_unfinished_a_run_begins(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    secateur.prune(model, output=tmp_path / "out", calibration=tiny.tokens(), resume=True)
    assert secateur.verify(tmp_path / "out").ok
    with pytest.raises(CheckpointError, match="exists already"):
        secateur.prune(model, output=tmp_path / "out", calibration=tiny.tokens(), resume=True)


def test_an_error_before_the_first_block_leaves_nothing(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    with pytest.raises(PowerCutError):
        secateur.prune(model, output=tmp_path / "out", calibration=tiny.tokens(), on_event=cut("solve", 0))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_run_that_is_not_resumable_leaves_nothing(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    options: dict[str, Any] = {"output": tmp_path / "out", "calibration": tiny.tokens(), "resumable": False}
    with pytest.raises(PowerCutError):
        secateur.prune(model, on_event=cut("read", 2), **options)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(PatternError, match=r"^--resume: a run that shares statistics, or was not to be resumable"):
        secateur.prune(model, resume=True, **options)


def test_a_cell_of_a_sweep_that_fails_leaves_no_checkpoint(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")

    def score(problem: Problem) -> torch.Tensor:
        if problem.name.startswith("model.layers.2."):
            raise PowerCutError
        return problem.weight.abs()

    save_file({"input_ids": tiny.tokens()}, tmp_path / "tokens.safetensors")
    found = secateur.sweep(
        model,
        output=tmp_path / "sweep",
        methods={"own": secateur.select("own", score)},
        patterns=["50%"],
        data=str(tmp_path / "tokens.safetensors"),
        calibration=str(tmp_path / "tokens.safetensors"),
    )
    assert [cell.status for cell in found.cells] == ["failed"]
    assert not [path for path in (tmp_path / "sweep").rglob("*") if path.suffix in (".partial", ".safetensors")]


@pytest.mark.parametrize("ending", [PowerCutError, CheckpointError])
def test_gradients_of_a_sweep_go_on(ending: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the disk was full."""
    model, ids = tiny.save("llama", tmp_path / "model"), tmp_path / "tokens.safetensors"
    save_file({"input_ids": tiny.tokens()}, ids)
    taken: list[int] = []
    add = GradientParts.add

    def counted(*args: Any) -> None:
        taken.append(args[2])
        add(*args)

    def run(methods: list[str], end_at: int) -> Any:
        def ending_add(*args: Any) -> None:
            if len(taken) == end_at:
                raise ending("the end")
            counted(*args)

        monkeypatch.setattr(GradientParts, "add", ending_add)
        options: dict[str, Any] = {"data": str(ids), "calibration": str(ids), "patterns": ["50%"]}
        return secateur.sweep(model, output=tmp_path / "sweep", methods=methods, **options)

    if ending is PowerCutError:
        with pytest.raises(PowerCutError):
            run(["gblm"], 2)
    else:
        assert [cell.status for cell in run(["gblm"], 2).cells] == ["failed"]
    assert [cell.status for cell in run(["gblm"], -1).cells] == ["done"]
    assert taken == [2, 1, 0], "none is taken twice"


def test_gradients_of_a_sweep_begin_anew_where_cells_need_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny.save("llama", tmp_path / "model"), tmp_path / "tokens.safetensors"
    save_file({"input_ids": tiny.tokens()}, ids)
    options: dict[str, Any] = {"output": tmp_path / "sweep", "data": str(ids), "calibration": str(ids)}

    def end(*args: Any) -> None:
        add(*args)
        raise PowerCutError

    add = GradientParts.add
    with monkeypatch.context() as patch:
        patch.setattr(GradientParts, "add", end)
        with pytest.raises(PowerCutError):
            secateur.sweep(model, methods=["pruner_zero"], **options)
    found = secateur.sweep(model, methods=["pruner_zero", "gblm"], **options)
    assert [cell.status for cell in found.cells] == ["done", "done"]
    assert not list((tmp_path / "sweep").glob("*.partial"))


def test_a_run_that_replaces_an_output_goes_on(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    secateur.prune(model, output=tmp_path / "out", sparsity=0.25, calibration=tiny.tokens())
    with pytest.raises(PowerCutError):
        secateur.prune(
            model, output=tmp_path / "out", calibration=tiny.tokens(), overwrite=True, on_event=cut("read", 2)
        )
    assert secateur.verify(tmp_path / "out").ok
    with pytest.raises(CheckpointError, match="exists already"):
        secateur.prune(model, output=tmp_path / "out", calibration=tiny.tokens(), resume=True)
    manifest = secateur.prune(model, output=tmp_path / "out", calibration=tiny.tokens(), resume=True, overwrite=True)
    assert manifest.totals["sparsity"] == 0.5
    assert secateur.verify(tmp_path / "out").ok
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


def test_other_commands_leave_an_unfinished_run_alone(unfinished: Path) -> None:
    secateur.prune(unfinished / "model", output=unfinished / "other", method="magnitude")
    with pytest.raises(CheckpointError, match="2 of 3 blocks of an unfinished run are kept there"):
        secateur.reconstruct(unfinished / "other", output=unfinished / "out", calibration=tiny.tokens(8))
    with pytest.raises(CheckpointError, match="the unfinished run differs from this one: run was prune"):
        secateur.reconstruct(unfinished / "other", output=unfinished / "out", calibration=tiny.tokens(8), resume=True)


def test_a_source_that_changes_during_the_run_is_an_error(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    before = (model / "model.safetensors").read_bytes()

    def touch(event: Event) -> None:
        if event.stage == "solve" and event.block == 0:
            _flip(model / "model.safetensors", "model.layers.2.mlp.up_proj.weight")

    with pytest.raises(CheckpointError, match=r"model\.safetensors: was changed while it was being read"):
        secateur.prune(model, output=tmp_path / "out", calibration=tiny.tokens(), on_event=touch)
    assert not (tmp_path / "out").exists()
    assert (model / "model.safetensors").read_bytes() != before


# Signals


def test_a_signal_after_the_last_step_is_not_lost() -> None:
    with pytest.raises(KeyboardInterrupt), stopping.at_safe_points():
        assert stopping.stop()
    assert not stopping.stop()  # outside there is nothing that would stop


def test_signals_stop_at_a_safe_point_and_say_how_to_go_on(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = signal.Signals[name]
        done = _signalled(model, tmp_path, number, times=1)
        assert done.returncode == 128 + number
        lines = done.stderr.splitlines()
        again = "press Ctrl-C again" if name == "SIGINT" else "send the signal again"
        assert f"Stopping at the next safe point; {again} to stop at once." in lines
        ending = "Interrupted" if name == "SIGINT" else f"Ended by {name}"
        assert lines[-1].startswith(f"{ending}. {tmp_path}/out.partial: 2 of 3 blocks of an unfinished run are kept")
        assert lines[-1].endswith("The same command with --resume goes on after them; with --overwrite it starts anew.")
        shutil.rmtree(tmp_path / "out.partial")


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    done = _signalled(model, tmp_path, signal.SIGINT, times=2)
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == "Stopped at once. Run the command again to see what is kept."
    done = _signalled(model, tmp_path, signal.SIGINT, times=0, more=["--resume"])
    assert done.returncode == 0
    assert secateur.verify(tmp_path / "out").ok


def _signalled(
    model: Path, place: Path, number: int, *, times: int, more: list[str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """`prune` with a method that sends a signal to its own process, in the last block."""
    (place / "signalling.py").write_text(
        "import os, secateur\n"
        "def method():\n"
        "    def score(problem):\n"
        "        times = int(os.environ['TIMES'])\n"
        "        if problem.name.startswith('model.layers.2.self_attn.q'):\n"
        f"            for _ in range(times):\n"
        f"                os.kill(os.getpid(), {int(number)})\n"
        "        return problem.weight.abs()\n"
        "    return secateur.select('signalling', score, needs=frozenset())\n"
    )
    command = ["prune", model, "-o", "out", "--method", "signalling:method", *(more or [])]
    return process(*command, cwd=place, before=lambda: os.environ.update(TIMES=str(times)))


def test_the_journal_tells_what_is_there(unfinished: Path) -> None:
    journal = Journal(unfinished / "out.partial" / "journal.jsonl")
    assert journal.run == "prune"
    assert journal.told() == "2 of 3 blocks"
    assert list(journal.found) == ["outside", "block 0", "block 1"]
    assert journal.seconds["total"] > 0


# Kills and faults


@pytest.mark.parametrize(("what", "method", "count"), [("kill", "sparsegpt", 12), ("fault", "gblm", 8)])
def test_whatever_ends_a_run_it_can_be_resumed(tmp_path: Path, what: str, method: str, count: int) -> None:
    _survives(two_blocks(tmp_path / "model"), tmp_path, method, what, count)


def two_blocks(folder: Path) -> Path:
    """A tiny LLaMA of two blocks."""
    config = tiny.ARCHITECTURES["llama"]()
    config.num_hidden_layers = 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("what", ["kill", "fault"])
@pytest.mark.parametrize("method", ["sparsegpt", "gblm"])
def test_a_thousand_ends(tmp_path: Path, what: str, method: str) -> None:
    """There are about 300 file operations: each of them fails in turn, in several ways."""
    _survives(tiny.save("llama", tmp_path / "model"), tmp_path, method, what, 1000)


def _survives(model: Path, folder: Path, method: str, what: str, count: int) -> None:
    """A run is ended at so many points, each time resumed, and its output compared byte for byte."""
    (folder / "runs").mkdir()
    words = ["killed_runs", model, folder / "runs", method, what, "0", count, "0"]

    def run() -> None:
        for name, number in (("told", 1), ("errors", 2)):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        sys.argv = list(map(str, words))
        killed_runs.main()
        sys.stdout.flush()

    code = ended(forked(run), patience=3600)
    assert (code, (folder / "errors").read_text()) == (0, "")
    seen = json.loads((folder / "told").read_text())
    assert seen["kept"] > count / 10
    assert seen["kept"] + seen["nothing"] + seen["whole"] == count
