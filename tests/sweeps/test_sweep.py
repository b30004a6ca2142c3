"""`sweep`: against separate prunings and evaluations, what its cells share, and its tables."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import secateur
import tiny
from counted_forwards import counted
from real_data import STORIES, STORIES_TEXT
from secateur.errors import CheckpointError
from secateur.sweeps.cells import SweepEvent
from secateur.sweeps.folder import Cell, cell_name
from sweep_runs import HALF, METHODS, MORE, TWO_OF_FOUR, Run, contents


def of_manifest(file: Path) -> dict[str, Any]:
    """A manifest without times and without the paths that a command or a place gave it."""
    value = json.loads(file.read_text())
    for entry in value["matrices"].values():
        del entry["seconds"]
    return {key: item for key, item in value.items() if key not in ("created", "seconds", "digest", "command")}


# Against separate runs


# All methods with all models among the slow ones: with each model here are those that it may be special for.
@pytest.mark.parametrize(
    ("name", "propagate", "methods"),
    [
        ("llama", "dense", ("magnitude", "wanda", "l2", "sparsegpt", "wanda+least_squares")),
        pytest.param("mixtral", "pruned", ("gblm", "wanda_plus", "sparsegpt", "published"), marks=pytest.mark.slow),
        *(
            pytest.param(name, propagate, tuple(METHODS), marks=pytest.mark.slow)
            for name in ("llama", "mixtral")
            for propagate in ("dense", "pruned")
        ),
    ],
)
def test_equal_to_separate_runs(
    name: str, propagate: str, methods: tuple[str, ...], place: Path, run: Run, tmp_path: Path
) -> None:
    model = tiny.save(name, tmp_path / "model")
    before = contents(model)
    data = [str(place / "one.safetensors")]
    patterns = [HALF] if name == "mixtral" else [TWO_OF_FOUR]
    found = run(
        model=model,
        methods={name: METHODS[name] for name in methods},
        patterns=patterns,
        data=data,
        propagate=propagate,
        keep="all",
        batch_size=None,
    )
    assert contents(model) == before
    assert [cell.status for cell in found.cells] == ["done"] * len(methods)
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


@pytest.mark.slow
@pytest.mark.skipif(not STORIES.exists(), reason=f"no trained model in {STORIES}")
def test_a_trained_model(run: Run, tmp_path: Path) -> None:
    text = str(tmp_path / "stories.txt")
    Path(text).write_text(STORIES_TEXT.read_text()[:100_000])
    options: dict[str, Any] = {"samples": 8, "length": 64, "sampling": "concat", "calibration": text}
    found = run(
        model=STORIES,
        methods=[secateur.magnitude(), secateur.wanda(), secateur.sparsegpt()],
        patterns=[TWO_OF_FOUR],
        data=text,
        eval_length=64,
        windows=12,
        agreement=True,
        **options,
    )
    for cell in found.cells:
        method = {"magnitude": secateur.magnitude(), "wanda": secateur.wanda(), "sparsegpt": secateur.sparsegpt()}
        alone = tmp_path / "alone" / cell.folder
        secateur.prune(STORIES, method=method[cell.method], pattern=TWO_OF_FOUR, batch_size=2, output=alone, **options)
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
    assert list(forwards.values()) == [1 + 4 * tiny.BLOCKS + evaluation] + [1 + 2 * tiny.BLOCKS + evaluation] * 5
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


@pytest.mark.slow
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
