"""`check_method` passes every method of ours, and says of others what is wrong with them."""
# ruff: noqa: E501 - one fault a line

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import secateur
from secateur.core.choices import Group
from secateur.core.problem import Method, Problem, Solution
from secateur.core.statistics import SquaredNorm
from secateur.errors import MethodError, PatternError
from secateur.methods import METHODS
from secateur.testing import check_method

CHAINS = ["wanda+least_squares", "magnitude+swaps", "sparsegpt+obs_update", "gblm+swaps+least_squares"]


@pytest.mark.parametrize("name", [*METHODS, *CHAINS])
def test_every_method_of_ours_keeps_its_word(name: str) -> None:
    checked = check_method(name)
    assert checked.name == name
    assert len(checked.problems) == 13
    assert str(checked).startswith(f"{name} solved 13 small problems as it should: pattern 0.5 unstructured per ")


@pytest.fixture
def _own_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is imported from files of a test is forgotten after it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in ("mine", "broken", "inputs_only"):
        if name not in before:
            sys.modules.pop(name, None)


@pytest.mark.usefixtures("_own_modules")
def test_a_file_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "inputs_only.py").write_text(
        "import secateur\n"
        "def mine(power=1.0):\n"
        "    def score(problem):\n"
        "        return problem.statistic(secateur.SquaredNorm).norm().pow(power).expand_as(problem.weight)\n"
        "    return secateur.select('mine', score, needs=frozenset({secateur.SquaredNorm}))\n"
    )
    assert repr(check_method(f"{tmp_path}/inputs_only.py:mine", patterns=["2:4"])) == (
        "mine solved 8 small problems as it should: pattern 2:4, bfloat16, float16, float64, all alike in 2:4, an "
        "input that is always zero, fewer tokens than inputs, a matrix of one row.\n"
        "It writes to nothing that it is given, does the same twice, and can be told from others in a sweep."
    )


def scored(score: Callable[[Problem], Tensor], *needs: type) -> Method:
    return secateur.select("mine", score, needs=frozenset(needs))


def solved(solve: Callable[[Problem], Solution], *needs: type, per: Group = "row") -> Method:
    return Method("mine", solve, frozenset(needs), per)


def kept(problem: Problem, mask: Tensor) -> Solution:
    return Solution(torch.where(mask, problem.weight, 0), mask)


def threshold(problem: Problem) -> Solution:
    """The usual mistake: everything up to a threshold goes, so that ties break the count."""
    size = problem.weight.abs()
    return kept(problem, size > size.flatten().float().quantile(problem.pattern.sparsity))


def writes_weight(problem: Problem) -> Solution:
    mask = problem.pattern.mask(problem.weight.abs())
    return Solution(problem.weight.mul_(mask), mask)


def writes_statistic(problem: Problem) -> Tensor:
    norm = problem.statistic(SquaredNorm)
    norm.total *= 2
    return problem.weight.abs() * norm.norm()


def alone(problem: Problem) -> Tensor:
    """A score that takes the logarithm of a norm, which is no number where an input is always zero."""
    return problem.statistic(SquaredNorm).norm().log().expand_as(problem.weight)


def not_recorded(numbers: Iterator[int]) -> Method:
    return scored(lambda problem: problem.weight.abs() if numbers else problem.weight)


