"""`eval --tasks` and `compare` with tasks and prompts, as people and programs see them; what models go on to write."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import secateur
from command_line import (
    Call,
    call,  # noqa: F401 - a fixture
    save_model,
)
from secateur.errors import CalibrationError
from secateur.evaluate.generations import generations, read_prompts, shared_start
from secateur.evaluate.results import Results
from secateur.files.digest import model_digest
from secateur.models.opening.whole import WholeModel
from secateur.report.evaluations import read_evaluations, tables

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
from test_tasks import arc, boolq, lines

pytestmark = pytest.mark.usefixtures("some_tasks")
PROMPTS = ["The [bold]cat[/bold] sat on", "def value():"]
TEXT = ["--data", "python-docs", "--length", 32, "--windows", 4]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    lines(folder / "boolq_validation.jsonl", boolq(draw, 8))
    lines(folder / "arc_easy_test.jsonl", arc(draw, 10))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("comparison") / "dense")


@pytest.fixture(scope="module")
def pruned(model: Path) -> list[Path]:
    folders = [model.parent / name for name in ("half", "most")]
    for folder, sparsity in zip(folders, (0.5, 0.95), strict=True):
        secateur.prune(model, method=secateur.magnitude(), pattern=secateur.Unstructured(sparsity), output=folder)
    return folders


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Results:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    return Results(tmp_path / "cache" / "evaluations")


def test_eval_of_tasks(call: Call, model: Path, data: Path, store: Results) -> None:  # noqa: F811
    given = ["--task-data", data, "--limit", 6]
    shown = call("eval", model, "--tasks", "arc_easy, boolq", *given)
    assert (shown.code, shown.err) == (0, "")
    share = r"\d+\.\d\d ± \d+\.\d\d"
    assert re.search(r"^task +shots +documents +acc % +acc_norm %$", shown.out, re.M)
    assert re.search(rf"^arc_easy +0 +6 +{share} +{share}$", shown.out, re.M)
    assert re.search(rf"^boolq +0 +6 +{share} *$", shown.out, re.M)
    assert "the first 6 documents of each task" in shown.out
    again = call("eval", model, "--tasks", "arc_easy", "--tasks", "boolq", *given, *TEXT, "--json")
    assert "arc_easy, boolq not run again" in again.err
    assert "--fresh runs them again" in again.err
    value = again.json
    assert [result["task"] for result in value["tasks"]["results"]] == ["arc_easy", "boolq"]
    assert value["windows"] == 4  # perplexity, as without tasks
    assert value["tasks"]["limit"] == 6
    kept = store.of(model_digest(model))
    assert sorted(record.kind for record in kept) == ["perplexity", "tasks", "tasks"]
    (perplexity,) = [record for record in kept if record.kind == "perplexity"]
    assert perplexity.result["perplexity"] == value["perplexity"]
    key = {"data": "python-docs", "length": 32, "digest": value["digest"], "dtype": "auto", "bos": "papers"}
    assert perplexity.key == key


def test_compare_everything(
    call: Call,  # noqa: F811
    model: Path,
    pruned: list[Path],
    data: Path,
    store: Results,
    tmp_path: Path,
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n\n".join(PROMPTS) + "\n")
    arguments = ["compare", model, *pruned, *TEXT, "--tasks", "arc_easy,boolq", "--task-data", data]
    arguments += ["--prompts", prompts, "--new-tokens", 5]
    value = call(*arguments, "--csv", tmp_path / "table.csv", "--json").json
    assert [row["model"] for row in value["results"]] == [str(folder) for folder in pruned]
    assert [(row["model"], row["task"]) for row in value["tasks"]] == [
        (str(folder), task) for folder in pruned for task in ("arc_easy", "boolq")
    ]
    for row in value["tasks"]:
        for name, difference in row["differences"].items():
            change = row["metrics"][name]["value"] - row["dense"][name]["value"]
            assert difference["value"] == pytest.approx(change)
            net = difference["wrong_to_right"] - difference["right_to_wrong"]
            assert change == pytest.approx(net / row["documents"])
    for own in value["verdicts"]:
        rows = [row["differences"]["acc"] for row in value["tasks"] if row["model"] == own["model"]]
        flipped = sum(row["right_to_wrong"] + row["wrong_to_right"] for row in rows)
        worst = 100 * min(row["value"] for row in rows)
        assert f"{flipped} of 18 answers flipped" in own["sentence"]
        assert f" {worst:+.1f} ± " in own["sentence"]
    assert [entry["prompt"] for entry in value["generations"]] == PROMPTS
    for entry in value["generations"]:
        assert [output["model"] for output in entry["outputs"]] == [str(model), *map(str, pruned)]
        assert entry["outputs"][0]["shared_with_dense"] == len(entry["outputs"][0]["tokens"]) == 5
    with (tmp_path / "table.csv").open() as stream:
        table = list(csv.DictReader(stream))
    assert [(row["model"], row["kind"], row["name"]) for row in table] == [
        *((str(folder), "text", "python-docs") for folder in pruned),
        *((str(folder), "task", task) for folder in pruned for task in ("arc_easy", "boolq")),
    ]
    assert float(table[0]["perplexity"]) == value["results"][0]["perplexity"]
    assert table[0]["acc"] == table[2]["perplexity"] == ""
    found = value["tasks"][0]["differences"]["acc_norm"]
    assert float(table[2]["acc_norm_difference_error"] or "nan") == pytest.approx(found["error"], nan_ok=True)
    assert int(table[2]["acc_norm_right_to_wrong"]) == found["right_to_wrong"]
    kept = store.of(model_digest(pruned[1]))
    assert {record.kind for record in kept} == {"agreement", "tasks", "continuations"}
    (rows,) = (record.result["rows"] for record in kept if record.kind == "continuations")
    outputs = [entry["outputs"] for entry in value["generations"]]
    assert [(row["prompt"], row["dense"], row["pruned"], row["tokens_in_common"]) for row in rows] == [
        (prompt, own[0]["text"], own[2]["text"], own[2]["shared_with_dense"])
        for prompt, own in zip(PROMPTS, outputs, strict=True)
    ]
    (tmp_path / "compare.json").write_text(json.dumps(value))
    read = read_evaluations(tmp_path / "compare.json", pruned[1])
    assert [item["kind"] for item in read] == ["agreement", "tasks", "tasks", "continuations"]
    assert read[-1]["result"]["rows"] == rows
    (table,) = (table for table in tables(read) if table.name == "continuations")
    assert [cell.text for cell in table.rows[0]] == [*list(rows[0].values())[:3], str(rows[0]["tokens_in_common"])]

    shown = call(*arguments)
    assert all(f"{folder}: arc_easy, boolq not run again" in shown.err for folder in (model, *pruned))
    assert "same first choice" in shown.out
    assert re.search(r"^task +documents +model +acc % +- dense +flips +acc_norm % +- dense +flips$", shown.out, re.M)
    assert re.search(r"^arc_easy +10 +dense +\d", shown.out, re.M)
    assert re.search(
        rf"^ +{pruned[0].name} +\d+\.\d\d ± \d+\.\d\d +[+-]\d+\.\d\d ± \d+\.\d\d +-\d+ \+\d+ ", shown.out, re.M
    )
    assert PROMPTS[0] in shown.out  # brackets are text, not markup
    assert re.search(rf"^{pruned[1].name} +\d of 5", shown.out, re.M)


def test_the_best_is_bold(model: Path, pruned: list[Path], data: Path) -> None:
    from rich.console import Console

    from secateur.report.terminal import task_comparison_table

    results = [secateur.tasks(folder, ["arc_easy"], task_data=data) for folder in (model, *pruned)]
    rows = [row for own in results[1:] for row in secateur.task_differences(results[0], own)]
    console = Console(width=250, force_terminal=True, color_system="standard", record=True, file=io.StringIO())
    console.print(task_comparison_table(rows))
    shown = console.export_text(styles=True).splitlines()
    best = max(row.pruned.metrics["acc"].value for row in rows)
    for row in rows:
        (line,) = [line for line in shown if Path(row.model).name in line]
        figure = f"{100 * row.pruned.metrics['acc'].value:.2f} ±"
        bold = re.search(rf"\x1b\[1m *{re.escape(figure)}", line) is not None
        assert bold == (row.pruned.metrics["acc"].value == best)


# What models write


def test_greedy_continuations_are_the_likeliest_tokens(model: Path) -> None:
    module = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    # What a checkpoint asks of generation beside greedy decoding has no effect.
    module.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, top_k=3, repetition_penalty=9.0, bos_token_id=0, eos_token_id=0
    )
    with WholeModel(module, tokenizer=tokenizer) as whole:
        found = generations(whole, PROMPTS, new_tokens=7)
    for prompt, generation in zip(PROMPTS, found, strict=True):
        ids: list[int] = tokenizer(prompt)["input_ids"]
        start = len(ids)
        with torch.no_grad():
            while len(ids) < start + 7:
                ids.append(int(module(torch.tensor([ids])).logits[0, -1].argmax()))
        assert generation.tokens == ids[start:]
        assert generation.text == tokenizer.decode(ids[start:], skip_special_tokens=True)
    with WholeModel(model) as whole, pytest.raises(CalibrationError, match=r"prompt 1: \d+ tokens and 256 new ones"):
        generations(whole, PROMPTS, new_tokens=256)


def test_how_long_two_continuations_are_the_same() -> None:
    assert shared_start([1, 2, 3], [1, 2, 4]) == 2
    assert shared_start([1, 2], [1, 2, 3]) == 2
    assert shared_start([5], [6]) == shared_start([], [6]) == 0


def test_files_of_prompts(tmp_path: Path) -> None:
    text, rows = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text("one\n\n  two \n")
    rows.write_text(json.dumps({"prompt": "first\nsecond"}) + "\n")
    assert read_prompts(text) == ["one", "  two "]
    assert read_prompts(rows) == ["first\nsecond"]
    wrong: dict[str, Any] = {"text": "one"}
    rows.write_text(json.dumps(wrong) + "\n")
    with pytest.raises(CalibrationError, match=r"line 1: .* required field `prompt`\. Expected a JSON object with"):
        read_prompts(rows)
    rows.write_text(json.dumps({"prompt": "one"}) + "\n" + "[" * 100_000)
    with pytest.raises(CalibrationError, match=r"prompts\.jsonl, line 2: lists and objects lie more than 100 deep"):
        read_prompts(rows)
    rows.write_text('{"prompt": 3}')
    with pytest.raises(CalibrationError, match=r"line 1: .* Expected `str`, got `int` - at `\$.prompt`"):
        read_prompts(rows)
    text.write_text("\n")
    with pytest.raises(CalibrationError, match=r"prompts\.txt: no prompt in it"):
        read_prompts(text)
    text.write_bytes("one\ncafé\n".encode("latin-1"))
    with pytest.raises(CalibrationError, match=r"prompts\.txt, line 2: not UTF-8 text \(byte 3"):
        read_prompts(text)
    with pytest.raises(CalibrationError, match=r"nope\.txt: no such file"):
        read_prompts(tmp_path / "nope.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(CalibrationError, match=r"pipe\.txt: is a pipe, expected a regular file"):
        read_prompts(tmp_path / "pipe.txt")


def test_prompts_are_what_their_lines_hold(tmp_path: Path) -> None:
    # A line separator inside a text ends no line of the file, nor does the mark of some editors begin a prompt.
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("\ufeff" + json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert read_prompts(rows) == ["a\u2028b"]
    text = tmp_path / "prompts.txt"
    text.write_text("\ufeffone\u2028still one\r\ntwo", encoding="utf-8", newline="")
    assert read_prompts(text) == ["one\u2028still one", "two"]
