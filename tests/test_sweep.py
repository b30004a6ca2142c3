"""`sweep`: against separate prunings and evaluations, through kills and restarts, and what it keeps on disk."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import secateur
import tiny
from secateur.core.statistics import SquaredNorm
from secateur.errors import CalibrationError, CheckpointError, ModelStructureError, PatternError
from secateur.sweeps.folder import Cell, cell_name
from secateur.sweeps.loop import SweepEvent
from test_shared_statistics import counted
from test_trained import STORIES, STORIES_TEXT

HALF, MORE, TWO_OF_FOUR = secateur.Unstructured(0.5), secateur.Unstructured(0.6), secateur.NM(2, 4)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and token ids to calibrate and to evaluate on."""
    folder = tmp_path_factory.mktemp("sweep")
    tiny.save("llama", folder / "model")
    for name, samples, seed in (("calibration", 6, 1), ("one", 5, 2), ("two", 4, 3)):
        save_file({"input_ids": tiny.tokens(samples, 16, seed)}, folder / f"{name}.safetensors")
    return folder


Run = Callable[..., secateur.Sweep]


@pytest.fixture
def run(place: Path, tmp_path: Path) -> Run:
    """`run(...)`: a sweep of the tiny model into `tmp_path / "out"`."""

    def start(**options: Any) -> secateur.Sweep:
        defaults: dict[str, Any] = {
            "methods": [secateur.magnitude(), secateur.wanda()],
            "patterns": [HALF, TWO_OF_FOUR],
            "calibration": str(place / "calibration.safetensors"),
            "data": str(place / "one.safetensors"),
            "output": tmp_path / "out",
            "batch_size": 2,
        }
        return secateur.sweep(options.pop("model", place / "model"), **defaults | options)

    return start


def pruned_cells(events: list[SweepEvent]) -> list[str]:
    """The cells of which blocks were pruned, in order."""
    names = [event.cell.name for event in events if event.cell is not None and event.stage == "blocks"]
    return list(dict.fromkeys(names))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def of_manifest(file: Path) -> dict[str, Any]:
    """A manifest without times and without the paths that a command or a place gave it."""
    value = json.loads(file.read_text())
    for entry in value["matrices"].values():
        del entry["seconds"]
    return {key: item for key, item in value.items() if key not in ("created", "seconds", "digest", "command")}


# Against separate runs


METHODS = {
    "magnitude": secateur.magnitude(),
    "wanda": secateur.wanda(),
    "gblm": secateur.gblm(),
    "l2": secateur.gblm(norm="l2"),
    "wanda_plus": secateur.wanda_plus(),
    "sparsegpt": secateur.sparsegpt(),
    "wanda+least_squares": secateur.chain(secateur.wanda(), secateur.least_squares()),
    "published": secateur.wanda(weighting="published"),
}