FAULTS: dict[str, tuple[Method, list[str]]] = {
    "ties": (
        solved(threshold, per="matrix"),
        [
            r"- pattern 0\.3 unstructured per row: the mask of mine breaks 0\.3 .* row: row \d+ has \d zeros, expected at least 9\.$",
            r"- pattern 2:4: the mask of mine breaks 2:4: row \d+, columns \d+ to \d+: \d non-zeros, expected at most 2\. \(Also",
            r"- all alike in 0\.5 unstructured per matrix: it removes 384 of 384 weights, and 0\.5 unstructured per matrix asks fo",
        ],
    ),
    "too much": (
        solved(lambda problem: kept(problem, torch.zeros_like(problem.weight, dtype=torch.bool))),
        [
            r"- pattern 0\.5 unstructured per row: it removes 384 of 384 weights, and 0\.5 unstructured per row asks for 192\. "
            r"\(Also: pattern 0\.3 unstructured per row, .* and \d+ more\.\)"
        ],
    ),
    "writes to the weight": (
        solved(writes_weight),
        [r"- pattern 0\.5 .* row: it writes to the problem's weight, which others read after it\. Write to a clone\(\)\."],
    ),
    "writes to a statistic": (
        scored(writes_statistic, SquaredNorm),
        [r"- pattern 0\.5 .* row: it writes to the problem's SquaredNorm\.total, which others read after it\."],
    ),
    "float32 alone": (
        solved(
            lambda problem: Solution(
                (problem.weight.float() * problem.pattern.mask(problem.weight)), problem.pattern.mask(problem.weight)
            )
        ),
        [r"- bfloat16: mine returned a torch\.float32 weight of shape \(12, 32\) .*, expected torch\.bfloat16 .* \(Also: flo"],
    ),
    "random": (
        scored(lambda problem: torch.rand(problem.weight.shape)),
        [r"- pattern 0\.5 .*: solving it twice gives two solutions\. Take random numbers from a torch\.Generator that is seeded"],
    ),
    "a zero": (
        scored(alone, SquaredNorm),
        [r"- an input that is always zero: \d+ of 384 mine scores are not finite .* computed in .*test_check_method\.py:\d+\."],
    ),
    "needs": (
        scored(lambda problem: problem.statistic(SquaredNorm).norm().expand_as(problem.weight)),
        [r"- pattern 0\.5 .*: mine failed with KeyError: SquaredNorm was not collected; list it in the needs of the method\. \("],
    ),
    "raises": (
        scored(lambda problem: problem.weight @ problem.weight),
        [r"- pattern 0\.5 .*: mine failed with RuntimeError: mat1 and mat2 shapes .* \(.*test_check_method\.py:\d+, in <lambda>\)"],
    ),
    "not to be recorded": (
        not_recorded(number for number in [1]),
        [r"- in a sweep: numbers in \S+ holds a builtins\.generator, of which nobody can say later whether it is the same"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_said(fault: str) -> None:
    method, expected = FAULTS[fault]
    with pytest.raises(MethodError) as caught:
        check_method(method)
    first, *lines = str(caught.value).splitlines()
    assert first == "mine does not keep its word:"
    assert len(lines) == len(expected), lines
    for line, pattern in zip(lines, expected, strict=True):
        assert re.match(pattern, line), line


@pytest.mark.usefixtures("_own_modules")
def test_the_page_on_methods_of_ones_own_says_what_is_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "own-method.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:python)?\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    file = next(block for block in blocks if block.startswith("# mine.py"))
    assert len([line for line in file.splitlines()[1:] if line]) <= 10
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(file)
    said = next(block for block in blocks if ">>> secateur.testing" in block)
    assert " ".join(said.partition(':powered")')[2].split()) == " ".join(repr(check_method("mine.py:powered")).split())
    Path("broken.py").write_text(file.replace("abs()", "abs_()").replace("* norm", "/ norm"))
    with pytest.raises(MethodError) as caught:
        check_method("broken.py:powered")
    told = str(caught.value).replace(f"{tmp_path}/broken.py", "mine.py")
    expected = next(block for block in blocks if block.startswith("secateur.errors.MethodError: "))
    assert " ".join(expected.removeprefix("secateur.errors.MethodError: ").split()) == " ".join(told.split())
    names: dict[str, Callable[[], Method]] = {}
    exec(next(block for block in blocks if "def halved" in block), names)
    assert check_method(names["halved"]).name == "halved"


def test_no_method_and_patterns_that_it_is_not_meant_for() -> None:
    with pytest.raises(PatternError, match=r"^method: swaps refines a method and is none"):
        check_method(secateur.swaps)

    def rows_alone(problem: Problem) -> Tensor:
        if not isinstance(problem.pattern, secateur.Unstructured):
            raise PatternError(f"{problem.pattern}: mine takes sparsities alone.")
        return problem.weight.abs()

    with pytest.raises(
        MethodError,
        match=r"word:\n- pattern 2:4: 2:4: mine takes sparsities alone\. \(Also: pattern 4:8, all alike in 4:8\.\)$",
    ):
        check_method(scored(rows_alone))
    limited = secateur.testing.check_method(scored(rows_alone), patterns=[0.5, "30%"], device="cpu")
    assert limited.problems[-2:] == ("a matrix of one row", "on cpu")
