"""A sweep goes on where it was, through kills and restarts, unless something has changed."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

import secateur
import tiny
from command_line import ended, forked
from counted_forwards import counted
from secateur.core.statistics import SquaredNorm
from secateur.errors import CheckpointError, PatternError
from secateur.sweeps.cells import SweepEvent
from sweep_runs import HALF, MORE, Run, contents


def pruned_cells(events: list[SweepEvent]) -> list[str]:
    """The cells of which blocks were pruned, in order."""
    names = [event.cell.name for event in events if event.cell is not None and event.stage == "blocks"]
    return list(dict.fromkeys(names))


# Going on


def test_finished_cells_are_not_run_again(run: Run, tmp_path: Path, place: Path) -> None:
    first = run()
    before = contents(tmp_path / "out")
    events: list[SweepEvent] = []
    with counted("llama") as calls:
        second = run(on_event=events.append)
    assert not calls
    assert not events
    assert second == first
    assert contents(tmp_path / "out") == before


def test_a_grid_may_grow(run: Run, tmp_path: Path) -> None:
    run(patterns=[HALF])
    events: list[SweepEvent] = []
    found = run(methods=[secateur.magnitude(), secateur.sparsegpt()], patterns=[HALF, MORE], on_event=events.append)
    assert pruned_cells(events) == ["magnitude 60%", "sparsegpt 50%", "sparsegpt 60%"]
    done = ["magnitude 50%", "wanda 50%", "magnitude 60%", "sparsegpt 50%", "sparsegpt 60%"]
    assert [cell.name for cell in found.cells] == done
    table = (tmp_path / "out" / "table.md").read_text()
    (row,) = [line for line in table.splitlines() if line.startswith("| wanda |")]
    assert re.fullmatch(r"\| wanda \| \**\d+\.\d\d\** \|  \|", row)  # 60 % was never asked for


@pytest.mark.parametrize("keep", ["none", pytest.param("all", marks=pytest.mark.slow)])
def test_data_may_be_added(keep: str, run: Run, tmp_path: Path, place: Path) -> None:
    one, two = str(place / "one.safetensors"), str(place / "two.safetensors")
    first = run(keep=keep)
    events: list[SweepEvent] = []
    found = run(keep=keep, data=two, on_event=events.append)
    assert pruned_cells(events) == ([] if keep == "all" else [cell.name for cell in first.cells])
    assert [event.cell.name for event in events if event.kind == "again" and event.cell] == pruned_cells(events)
    assert [event.stage for event in events if event.kind == "dense"] == [two]
    assert not [event for event in events if event.stage.startswith(one)]  # what was evaluated is not evaluated again
    assert found.data == [one, two]
    together = run(keep=keep, data=[one, two], output=tmp_path / "together")
    for cell, expected in zip(found.cells, together.cells, strict=True):
        assert cell.figures.keys() == {one, two}
        for text in (one, two):
            for key in ("perplexity", "window_nats", "difference"):
                assert cell.figures[text][key] == expected.figures[text][key]
    assert (tmp_path / "out" / "table.md").read_bytes() == (tmp_path / "together" / "table.md").read_bytes()
    assert (tmp_path / "out" / "table.csv").read_bytes() == (tmp_path / "together" / "table.csv").read_bytes()


def test_agreement_may_be_added(run: Run, place: Path, tmp_path: Path) -> None:
    first = run(keep="all")
    events: list[SweepEvent] = []
    found = run(keep="all", agreement=True, on_event=events.append)
    text = str(place / "one.safetensors")
    assert not pruned_cells(events)
    for cell, before in zip(found.cells, first.cells, strict=True):
        assert cell.figures[text]["perplexity"] == before.figures[text]["perplexity"]
        assert cell.figures[text]["agreement"]["kl"] > 0
    assert "Divergence from the dense model" in (tmp_path / "out" / "table.md").read_text()
    assert run(keep="all") == found  # asked for once, it stays


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "calibration": ({"calibration": "c4"}, "--calibration .*calibration.safetensors, got c4"),
    "seed": ({"seed": 3}, "--seed 0, got 3"),
    "samples": ({"samples": 3}, "--samples left out, got 3"),
    "skip": ({"skip": ["*.down_proj", "*.q_proj"]}, r"--skip left out, got \*.down_proj \*.q_proj"),
    "propagate": ({"propagate": "dense"}, "--propagate pruned, got dense"),
    "keep": ({"keep": "all"}, "--keep none, got all"),
    "windows": ({"windows": 3}, "--windows left out, got 3"),
    "dtype": ({"dtype": "bfloat16"}, "--dtype float32, got bfloat16"),
    "option": (
        {"methods": [secateur.wanda(weighting="published")]},
        "--option wanda.weighting equal, got published. .* a label of its own: --methods NAME=wanda",
    ),
    "method": ({"methods": {"wanda": secateur.ria()}}, "--methods wanda for wanda, got ria"),
}


def own(power: float, fails: bool = False, factor: float = 1.0) -> secateur.Method:
    """A method of one's own, whose name does not say with which power it was made."""

    def score(problem: secateur.Problem) -> torch.Tensor:
        if fails:
            raise ZeroDivisionError("my own fault")
        return problem.weight.abs() * problem.statistic(SquaredNorm).norm() ** power * factor

    return secateur.select("own", score, needs=frozenset({SquaredNorm}))