@pytest.mark.parametrize("propagate", ["pruned", "dense"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_equal_to_separate_runs(name: str, propagate: str, place: Path, run: Run, tmp_path: Path) -> None:
    model = tiny.save(name, tmp_path / "model")
    before = contents(model)
    data = [str(place / "one.safetensors")]
    patterns = [HALF] if name == "mixtral" else [TWO_OF_FOUR]
    found = run(
        model=model,
        methods=METHODS,
        patterns=patterns,
        data=data,
        propagate=propagate,
        keep="all",
        batch_size=None,
    )
    assert contents(model) == before
    assert [cell.status for cell in found.cells] == ["done"] * len(METHODS)
    assert found.to_json() == json.loads((tmp_path / "out" / "sweep.json").read_text())
    dense = {text: secateur.perplexity(model, text) for text in data}
    for text in data:
        assert found.dense[text]["window_nats"] == dense[text].window_nats
        assert found.dense[text]["perplexity"] == dense[text].perplexity
    for cell in found.cells:
        pattern = {"50%": HALF, "2:4": TWO_OF_FOUR}[cell.pattern]
        alone = tmp_path / "alone" / cell.folder
        secateur.prune(
            model,
            method=METHODS[cell.method],
            pattern=pattern,
            calibration=str(place / "calibration.safetensors"),
            propagate=propagate,
            output=alone,
        )
        folder = tmp_path / "out" / cell.folder
        assert of_manifest(folder / "secateur.json") == of_manifest(alone / "secateur.json")
        assert secateur.verify(folder / "checkpoint").ok
        for text in data:
            expected = secateur.perplexity(alone, text)
            figures = dict(cell.figures[text])
            assert {
                key: value for key, value in expected.to_json().items() if key != "seconds"
            }.items() <= figures.items()
            differences = torch.tensor(expected.window_nats).double() - torch.tensor(dense[text].window_nats).double()
            assert figures["difference"] == pytest.approx(float(differences.mean()), abs=1e-6)
            error = float(differences.std() / math.sqrt(len(differences)))
            assert figures["difference_error"] == pytest.approx(error, rel=1e-3)


@pytest.mark.skipif(not STORIES.exists(), reason=f"no trained model in {STORIES}")
def test_a_trained_model(run: Run, tmp_path: Path) -> None:
    text = str(tmp_path / "stories.txt")
    Path(text).write_text(STORIES_TEXT.read_text()[:100_000])
    options: dict[str, Any] = {"samples": 8, "length": 64, "sampling": "concat", "calibration": text}
    found = run(
        model=STORIES,
        methods=[secateur.magnitude(), secateur.wanda(), secateur.sparsegpt()],
        data=text,
        eval_length=64,
        windows=12,
        agreement=True,
        **options,
    )
    for cell in found.cells:
        method = {"magnitude": secateur.magnitude(), "wanda": secateur.wanda(), "sparsegpt": secateur.sparsegpt()}
        pattern = {"50%": HALF, "2:4": TWO_OF_FOUR}[cell.pattern]
        alone = tmp_path / "alone" / cell.folder
        secateur.prune(STORIES, method=method[cell.method], pattern=pattern, batch_size=2, output=alone, **options)
        # As the dense model has it, whom magnitude pruning asks nothing.
        expected = secateur.perplexity(alone, text, length=64, windows=12, bos="papers", batch_size=2)
        figures = cell.figures[text]
        assert figures["perplexity"] == expected.perplexity
        assert figures["window_nats"] == expected.window_nats
        (agreement,) = secateur.agreement(STORIES, [alone], text, length=64, windows=12, batch_size=2)
        assert figures["agreement"]["kl"] == agreement.kl
        assert figures["agreement"]["window_top1"] == agreement.window_top1
        assert figures["difference"] == pytest.approx(agreement.difference, abs=1e-6)
    by_name = {cell.name: cell.figures[text]["perplexity"] for cell in found.cells}
    assert by_name["sparsegpt 2:4"] < by_name["wanda 2:4"] < by_name["magnitude 2:4"]


# What cells share


def test_with_dense_inputs_the_samples_run_through_the_blocks_once(place: Path, run: Run, tmp_path: Path) -> None:
    methods = {name: METHODS[name] for name in ("wanda", "sparsegpt", "wanda+least_squares")}
    events: list[SweepEvent] = []
    forwards: dict[str, int] = {}
    with counted("llama") as calls:

        def count(event: SweepEvent) -> None:
            events.append(event)
            if event.kind == "cell":
                assert event.cell is not None
                forwards[event.cell.name] = len(calls) - sum(forwards.values()) - dense[0]
            elif event.kind == "dense":
                dense.append(len(calls))
                del dense[0]

        dense = [0]
        run(
            methods=methods,
            patterns=[HALF, MORE],
            propagate="dense",
            on_event=count,
            on_estimate=lambda estimate: calls.clear(),  # which tries a block of zeros
        )
    evaluation = (
        2 + 3 * tiny.BLOCKS
    )  # 5 windows in batches of 2, and one block to see what it returns and whether it is causal
    assert dense == [evaluation]
    # 6 samples in batches of 2, and the first batch once more behind the pruned block; then two of one batch.
    assert list(forwards.values()) == [2 + 4 * tiny.BLOCKS + evaluation] + [2 + 2 * tiny.BLOCKS + evaluation] * 5
    assert not list((tmp_path / "out").glob("statistics*"))


def test_gradients_are_taken_once_and_kept(place: Path, run: Run, tmp_path: Path) -> None:
    events: list[SweepEvent] = []

    def backwards() -> int:
        """How many gradient passes began since the last call."""
        found = sum(event.stage == "gradients: backward" and event.done == 1 for event in events)
        events.clear()
        return found

    names = ("gblm", "l2", "published")
    run(methods={name: METHODS[name] for name in names}, on_event=events.append)
    assert backwards() == 1
    file = tmp_path / "out" / "gradients-sample-model.safetensors"
    assert secateur.GradientFile(file).provenance["norms"] == ["l1", "l2"]
    run(methods={"alone": secateur.gradient(norm="l2")}, on_event=events.append)  # reuses the file
    assert backwards() == 0
    run(methods={"token": secateur.select("token", lambda problem: problem.gradient_norm().norm(),
        needs=frozenset({secateur.GradientKind("l1", "token")}))}, on_event=events.append)  # fmt: skip
    assert backwards() == 1
    assert (tmp_path / "out" / "gradients-token-model.safetensors").exists()


def test_a_missing_norm_is_taken_with_those_that_are_there(run: Run, tmp_path: Path) -> None:
    run(methods={"gblm": METHODS["gblm"]})
    file = tmp_path / "out" / "gradients-sample-model.safetensors"
    assert secateur.GradientFile(file).provenance["norms"] == ["l1"]
    run(methods={"l2": METHODS["l2"]})
    assert secateur.GradientFile(file).provenance["norms"] == ["l1", "l2"]


def test_token_ids_in_memory(run: Run, place: Path, tmp_path: Path) -> None:
    ids = load_file(place / "calibration.safetensors")["input_ids"]
    text = str(place / "one.safetensors")
    found = run(methods=[secateur.wanda()], patterns=[HALF], calibration=ids, samples=4)
    secateur.prune(
        place / "model", method=secateur.wanda(), calibration=ids[:4], batch_size=2, output=tmp_path / "alone"
    )
    expected = secateur.perplexity(tmp_path / "alone", text, batch_size=2)
    assert found.cells[0].figures[text]["window_nats"] == expected.window_nats
    with pytest.raises(CheckpointError, match="--samples 4, got 6"):
        run(methods=[secateur.wanda()], patterns=[HALF], calibration=ids)


def test_methods_without_data_draw_no_tokens(run: Run) -> None:
    found = run(methods=[secateur.magnitude()], calibration="nowhere.txt")
    assert [cell.status for cell in found.cells] == ["done", "done"]


def test_memory_does_not_grow_from_cell_to_cell(tmp_path: Path, place: Path) -> None:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        LlamaForCausalLM(config).save_pretrained(tmp_path / "model")  # 16 MB
    sizes: list[int] = []

    def measure(event: SweepEvent) -> None:
        if event.kind == "cell":
            sizes.append(psutil.Process().memory_info().rss)

    secateur.sweep(
        tmp_path / "model",
        methods=[secateur.magnitude(), secateur.gblm(), secateur.wanda()],
        patterns=[HALF, MORE],
        calibration=str(place / "calibration.safetensors"),
        data=str(place / "one.safetensors"),
        propagate="dense",
        output=tmp_path / "out",
        on_event=measure,
    )
    assert len(sizes) == 6
    assert max(sizes[3:]) - max(sizes[1:3]) < 12e6  # one model that stays for each cell would make three times 16 MB


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


@pytest.mark.parametrize("keep", ["none", "all"])
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


@pytest.fixture(scope="module")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small sweep that is finished; nobody changes it."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    secateur.sweep(
        place / "model",
        methods=[secateur.wanda()],
        calibration=str(place / "calibration.safetensors"),
        data=str(place / "one.safetensors"),
        batch_size=2,
        output=folder,
    )
    return folder


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


SCRIPT = """
import os, signal, sys, secateur
place, out, moments = sys.argv[1], sys.argv[2], sys.argv[3:]

def sweep(moment):
    def look(event):
        where = f"{event.kind} {event.stage} {event.done} {event.cell.name if event.cell else ''}"
        if moment in where:
            os.kill(os.getpid(), signal.SIGKILL)
    secateur.sweep(
        f"{place}/model",
        methods=[secateur.magnitude(), secateur.gblm(), secateur.sparsegpt()],
        patterns=[secateur.Unstructured(0.5), secateur.NM(2, 4)],
        calibration=f"{place}/calibration.safetensors",
        data=[f"{place}/one.safetensors", f"{place}/two.safetensors"],
        keep="best", batch_size=2, propagate="dense", output=out, on_event=look,
    )

for moment in moments:
    child = os.fork()  # torch is imported once for all of them
    if not child:
        sweep(moment)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    left = [os.path.join(folder, name) for folder, *names in os.walk(out) for part in names for name in part]
    print(os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, *left, sep="\\t")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
def test_killed_again_and_again_the_table_is_the_same(place: Path, run: Run, tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    moments = [
        "stage gradients: backward 2",
        "stage blocks 1 gblm 50%",  # statistics on disk, a checkpoint half written
        f"stage {place / 'two.safetensors'}: head 1 sparsegpt 50%",  # between two data sets
        "cell  0 sparsegpt 50%",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", SCRIPT, str(place), str(out), *moments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["True"] * len(moments)
    # The kills did hit where something was half done.
    left = [{Path(path).name for path in line[1:]} for line in lines]
    assert "gradients-sample-model.safetensors.partial" in left[0]
    assert {"checkpoint.partial", "statistics-2.partial"} <= left[1]
    assert any(path.endswith("cells/sparsegpt-50/checkpoint") for path in lines[2])
    options: dict[str, Any] = {
        "methods": [secateur.magnitude(), secateur.gblm(), secateur.sparsegpt()],
        "data": [str(place / "one.safetensors"), str(place / "two.safetensors")],
        "keep": "best",
        "propagate": "dense",
    }
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


# What stays on disk


def test_checkpoints_that_stay(run: Run, tmp_path: Path, place: Path) -> None:
    methods = [secateur.magnitude(), secateur.sparsegpt(), secateur.wanda()]
    text = str(place / "one.safetensors")
    for keep in ("none", "best", "all"):
        out = tmp_path / keep
        most = 0

        def look(event: SweepEvent, out: Path = out) -> None:
            nonlocal most
            most = max(most, len(list(out.glob("cells/*/checkpoint*"))))

        found = run(methods=methods, keep=keep, output=out, on_event=look)
        kept = {str(path.parent.relative_to(out)) for path in out.glob("cells/*/checkpoint")}
        best = [
            min((cell for cell in found.cells if cell.pattern == pattern), key=lambda c: c.figures[text]["perplexity"])
            for pattern in ("50%", "2:4")
        ]
        expected = {"none": [], "best": best, "all": found.cells}[keep]
        assert kept == {cell.folder for cell in expected}
        assert most == {"none": 1, "best": 3, "all": 6}[keep]
        for cell in found.cells:
            assert sorted(path.name for path in (out / cell.folder).iterdir()) == sorted(
                ["cell.json", "secateur.json"] + ["checkpoint"] * (cell.folder in kept)
            )
            assert Cell(**json.loads((out / cell.folder / "cell.json").read_text())) == cell
            if cell.folder in kept:
                assert (
                    secateur.perplexity(out / cell.folder / "checkpoint", text, batch_size=2).perplexity
                    == (cell.figures[text]["perplexity"])
                )


def test_folders_of_something_else(run: Run, place: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    for output, message in (
        (tmp_path / "mine", "is not empty and holds no sweep.json"),
        (tmp_path / "file", "is a file"),
        (place / "model", "the output is the source"),
        (place / "model" / "below", "the output is the source, or lies inside it"),
        (place, "the output holds the source"),
    ):
        before = contents(place)
        with pytest.raises(CheckpointError, match=message):
            run(output=output)
        assert contents(place) == before
    assert contents(tmp_path / "mine") == {"thesis.tex": b""}


def test_a_damaged_record(run: Run, finished: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    (out / "sweep.json").write_text('{"model": ')
    with pytest.raises(CheckpointError, match=r"sweep.json: not JSON .* Remove \S+out to start again"):
        run()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folder": "../victim"}, 'the folder of wanda 50% is "../victim", expected cells/NAME'),
        ({"folder": "/victim"}, 'is "/victim", expected'),
        ({"folder": "cells/../../victim"}, "expected cells/NAME"),
        ({"folder": "cells/.."}, "expected cells/NAME"),
        ({"folder": "cells/."}, "expected cells/NAME"),
        ({"folder": "cells"}, "expected cells/NAME"),
        ({"folder": "cells/a/b"}, "expected cells/NAME"),
        ({"folder": 3}, "Expected `str`, got `int` - at `$.cells[0].folder`"),
        ({"status": "finished"}, "Invalid enum value 'finished'"),
        ({"figures": {"one": {"perplexity": "low"}}}, "wanda 50%: damaged, or not what its name says: Expected `float"),
        ({"seconds": None}, "Expected `float`, got `null`"),
    ],
)
@pytest.mark.parametrize("file", ["sweep.json", "cell.json"])
def test_an_altered_record_is_refused_and_nothing_removed(
    run: Run, finished: Path, tmp_path: Path, change: dict[str, Any], message: str, file: str
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    for folder in ("victim", "out/cells/a/b"):
        (tmp_path / folder / "checkpoint").mkdir(parents=True)
        (tmp_path / folder / "checkpoint" / "weights").touch()
    path = out / ("sweep.json" if file == "sweep.json" else "cells/wanda-50/cell.json")
    value = json.loads(path.read_text())
    (value["cells"][0] if file == "sweep.json" else value).update(change)
    path.write_text(json.dumps(value))
    before = contents(tmp_path)
    message = message if file == "sweep.json" else message.replace("$.cells[0]", "$")
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        run(methods=[secateur.wanda()], patterns=[HALF, MORE])
    assert str(path) in str(error.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("link", ["cells", "cells/wanda-50"])
def test_nothing_is_removed_through_a_link(link: str, run: Run, finished: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    victim = Path(shutil.move(out / link, tmp_path / "victim"))
    (victim / "wanda-50").mkdir(exist_ok=True)
    for folder in (victim, victim / "wanda-50"):
        (folder / "notes.partial-12").touch()
        (folder / "checkpoint").mkdir()
        (folder / "checkpoint" / "weights").touch()
    (out / link).symlink_to(victim)
    before = contents(victim)
    with pytest.raises(CheckpointError, match=f"{link}: is a link, and a sweep keeps its cells in its own folder"):
        run(methods=[secateur.wanda()], patterns=[HALF])
    assert contents(victim) == before


def test_of_links_among_the_leftovers_only_the_link_goes(run: Run, finished: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").touch()
    for name in ("checkpoint.partial-7", "checkpoint"):
        (out / "cells" / "wanda-50" / name).symlink_to(victim)
    run(methods=[secateur.wanda()], patterns=[HALF])
    assert (victim / "file").exists()
    assert not [entry for entry in out.rglob("*") if entry.is_symlink()]


# Failures


def test_a_cell_that_fails_does_not_stop_the_others(run: Run, tmp_path: Path, place: Path) -> None:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=50,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    faults = ["once"]

    def score(problem: secateur.Problem) -> torch.Tensor:
        if faults:
            raise ZeroDivisionError(f"my own fault, {faults.pop()}")
        return problem.weight.abs()

    methods = [secateur.select("mine", score, needs=frozenset({SquaredNorm})), secateur.magnitude()]
    estimates: list[Any] = []
    found = run(model=tmp_path / "model", methods=methods, on_estimate=estimates.append)
    status = {cell.name: (cell.status, cell.error) for cell in found.cells}
    assert status["mine 50%"][0] == "failed"
    told = r"model\S+: mine failed with ZeroDivisionError: my own fault, once \(\S+.py:\d+, in score\)\. --debug .*"
    assert re.fullmatch(told, str(status["mine 50%"][1]))
    assert status["magnitude 50%"] == ("done", None)
    for name in ("mine 2:4", "magnitude 2:4"):
        assert status[name][0] == "failed"
        assert "2:4 needs in_features divisible by 4, got 50" in str(status[name][1])
    assert [cell.refusal is None for cell in estimates[0].cells] == [True, False, True, False]  # known before the start
    assert "raise ZeroDivisionError" in (tmp_path / "out" / "cells" / "mine-50" / "traceback.txt").read_text()
    table = (tmp_path / "out" / "table.md").read_text()
    assert re.search(r"^\| magnitude \| \d+\.\d\d \| failed \|$", table, re.M)
    assert "mine failed with ZeroDivisionError" in table
    # The next time it is tried again.
    again = run(model=tmp_path / "model", methods=methods)
    assert [cell.status for cell in again.cells] == ["done", "failed", "done", "failed"]
    assert not (tmp_path / "out" / "cells" / "mine-50" / "traceback.txt").exists()


def test_what_is_wrong_with_every_cell_is_said_before_anything_is_made(run: Run, tmp_path: Path, place: Path) -> None:
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"skip": ["*.nothing"]}, PatternError, "matches none of"),
        ({"propagate": "sparse"}, PatternError, '--propagate: got "sparse"'),
        ({"within": "site", "methods": [secateur.magnitude()]}, PatternError, "takes no statistics of inputs"),
        ({"keep": "some"}, CheckpointError, '--keep: got "some", expected none, best or all'),
        ({"methods": []}, PatternError, "the grid is empty"),
        ({"data": []}, CalibrationError, "--data: got none"),
        ({"methods": [secateur.gblm(), secateur.gblm(norm="l2")]}, PatternError, "gblm 50% is in the grid twice"),
        ({"data": str(tmp_path / "nope.safetensors")}, CalibrationError, "nope.safetensors: no such file"),
        ({"calibration": str(tmp_path / "nope.safetensors")}, CalibrationError, "nope.safetensors: no such file"),
        ({"model": tiny.build("llama")}, ModelStructureError, "Save it with save_pretrained"),
    ]
    for options, error, message in wrong:
        with pytest.raises(error, match=message):
            run(output=tmp_path / "deep" / "out", **options)
        assert list(tmp_path.iterdir()) == []


def test_a_dry_run_writes_nothing(run: Run, tmp_path: Path, place: Path) -> None:
    estimates: list[Any] = []
    found = run(dry_run=True, on_estimate=estimates.append, methods=list(METHODS.values())[4:6])
    assert [cell.status for cell in found.cells] == ["pending"] * 4
    assert list(tmp_path.iterdir()) == []
    (estimate,) = estimates
    assert [own.cell.name for own in estimate.cells] == [cell.name for cell in found.cells]
    weights = (place / "model" / "model.safetensors").stat().st_size
    assert 0.8 * weights < estimate.disk_bytes < 1.2 * weights  # one checkpoint at a time
    assert estimate.seconds > 0
    json.dumps(estimate.to_json(), allow_nan=False)


# Tables and names


def test_the_tables(run: Run, tmp_path: Path, place: Path) -> None:
    found = run(methods=[secateur.magnitude(), secateur.sparsegpt()], patterns=[TWO_OF_FOUR, MORE, HALF])
    text = str(place / "one.safetensors")
    values = {cell.name: cell.figures[text]["perplexity"] for cell in found.cells}
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    dense = f"{found.dense[text]['perplexity']:.2f}"
    assert lines[:5] == [
        f"Perplexity, {text}, 5 windows of 16 tokens",
        "",
        "| method | 50% | 60% | 2:4 |",
        "|---|---:|---:|---:|",
        f"| dense | {dense} | {dense} | {dense} |",
    ]
    for line, method, other in ((lines[5], "magnitude", "sparsegpt"), (lines[6], "sparsegpt", "magnitude")):
        for cell, pattern in zip(line.split(" | ")[1:], ("50%", "60%", "2:4"), strict=True):
            own = values[f"{method} {pattern}"]
            best = own < values[f"{other} {pattern}"]
            assert cell.removesuffix(" |") == (f"**{own:.2f}**" if best else f"{own:.2f}")
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").open()))
    assert [(row["method"], row["pattern"]) for row in rows] == [
        ("dense", ""),
        *((method, pattern) for method in ("magnitude", "sparsegpt") for pattern in ("2:4", "60%", "50%")),
    ]
    for row in rows[1:]:
        assert float(row["perplexity"]) == values[f"{row['method']} {row['pattern']}"]
        assert row["sparsity"] == {"2:4": "0.5", "60%": "0.6", "50%": "0.5"}[row["pattern"]]


def test_names() -> None:
    chain = secateur.chain(secateur.sparsegpt(), secateur.least_squares()).name
    assert cell_name("wanda", HALF) == "wanda-50"
    assert cell_name(chain, TWO_OF_FOUR) == "sparsegpt+least_squares-2of4"
    assert cell_name("wanda", secateur.Unstructured(0.29)) == "wanda-29"
    assert cell_name("wanda", secateur.Unstructured(0.555, per="matrix")) == "wanda-55.5matrix"
    assert Cell.of("wanda", secateur.Unstructured(0.555, per="matrix")).pattern == "55.5% per matrix"
    assert re.fullmatch(r"my_methods_wanda~[0-9a-f]{12}-50", cell_name("my_methods:Wanda", HALF))


patterns = st.one_of(
    st.floats(0, 1, exclude_max=True).map(secateur.Unstructured),
    st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(["row", "matrix", "search"])).map(
        lambda pair: secateur.Unstructured(*pair)
    ),
    st.tuples(st.integers(1, 20), st.integers(1, 20)).map(lambda pair: secateur.NM(min(pair), max(pair))),
)
labels = st.one_of(
    st.text(max_size=12), st.text("aAbB-+._:/\\1 5", max_size=6), st.sampled_from(["con", "NUL", "..", ""])
)


@given(st.tuples(labels, patterns), st.tuples(labels, patterns))
def test_names_are_legal_everywhere_and_never_the_same(
    one: tuple[str, secateur.Pattern], two: tuple[str, secateur.Pattern]
) -> None:
    first, second = (cell_name(*pair) for pair in (one, two))
    for name in (first, second):
        assert re.fullmatch(r"[a-z0-9_+~-][a-z0-9_+~.-]*[a-z0-9]", name)
        assert len(name) < 120
        assert not re.fullmatch(r"con|prn|aux|nul|com\d|lpt\d", name.partition(".")[0])
    assert (first == second) == (one == two)
