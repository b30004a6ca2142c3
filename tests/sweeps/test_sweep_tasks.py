"""Tasks in a sweep: what `tasks` finds for each checkpoint, in the tables, beside the dense model, and kept."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import secateur
import tiny
from command_line import save_model
from secateur.errors import CalibrationError, CheckpointError
from secateur.evaluate.task_results import task_differences
from secateur.evaluate.tasks import tasks
from secateur.report.sweep_page import build_sweep
from task_files import arc, boolq, lines

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
pytestmark = pytest.mark.usefixtures("some_tasks")


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model with a tokenizer, its token ids, and the data of two tasks."""
    folder, draw = tmp_path_factory.mktemp("tasks"), random.Random(0)
    lines(folder / "boolq_validation.jsonl", boolq(draw, 14))
    lines(folder / "arc_easy_test.jsonl", arc(draw, 12))
    for name, samples, seed in (("calibration", 6, 1), ("one", 5, 2)):
        save_file({"input_ids": tiny.tokens(samples, 16, seed)}, folder / f"{name}.safetensors")
    return {
        "model": save_model(folder / "model"),
        "methods": ["magnitude", "wanda"],
        "calibration": str(folder / "calibration.safetensors"),
        "data": str(folder / "one.safetensors"),
        "task_data": str(folder),
        "keep": "all",
        "batch_size": 2,
    }


def test_tasks_are_those_of_each_checkpoint(options: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "out"
    found = secateur.sweep(**options, tasks="arc_easy,boolq", limit=9, output=output)
    how: dict[str, Any] = {"names": ["arc_easy", "boolq"], "limit": 9, "task_data": options["task_data"]}
    dense = tasks(options["model"], **how, batch_size=2)
    rows = list(csv.DictReader((output / "tasks.csv").open()))
    assert {(row["method"], row["task"], row["metric"]) for row in rows} == {
        (method, *kind)
        for method in ("dense", "magnitude", "wanda")
        for kind in (("arc_easy", "acc"), ("arc_easy", "acc_norm"), ("boolq", "acc"))
    }
    for cell in found.cells:
        own = tasks(output / cell.folder / "checkpoint", **how, batch_size=2)
        for row in task_differences(dense, own):
            held = cell.tasks[row.task][row.task]
            assert held["metrics"] == {name: vars(metric) for name, metric in row.pruned.metrics.items()}
            assert held["differences"] == row.to_json()["differences"]
            for name, metric in row.pruned.metrics.items():
                (line,) = (
                    one for one in rows if (one["method"], one["task"], one["metric"]) == (cell.method, row.task, name)
                )
                assert float(line["value"]) == metric.value
                assert float(line["difference"]) == row.differences[name].value
    text = (output / "table.md").read_text()
    assert "Tasks, the first 9 documents of each" in text
    level = [dense[task].metrics["acc"].value for task in how["names"]]
    assert f"| dense | {level[0]:.4f} | {level[1]:.4f} |" in text
    accuracies = {cell.method: cell.tasks["boolq"]["boolq"]["metrics"]["acc"]["value"] for cell in found.cells}
    best = max(accuracies.values())
    for method, value in accuracies.items():
        mark = "**" if value == best else ""
        assert f"| {mark}{value:.4f}{mark} |" in next(line for line in text.splitlines() if f"{method}, 50%" in line)


def test_a_task_is_added_and_what_was_answered_stays(options: dict[str, Any], tmp_path: Path) -> None:
    output, options = tmp_path / "out", options | {"methods": ["magnitude"]}
    first = secateur.sweep(**options, output=output)
    assert not (output / "tasks.csv").exists()
    assert all(cell.tasks == {} for cell in first.cells)
    second = secateur.sweep(**options, tasks=["boolq"], limit=5, output=output)
    estimates: list[Any] = []
    third = secateur.sweep(**options, tasks=["arc_easy"], limit=5, output=output, on_estimate=estimates.append)
    (note,) = (note for note in estimates[0].notes if "tasks" in note)
    assert note.startswith("The time is without tasks (arc_easy), which 2 models answer: ")
    assert [list(cell.tasks) for cell in third.cells] == [["boolq", "arc_easy"]]
    assert list(third.dense_tasks) == ["boolq", "arc_easy"]
    for before, after in zip(second.cells, third.cells, strict=True):
        assert before.tasks["boolq"] == after.tasks["boolq"]
        assert before.figures == after.figures
    assert json.loads((output / "sweep.json").read_text())["dense_tasks"]["boolq"]["boolq"]["documents"] == 5
    with pytest.raises(CheckpointError, match="started with --limit 5, got 6"):
        secateur.sweep(**options, tasks=["boolq"], limit=6, output=output)


def test_means_over_draws_of_the_samples(options: dict[str, Any], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat under the red tree and the dog ran on " * 60)
    own = options | {"calibration": str(text), "samples": 3, "length": 16, "methods": ["wanda"], "limit": 8}
    found = secateur.sweep(**own, seeds="0,1", tasks=["boolq"], latex=True, output=tmp_path / "out")
    values = [cell.tasks["boolq"]["boolq"]["metrics"]["acc"] for cell in found.cells]
    assert len(values) == 2
    (mean,) = found.task_means
    assert mean.draws == 2
    assert mean.value.mean == sum(value["value"] for value in values) / 2
    rows = list(csv.DictReader((tmp_path / "out/tasks.csv").open()))
    assert [row["draws"] for row in rows] == ["", "", "", "2"]
    assert f"{mean.value.mean:.4f} ± {mean.value.deviation:.4f}" in (tmp_path / "out/table.md").read_text()
    assert "boolq, acc" in (tmp_path / "out/table.tex").read_text()
    page = build_sweep(tmp_path / "out").read_text()
    assert "standard error over documents" in page
    assert f"{mean.value.mean:.4f} ± {mean.value.deviation:.4f}" in page
    assert "method wanda" in page
    assert "fingerprint" not in page


def test_an_unknown_task_is_refused_before_anything_runs(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match='unknown task "arc_eezy"'):
        secateur.sweep(**options, tasks=["arc_eezy"], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
