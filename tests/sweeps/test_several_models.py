"""A sweep of several models: each as by itself, and tables with a column for each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import secateur
import tiny
from command_line import Call
from secateur.errors import CheckpointError


@pytest.fixture
def models(place: Path, tmp_path: Path) -> list[Path]:
    tiny.save("qwen2", tmp_path / "second")
    return [place / "model", tmp_path / "second"]


@pytest.fixture
def options(place: Path) -> dict[str, Any]:
    return {
        "methods": "magnitude,wanda",
        "patterns": "2:4",
        "sparsity": 0.5,
        "calibration": str(place / "calibration.safetensors"),
        "data": str(place / "one.safetensors"),
        "batch_size": 2,
    }


def test_each_model_is_swept_as_by_itself(models: list[Path], options: dict[str, Any], tmp_path: Path) -> None:
    seen = []
    found = secateur.sweep_models(models, output=tmp_path / "out", on_event=seen.append, latex=True, **options)
    assert list(found.sweeps) == ["model", "second"]
    assert {event.model for event in seen} == {"model", "second"}
    alone = [secateur.sweep(model, output=tmp_path / f"alone-{model.name}", **options) for model in models]
    for own, other in zip(found.sweeps.values(), alone, strict=True):
        (data,) = own.data
        for key in ("perplexity", "window_nats"):
            assert own.dense[data][key] == other.dense[data][key]
            assert [cell.figures[data][key] for cell in own.cells] == [cell.figures[data][key] for cell in other.cells]
    lines = (tmp_path / "out/table.md").read_text().splitlines()
    assert lines[2] == "| method, pattern | model | second |"
    rows = {line.split("|")[1].strip(): line.replace("*", "").split("|")[2:4] for line in lines[4:]}
    assert list(rows) == ["dense", "magnitude, 50%", "wanda, 50%", "magnitude, 2:4", "wanda, 2:4"]
    for column, sweep in enumerate(alone):
        (data,) = sweep.data
        assert float(rows["dense"][column]) == round(sweep.dense[data]["perplexity"], 2)
        for cell in sweep.cells:
            assert float(rows[f"{cell.method}, {cell.pattern}"][column]) == round(cell.figures[data]["perplexity"], 2)
    assert r"\begin{tabular}{lrr}" in (tmp_path / "out/table.tex").read_text()
    shown = repr(found).splitlines()
    assert [line.split(":")[0] for line in shown[:2]] == ["model", "second"]
    assert shown[-2].startswith(f"  model: dense {rows['dense'][0].strip()}, ")
    assert found._repr_html_().count("<table") == 1


def test_the_command(call: Call, models: list[Path], options: dict[str, Any], tmp_path: Path) -> None:
    arguments = ["-o", tmp_path / "out", "--methods", "magnitude", "--data", options["data"], "--sparsity", "0.5"]
    plan = call("sweep", *models, *arguments, "--dry-run", "--json")
    assert list(json.loads(plan.out)["models"]) == ["model", "second"]
    assert not (tmp_path / "out").exists()
    result = call("sweep", *models, *arguments)
    assert result.code == 0, result.err
    assert "method, pattern" in result.out
    assert (tmp_path / "out/second/report/index.html").exists()
    assert "has a sweep for each of several models" in call("report", tmp_path / "out").message


def test_what_is_refused(models: list[Path], options: dict[str, Any], tmp_path: Path) -> None:
    other = tmp_path / "other" / "model"
    tiny.save("llama", other)
    with pytest.raises(CheckpointError, match="told apart by the last part of their path"):
        secateur.sweep_models([*models, other], output=tmp_path / "out", **options)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(CheckpointError, match=r"is not empty and holds no sweeps\.json"):
        secateur.sweep_models(models, output=tmp_path / "full", **options)
    with pytest.raises(CheckpointError, match="not-there"):
        secateur.sweep_models([*models, tmp_path / "not-there"], output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