def nats(sweep: secateur.Sweep, cell: int = 0) -> list[list[float]]:
    return [figures["window_nats"] for figures in sweep.cells[cell].figures.values()]


def test_a_method_whose_code_changed_is_no_finished_one(run: Run, tmp_path: Path) -> None:
    first = run(methods=[own(0.5)], patterns=[HALF])
    before = contents(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"power in \S+score was 0.5, is 0.05. Run them again with --again own, "):
        run(methods=[own(0.05)], patterns=[HALF])
    with pytest.raises(CheckpointError, match=r"power in \S+score was 0.5, is 0.05"):
        run(methods=[own(0.05)], patterns=[MORE], dry_run=True)
    assert contents(tmp_path / "out") == before
    # Under a label of its own, and in the place of the old one.
    found = run(methods={"own": own(0.5), "less": own(0.05)}, patterns=[HALF])
    assert found.cells[0] == first.cells[0]
    run(methods={"own": own(0.05)}, patterns=[HALF], again=["own"], dry_run=True)
    events: list[SweepEvent] = []
    again = run(methods={"own": own(0.05)}, patterns=[HALF, MORE], again="own", on_event=events.append)
    assert pruned_cells(events) == ["own 50%", "own 60%"]
    assert [cell.name for cell in again.cells] == ["own 50%", "less 50%", "own 60%"]
    assert nats(again, 0) == nats(again, 1) != nats(first)
    manifest = json.loads((tmp_path / "out" / "cells" / "own-50" / "secateur.json").read_text())
    (value,) = [value for name, value in manifest["settings"]["fingerprint"].items() if name.startswith("power in")]
    assert value == "0.05"
    assert run(methods={"own": own(0.05)}, patterns=[HALF, MORE]) == again  # finished as it is now
    with pytest.raises(PatternError, match="--again ria: is no method of this call; it has own"):
        run(methods={"own": own(0.05)}, again=["ria"])


def test_a_method_that_failed_may_be_mended(run: Run) -> None:
    assert [cell.status for cell in run(methods=[own(0.5, fails=True)], patterns=[HALF]).cells] == ["failed"]
    found = run(methods=[own(0.5)], patterns=[HALF])
    assert [(cell.status, cell.error) for cell in found.cells] == [("done", None)]


