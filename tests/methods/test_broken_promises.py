"""Methods that do not keep their word are told so by name."""

# ruff: noqa: F811 - fixtures of another file

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from refused_runs import (
    FIRST,
    Refused,
    _no_trace_in_the_working_directory,  # noqa: F401
    model,  # noqa: F401
    models,  # noqa: F401
    refused,  # noqa: F401
    snapshot,
)
from secateur.core.patterns import NM, Unstructured
from secateur.core.problem import Method, Problem, Solution
from secateur.core.statistics import SquaredNorm
from secateur.errors import MethodError, NumericalError, PatternError, SecateurError
from secateur.methods.wanda import wanda
from secateur.pruning.engine import prune
from secateur.runs.journal import Journal


def method_of(change: Callable[[Solution], Solution], needs: bool = True) -> Method:
    """Wanda, whose solutions are changed before they are given back."""
    inner = wanda()
    return Method("mine", lambda problem: change(inner.solve(problem)), inner.needs if needs else frozenset())


EXPECTED = "expected torch.float32 and torch.bool, both of (32, 48)."
GAVE = f"{FIRST}: mine returned a torch.{{}} weight of shape {{}} and a torch.{{}} mask of {{}}, {EXPECTED}"
BAD_SOLUTIONS: dict[str, tuple[Callable[[Solution], Solution], type[SecateurError], str]] = {
    "transposed": (
        lambda solution: Solution(solution.weight.t(), solution.mask.t()),
        PatternError,
        GAVE.format("float32", "(48, 32)", "bool", "(48, 32)"),
    ),
    "mask of one row": (
        lambda solution: Solution(solution.weight, solution.mask[:1]),
        PatternError,
        GAVE.format("float32", "(32, 48)", "bool", "(1, 48)"),
    ),
    "half precision": (
        lambda solution: Solution(solution.weight.half(), solution.mask),
        PatternError,
        GAVE.format("float16", "(32, 48)", "bool", "(32, 48)"),
    ),
    "mask of numbers": (
        lambda solution: Solution(solution.weight, solution.mask.float()),
        PatternError,
        GAVE.format("float32", "(32, 48)", "float32", "(32, 48)"),
    ),
    "everything kept": (
        lambda solution: Solution(solution.weight, torch.ones_like(solution.mask)),
        PatternError,
        f"{FIRST}: the mask of mine breaks 2:4: row 0, columns 0 to 3: 4 non-zeros, expected at most 2.",
    ),
    "mask the wrong way round": (
        lambda solution: Solution(solution.weight, ~solution.mask),
        PatternError,
        f"{FIRST}: mine returned 768 non-zero weights where its own mask says that they are removed.",
    ),
    "NaN": (
        lambda solution: Solution(solution.weight.index_fill(0, torch.tensor([1]), float("nan")), solution.mask),
        NumericalError,
        f"{FIRST}: mine returned 48 of 1536 weights that are NaN or infinite, first nan in row 1, column 0, where the "
        f'source has none. Use more damping, if the method has any, or leave this matrix out with --skip "{FIRST}".',
    ),
    "infinity": (
        lambda solution: Solution(solution.weight / 0.0, solution.mask),
        NumericalError,
        re.compile(
            rf"{re.escape(FIRST)}: mine returned 1536 of 1536 weights that are NaN or infinite, first "
            r"(nan|inf|-inf) in row 0, column 0, where the source has none\. Use more damping, "
            r"if the method has any, or leave this matrix out "
            rf'with --skip "{re.escape(FIRST)}"\.'
        ),
    ),
}


@pytest.mark.parametrize("kind", BAD_SOLUTIONS)
def test_solutions_that_are_none(kind: str, model: Path, refused: Refused) -> None:
    change, error, message = BAD_SOLUTIONS[kind]
    refused(error, message, model, method=method_of(change), pattern=NM(2, 4))


def test_a_mask_with_too_few_zeros(model: Path, refused: Refused) -> None:
    method = method_of(lambda solution: Solution(solution.weight, solution.mask | (torch.arange(48) < 4)))
    refused(
        PatternError,
        re.compile(
            re.escape(f"{FIRST}: the mask of mine breaks 0.5 unstructured per row: ")
            + r"row \d+ has \d+ zeros, expected at least 24\."
        ),
        model,
        method=method,
        pattern=Unstructured(0.5, "row"),
    )


def test_a_method_that_does_not_say_what_it_needs(model: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    with pytest.raises(MethodError, match="SquaredNorm was not collected; list it in the needs of the method"):
        prune(model, method=method_of(lambda solution: solution, needs=False), output=tmp_path / "out")
    assert snapshot(tmp_path) == before


def test_a_method_that_fails_leaves_nothing(model: Path, tmp_path: Path) -> None:
    def solve(problem: Problem) -> Solution:
        if problem.name == "model.layers.0.self_attn.v_proj.weight":
            raise ZeroDivisionError(problem.name)
        return wanda().solve(problem)

    before = snapshot(tmp_path)
    with pytest.raises(MethodError, match="mine failed with ZeroDivisionError"):
        prune(
            model,
            method=Method("mine", solve, frozenset({SquaredNorm})),
            calibration=tiny.tokens(),
            output=tmp_path / "new" / "out",
        )
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("stage", ["calibrate", "record", "read", "statistics", "solve", "forward", "write"])
def test_an_interruption_at_any_stage_leaves_finished_blocks(stage: str, model: Path, tmp_path: Path) -> None:
    def stop(event: Any) -> None:
        if event.stage == stage and event.block in (0, 1):
            raise KeyboardInterrupt

    before = snapshot(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        prune(model, method=wanda(), calibration=tiny.tokens(), output=tmp_path / "out", on_event=stop)
    partial = tmp_path / "out.partial"
    assert partial.exists() == (stage == "write")  # which is told after the block was handed over to be written
    if stage == "write":
        assert Journal(partial / "journal.jsonl").finished == ["block 0"]
        shutil.rmtree(partial)
    assert snapshot(tmp_path) == before
