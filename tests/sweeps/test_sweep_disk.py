"""What a sweep keeps on disk, what it removes, and what happens when cells fail."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import secateur
import tiny
from secateur.core.statistics import SquaredNorm
from secateur.errors import CalibrationError, CheckpointError, ModelStructureError, PatternError
from secateur.sweeps.cells import SweepEvent
from secateur.sweeps.folder import Cell
from sweep_runs import HALF, METHODS, MORE, Run, contents

# What stays on disk


def test_checkpoints_that_stay(run: Run, tmp_path: Path, place: Path) -> None:
    methods = [secateur.magnitude(), secateur.wanda()]
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
        assert most == {"none": 1, "best": 3, "all": 4}[keep]
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
    told = r"model\S+: mine failed with ZeroDivisionError: my own fault, once \(\S+.py:\d+, in score\)\."
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