def test_a_checkpoint_of_changed_code_is_not_evaluated(run: Run, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def stop(event: SweepEvent) -> None:
        if event.cell is not None and event.stage.endswith("head"):
            raise Killed

    with pytest.raises(Killed):
        run(methods=[own(0.5)], patterns=[HALF], on_event=stop)
    assert (tmp_path / "out" / "cells" / "own-50" / "checkpoint").exists()
    found = run(methods=[own(2.0)], patterns=[HALF])
    expected = run(methods=[own(2.0)], patterns=[HALF], output=tmp_path / "fresh")
    assert nats(found) == nats(expected) != nats(run(methods=[own(0.5)], patterns=[HALF], output=tmp_path / "old"))


def test_our_own_method_at_another_revision_is_no_finished_one(run: Run, finished: Path) -> None:
    with pytest.raises(CheckpointError, match="revision of wanda was 1, is 2"):
        run(methods=[dataclasses.replace(secateur.wanda(), revision=2)], output=finished)


def test_a_method_that_nobody_can_name_is_refused(run: Run, tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        method = secateur.select("own", lambda problem: problem.weight + file.fileno())
        with pytest.raises(PatternError, match=r"own: file in \S+ holds a _io.TextIOWrapper"):
            run(methods=[method])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("setting", SETTINGS)
def test_other_settings_are_refused(setting: str, run: Run, finished: Path) -> None:
    options, message = SETTINGS[setting]
    before = contents(finished)
    with pytest.raises(CheckpointError, match=f"was started with {message}"):
        run(output=finished, **{"methods": [secateur.wanda()], **options})
    assert contents(finished) == before


def test_another_model_is_refused(run: Run, finished: Path, place: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(place / "model", tmp_path / "other"))
    with pytest.raises(CheckpointError, match=r"started with --model \S+model, got \S+other"):
        run(model=other, output=finished)


def test_other_tokens_under_the_same_name_are_refused(run: Run, place: Path, tmp_path: Path) -> None:
    texts = {name: str(shutil.copy(place / f"{name}.safetensors", tmp_path)) for name in ("calibration", "one")}
    run(calibration=texts["calibration"], data=texts["one"])
    for name, what in (("calibration", "calibration"), ("one", f"data set {texts['one']}")):
        kept = Path(texts[name]).read_bytes()
        save_file({"input_ids": tiny.tokens(6, 16, 9)}, texts[name])
        with pytest.raises(CheckpointError, match=re.escape(f"the tokens of the {what} have changed")):
            run(methods=[secateur.ria()], calibration=texts["calibration"], data=texts["one"])
        Path(texts[name]).write_bytes(kept)


def test_a_model_that_changed_is_refused(run: Run, place: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(place / "model", tmp_path / "model"))
    run(model=model, patterns=[HALF])
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][0, 0] += 1
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} has changed since this sweep was started"):
        run(model=model)
    assert not list((tmp_path / "out").rglob("checkpoint"))


# Killed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
@pytest.mark.parametrize("kills", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_killed_again_and_again_the_table_is_the_same(place: Path, run: Run, tmp_path: Path, kills: int) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    moments = [
        "stage gradients: backward 2",
        "stage blocks 1 gblm 50%",  # statistics on disk, a checkpoint half written
        f"stage {place / 'two.safetensors'}: head 1 sparsegpt 50%",  # between two data sets
        "cell  0 sparsegpt 50%",
    ][:kills]
    options: dict[str, Any] = {
        "methods": [secateur.magnitude(), secateur.gblm(), secateur.sparsegpt()],
        "data": [str(place / "one.safetensors"), str(place / "two.safetensors")],
        "keep": "best",
        "propagate": "dense",
    }

    def kill_at(moment: str) -> Callable[[SweepEvent], None]:
        def look(event: SweepEvent) -> None:
            if moment in f"{event.kind} {event.stage} {event.done} {event.cell.name if event.cell else ''}":
                os.kill(os.getpid(), signal.SIGKILL)

        return look

    lines = []
    for moment in moments:
        look = kill_at(moment)
        assert ended(forked(lambda look=look: run(**options, on_event=look))) == -signal.SIGKILL
        lines.append([str(path) for path in out.rglob("*")])
    # The kills did hit where something was half done.
    left = [{Path(path).name for path in line} for line in lines]
    assert "gradients-sample-model.safetensors.partial" in left[0]
    assert {"checkpoint.partial", "statistics-2.partial"} <= left[1]
    if kills > 2:
        assert any(path.endswith("cells/sparsegpt-50/checkpoint") for path in lines[2])
    run(**options)
    run(**options, output=whole)
    for name in ("table.md", "table.csv"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    names, expected = ({str(path.relative_to(top)) for path in top.rglob("*")} for top in (out, whole))
    assert names == expected
    for checkpoint in out.rglob("checkpoint"):
        assert secateur.verify(checkpoint).ok


def test_one_process_at_a_time(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / "sweep.lock"), pytest.raises(CheckpointError, match="another process is running"):
        run()
