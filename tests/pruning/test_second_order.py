"""Every method from folder to folder, and better solvers hurt a trained model less."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
import tiny
from real_data import STORIES, STORIES_TEXT
from secateur.core.gram import Gram
from secateur.core.patterns import NM, Pattern, Unstructured
from secateur.methods import METHODS
from secateur.pruning.engine import prune
from secateur.pruning.named import method_of
from second_order import CHAINS, HALF, ORDERS, TWO_OF_FOUR, assert_verified, calibration, load

# From folder to folder


SELECTING = {"magnitude", "wanda", "wanda_variant", "ria", "gblm", "gblm_inverse", "gradient", "wanda_plus"}
SELECTING |= {"pruner_zero", "ria+swaps", "gradient+swaps"}  # weights are kept as they are


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("second_order") / "llama")


def planned_zeros(entry: Mapping[str, Any], pattern: Pattern, per: str) -> int:
    rows, columns = entry["shape"]
    if isinstance(pattern, NM):
        return rows * columns // pattern.m * (pattern.m - pattern.n)
    if per == "row":
        return rows * int(columns * pattern.sparsity)
    return int(rows * columns * pattern.sparsity)


# By turns a method has one pattern in the tests that are not slow.
@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        pytest.param(name, pattern, marks=[] if number % 3 == turn else pytest.mark.slow, id=f"{name}-{pattern}")
        for number, name in enumerate([*METHODS, *CHAINS])
        for turn, pattern in enumerate([Unstructured(0.6), TWO_OF_FOUR, NM(3, 8)])
    ],
)
def test_every_method_from_folder_to_folder(name: str, pattern: Pattern, llama: Path, tmp_path: Path) -> None:
    method, out = method_of(name), tmp_path / "out"
    manifest = secateur.prune(llama, method=method, pattern=pattern, calibration=tiny.tokens(8, 16), output=out)
    assert_verified(out, llama, manifest)
    assert len(manifest.matrices) == 7 * tiny.BLOCKS
    assert manifest.method == name
    assert manifest.settings["options"] == dict(method.options)
    for entry in manifest.matrices.values():
        expected = planned_zeros(entry, pattern, method.per)
        if method.per == "search" and isinstance(pattern, Unstructured):
            assert entry["zeros"] == pytest.approx(expected, rel=0.02)
        else:
            assert entry["zeros"] == expected
        assert entry["kept_identical"] is (name in SELECTING)
        notes = entry["notes"]
        assert all(math.isfinite(value) for value in notes.values())
        if Gram in method.needs:
            assert 0 < notes["reconstruction_error"] < 1
        dampings = {note: value for note, value in notes.items() if note.endswith("damping")}
        assert bool(dampings) == (name not in SELECTING)
        assert all(0.01 <= value <= 0.1 for value in dampings.values())
    with torch.no_grad():
        assert load(out)(calibration(), use_cache=False).logits.isfinite().all()


@tiny.pairs_by_turns("name, within, targets", ["sparsegpt", "alps", "admm", "wanda+least_squares"], ORDERS)
def test_orders_from_folder_to_folder(name: str, within: str, targets: str, llama: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "method": method_of(name),
        "pattern": TWO_OF_FOUR,
        "calibration": calibration(),
        "within": within,
        "targets": targets,
        "batch_size": 3,
    }
    manifest = prune(llama, output=tmp_path / "out", **settings)
    assert_verified(tmp_path / "out", llama, manifest)
    model = load(llama)
    prune(model, **settings)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(value, written[tensor]) for tensor, value in model.state_dict().items())


# A model that others trained


def stories(text: str, samples: int, first: int) -> Tensor:
    """Windows of 128 tokens of stories one after the other, from a story on."""
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    ids: list[int] = []
    for story in text.split("<|endoftext|>")[first:]:
        ids += tokenizer(story.strip())["input_ids"]
        if len(ids) >= samples * 128:
            break
    return torch.tensor(ids[: samples * 128]).view(samples, 128)


@pytest.mark.slow
@pytest.mark.skipif(not STORIES.exists() or not STORIES_TEXT.exists(), reason=f"no {STORIES} or no {STORIES_TEXT}")
@pytest.mark.parametrize("pattern", [HALF, TWO_OF_FOUR], ids=str)
def test_better_solvers_hurt_less(pattern: Pattern) -> None:
    # Two seeds gave, at 50 %: Wanda 23.2, 22.8, SparseGPT 22.7, 22.6, Wanda refitted 15.4, 15.0, ALPS 16.1, 15.0, and
    # in sequential order to dense targets 14.4, 13.1. At 2:4: 74, 73; 41.1, 37.7; 35.4, 33.1; 31.7, 31.1; 27.6, 24.2.
    text = STORIES_TEXT.read_text(encoding="utf-8")
    windows, held_out = stories(text, 32, 0), stories(text, 64, 1800)

    def measured(name: str, **choices: str) -> float:
        model = AutoModelForCausalLM.from_pretrained(STORIES)
        prune(model, method=method_of(name), pattern=pattern, calibration=windows, **choices)
        return secateur.perplexity(model, held_out).perplexity

    plain, refitted, published = (measured(name) for name in ("wanda", "wanda+least_squares", "sparsegpt"))
    joint, sequential = measured("alps"), measured("alps", within="site", targets="dense")
    assert published < (0.75 if isinstance(pattern, NM) else 1.03) * plain
    assert refitted < 0.8 * plain
    assert joint < 0.92 * published
    assert sequential < 0.96 * joint
    assert sequential > 4  # the dense model's


def test_a_gram_matrix_is_gone_when_its_last_matrix_is_solved(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    made: dict[str, weakref.ref[Gram]] = {}
    alive: dict[str, set[str]] = {}

    def solve(problem: Any) -> Any:
        block = problem.name.split(".self_attn.")[0].split(".mlp.")[0] + "."
        made[problem.name] = weakref.ref(problem.statistic(Gram))
        alive[problem.name] = {
            other.split(".")[-2] for other, gram in made.items() if other.startswith(block) and gram() is not None
        }
        return method_of("sparsegpt").solve(problem)

    prune(
        model,
        method=secateur.Method("own", solve, frozenset({Gram})),
        calibration=calibration(),
        output=tmp_path / "out",
    )
    # In the order of the checkpoint: k, o, q, v, and down, gate, up.
    for name, grams in alive.items():
        if name.endswith("q_proj.weight"):
            assert grams == {"k_proj", "q_proj"}
        if name.endswith("gate_proj.weight"):
            assert grams == {"gate_proj"}
    assert len(alive) == 7 * len({name.split(".")[2] for name in alive})
