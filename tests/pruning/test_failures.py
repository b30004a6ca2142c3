"""A failure, an interrupt or a mistake leaves nothing but finished blocks, and spares what was there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from pruned_checkpoints import calibration, file_hashes
from secateur.core.patterns import NM, Unstructured
from secateur.core.problem import Method, Problem, Solution
from secateur.errors import (
    CalibrationError,
    CheckpointError,
    MethodError,
    ModelStructureError,
    NumericalError,
    PatternError,
)
from secateur.files.checkpoint import Checkpoint
from secateur.methods.magnitude import magnitude
from secateur.methods.wanda import wanda
from secateur.pruning.engine import prune
from secateur.record.verify import verify
from secateur.runs.events import Event


class MiddleError(Exception):
    pass


def failing(error: type[BaseException], block: int = 1) -> Method:
    inner = wanda()

    def solve(problem: Problem) -> Solution:
        if problem.name.startswith(f"model.layers.{block}."):
            raise error("in the middle")
        return inner.solve(problem)

    return Method("failing", solve, inner.needs)


@pytest.mark.parametrize("error", [MiddleError, KeyboardInterrupt, NumericalError])
def test_a_failure_in_the_middle_leaves_finished_blocks(error, tmp_path):
    source, out = tiny.save("llama", tmp_path / "source"), tmp_path / "out"
    before = file_hashes(source)
    arguments = {"calibration": calibration(), "output": out, "offload_states": str(tmp_path / "fast")}
    with pytest.raises(MethodError if error is MiddleError else error, match="in the middle"):
        prune(source, method=failing(error), **arguments)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["fast", "out.partial", "source"]
    assert not list((tmp_path / "fast").iterdir())
    assert file_hashes(source) == before
    with pytest.raises(CheckpointError, match="1 of 3 blocks of an unfinished run are kept there"):
        prune(source, method=wanda(), **arguments)
    prune(source, method=wanda(), overwrite=True, **arguments)
    assert verify(out, Checkpoint(source)).ok


@pytest.mark.parametrize("stage", ["calibrate", "record", "read", "statistics", "forward", "write"])
def test_an_interrupt_at_any_stage_leaves_finished_blocks(stage, tmp_path):
    source, out = tiny.save("llama", tmp_path / "source"), tmp_path / "out"

    def interrupt(event: Event) -> None:
        if event.stage == stage and (event.block == 1 or stage in ("calibrate", "record")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(
            source,
            method=wanda(),
            calibration=calibration(),
            output=out,
            offload_states=str(tmp_path / "fast"),
            on_event=interrupt,
        )
    assert not out.exists()
    left = set() if stage in ("calibrate", "record") else {"out.partial"}
    assert {file.name for file in tmp_path.iterdir()} - {"fast"} == {"source", *left}
    assert not list((tmp_path / "fast").rglob("*"))


def test_a_failure_leaves_the_output_that_was_there(tmp_path):
    source, out = tiny.save("llama", tmp_path / "source"), tmp_path / "out"
    prune(source, method=magnitude(), output=out)
    before = file_hashes(out)
    with pytest.raises(MethodError):
        prune(source, method=failing(MiddleError), calibration=calibration(), output=out, overwrite=True)
    assert file_hashes(out) == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "out.partial", "source"]


def test_a_failure_leaves_a_module_usable():
    model = tiny.build("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MethodError) as caught:
        prune(model, method=failing(MiddleError), calibration=calibration())
    assert isinstance(caught.value.__cause__, MiddleError)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("model.layers.0.") for name in changed)
    with torch.no_grad():
        assert model(tiny.tokens()).logits.isfinite().all()


def test_output_that_exists(tmp_path):
    source, out = tiny.save("llama", tmp_path / "source"), tmp_path / "out"
    first = prune(source, method=magnitude(), pattern=Unstructured(0.25), output=out)
    before = file_hashes(out)
    with pytest.raises(CheckpointError, match="exists already"):
        prune(source, method=magnitude(), output=out)
    assert file_hashes(out) == before
    second = prune(source, method=magnitude(), pattern=Unstructured(0.75), output=out, overwrite=True)
    assert first.totals["sparsity"] == 0.25
    assert second.totals["sparsity"] == verify(out, Checkpoint(source)).sparsity == 0.75
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "source"]


def test_overwriting_spares_what_secateur_did_not_write(tmp_path):
    source, out = tiny.save("llama", tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"holds no secateur\.json"):
        prune(source, method=magnitude(), output=out, overwrite=True)
    assert (out / "thesis.tex").read_text() == "years of work"
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(CheckpointError):
        prune(source, method=magnitude(), output=file, overwrite=True)
    assert file.read_text() == "mine"
    empty = tmp_path / "empty"
    empty.mkdir()
    prune(source, method=magnitude(), output=empty, overwrite=True)
    assert verify(empty, Checkpoint(source)).ok


def test_the_source_is_never_the_output(tmp_path):
    source = tiny.save("llama", tmp_path / "source")
    prune(source, method=magnitude(), output=tmp_path / "pruned")
    before = file_hashes(tmp_path)
    link = tmp_path / "link"
    link.symlink_to(source)
    for target in (source, source / "deeper" / "out", link, tmp_path / "pruned" / ".." / "source"):
        with pytest.raises(CheckpointError, match="is the source, or lies inside it"):
            prune(source, method=magnitude(), output=target, overwrite=True)
    link.unlink()
    # A pruned model is a source like any other, and its folder as precious.
    with pytest.raises(CheckpointError, match="is the source"):
        prune(tmp_path / "pruned", method=magnitude(), output=tmp_path / "pruned", overwrite=True)
    assert file_hashes(tmp_path) == before


def test_a_source_inside_the_output_survives(tmp_path):
    outer = tmp_path / "outer"
    prune(tiny.save("llama", tmp_path / "first"), method=magnitude(), output=outer)
    inner = tiny.save("llama", outer / "inner")
    before = file_hashes(outer)
    with pytest.raises(CheckpointError, match="the output holds the source"):
        prune(inner, method=magnitude(), output=outer, overwrite=True)
    assert file_hashes(outer) == before


def test_a_folder_needs_an_output(tmp_path):
    source = tiny.save("llama", tmp_path / "source")
    with pytest.raises(CheckpointError, match="no output folder given"):
        prune(source, method=magnitude())


def test_the_output_folder_may_be_relative_and_deep(tmp_path, monkeypatch):
    source = tiny.save("llama", tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    prune(source.name, method=magnitude(), output=Path("a") / "b" / "out.v1")
    assert verify(tmp_path / "a" / "b" / "out.v1", Checkpoint(source)).ok
    assert sorted(os.listdir(tmp_path / "a" / "b")) == ["out.v1"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"propagate": "both"}, PatternError, "--propagate: got"),
        ({"only": ["*.nothing"]}, PatternError, "matches none of 21 matrices"),
        ({"skip": ["*"]}, PatternError, "nothing is left to prune"),
        ({"pattern": NM(2, 5)}, PatternError, r"needs in_features divisible by 5, got (32|48)"),
        ({"calibration": torch.full((2, 8), tiny.VOCABULARY)}, CalibrationError, "outside the vocabulary"),
        ({"calibration": tiny.tokens(length=65)}, CalibrationError, "64 positions"),
        ({"dtype": "int8"}, CheckpointError, "dtype must be"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(arguments, error, message, tmp_path):
    source = tiny.save("llama", tmp_path / "source")
    with pytest.raises(error, match=message):
        prune(source, **{"method": wanda(), "calibration": calibration(), "output": tmp_path / "out"} | arguments)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_a_matrix_that_sees_no_token_is_an_error(tmp_path):
    source = tiny.save("longcat_flash", tmp_path / "source")
    with pytest.raises(ModelStructureError, match=r"experts\.4.* saw no token of the 8 calibration samples.*--unseen"):
        prune(source, method=wanda(), calibration=calibration(), output=tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_weights_that_are_not_finite_are_an_error(tmp_path):
    source = tiny.save("llama", tmp_path / "source")
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(NumericalError, match=rf"{name}: 1 of 1536 weights are NaN or infinite"):
        prune(source, method=wanda(), calibration=calibration(), output=tmp_path / "out")
    with pytest.raises(NumericalError, match=name):
        prune(source, method=magnitude(), output=tmp_path / "out", overwrite=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.partial", "source"]


def solved(change: Callable[[Problem, Solution], Solution]) -> Method:
    inner = wanda()
    return Method("wrong", lambda problem: change(problem, inner.solve(problem)), inner.needs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda p, s: Solution(s.weight, torch.ones_like(s.mask)), PatternError, "breaks 0.5 unstructured per row"),
        (lambda p, s: Solution(p.weight, s.mask), PatternError, "768 non-zero weights .* its own mask"),
        (lambda p, s: Solution(s.weight.double(), s.mask), PatternError, "float64"),
        (lambda p, s: Solution(s.weight.t(), s.mask.t()), PatternError, "of shape"),
        (lambda p, s: Solution(s.weight / 0, s.mask), NumericalError, "1536 of 1536 weights"),
    ],
)
def test_a_method_cannot_break_the_plan(change, error, message, tmp_path):
    source = tiny.save("llama", tmp_path / "source")
    arguments = {"calibration": calibration(), "output": tmp_path / "out", "only": ["*.up_proj"]}
    with pytest.raises(error, match=message):
        prune(source, method=solved(change), **arguments)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]
