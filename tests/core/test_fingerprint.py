"""What a method depends on, named: equal for what gives equal results, different for what may not."""

import enum
import functools
import importlib
import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import secateur
from secateur.core.fingerprint import difference, fingerprint, recorded
from secateur.errors import PatternError
from secateur.methods import METHODS, REFINEMENTS

SOURCE = """
import functools
import secateur
import own_helpers
from own_helpers import scaled

POWER = 0.5

def powered(power=0.5):
    '''The first line.'''
    def score(problem):  # a remark
        norm = problem.statistic(secateur.SquaredNorm).norm()
        return scaled(problem.weight.abs()) * norm ** power
    return secateur.select("powered", score, needs=frozenset({secateur.SquaredNorm}))

def constant():
    return secateur.select("constant", lambda problem: problem.weight.abs() ** POWER)

def shaped(problem, by=2, *, sign=1):
    return own_helpers.scaled(problem.weight.abs()) * by * sign

def defaults():
    return secateur.select("defaults", shaped)

def part():
    return secateur.select("part", functools.partial(shaped, by=3))

class Score:
    def __init__(self, power):
        self.power = power
    def __call__(self, problem):
        return self.inner(problem) ** self.power
    def inner(self, problem):
        return problem.weight.abs()

def instance():
    return secateur.select("instance", Score(2))

def late():
    def score(problem):
        import own_helpers as found
        return found.scaled(problem.weight)
    return secateur.select("late", score)

def looked_up():
    return secateur.select("looked_up", lambda problem: problem.weight * globals()["POWER"])

class Sum(secateur.SquaredNorm):
    FACTOR = 2

def counted():
    return secateur.select("counted", lambda problem: problem.weight, needs=frozenset({Sum}))

def solved():
    def solve(problem):
        mask = problem.pattern.mask(problem.weight.abs())
        return secateur.Solution(problem.weight * mask, mask)
    return secateur.Method("solved", solve)

def chained():
    return secateur.chain(powered(), secateur.Refinement("own", refine))

def refine(problem, solution):
    return solution
"""
HELPERS = """
SCALE = 2.0

def scaled(x):
    return x * SCALE

def unused(x):
    return x
"""
FACTORIES = (
    *("powered", "constant", "defaults", "part", "instance", "late", "looked_up", "counted", "solved", "chained"),
)
Load = Callable[..., ModuleType]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """`load(old, new, ...)`: the module of methods, anew, with parts of its text or its helpers' exchanged."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def load(*changes: tuple[str, str]) -> ModuleType:
        files = {"own_methods": SOURCE, "own_helpers": HELPERS}
        for old, new in changes:
            assert any(old in text for text in files.values())
            files = {name: text.replace(old, new) for name, text in files.items()}
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return importlib.import_module("own_methods")

    yield load
    for name in ("own_methods", "own_helpers"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("factory", "change", "expected"),
    [
        ("powered", ("power=0.5", "power=0.05"), "power in own_methods.powered.<locals>.score was 0.5, is 0.05"),
        ("powered", ("* norm", "+ norm"), "the code of own_methods.powered.<locals>.score has changed"),
        ("powered", ("return x * SCALE", "return x / SCALE"), "the code of own_helpers.scaled has changed"),
        ("powered", ("SCALE = 2.0", "SCALE = 3.0"), "SCALE in own_helpers was 2.0, is 3.0"),
        ("powered", ("SCALE = 2.0", "SCALE = 2"), "SCALE in own_helpers was 2.0, is 2"),
        ("constant", ("POWER = 0.5", "POWER = 1.5"), "POWER in own_methods was 0.5, is 1.5"),
        ("defaults", ("by=2", "by=4"), "by in own_methods.shaped was 2, is 4"),
        ("defaults", ("sign=1", "sign=-1"), "sign in own_methods.shaped was 1, is -1"),
        ("defaults", ("return x * SCALE", "return x"), "the code of own_helpers.scaled has changed"),
        ("part", ("by=3", "by=5"), "its score or solve has changed"),
        ("instance", ("Score(2)", "Score(3)"), "its score or solve has changed"),
        ("instance", ("return self.inner", "return -self.inner"), "the code of own_methods.Score.__call__ has changed"),
        ("instance", ("return problem.weight.abs()\n\ndef instance", "return problem.weight\n\ndef instance"),
         "the code of own_methods.Score.inner has changed"),
        ("late", ("return x * SCALE", "return x"), "the code of own_helpers.scaled has changed"),
        ("looked_up", ("POWER = 0.5", "POWER = 2"), "POWER in own_methods was 0.5, is 2"),
        ("counted", ("FACTOR = 2", "FACTOR = 3"), "FACTOR in own_methods.Sum was 2, is 3"),
        ("solved", ("problem.weight * mask", "problem.weight * mask * 1.01"),
         "the code of own_methods.solved.<locals>.solve has changed"),
        ("chained", ("return solution", "return None"), "the code of own_methods.refine has changed"),
        ("chained", ("power=0.5", "power=0.1"), "power in own_methods.powered.<locals>.score was 0.5, is 0.1"),
    ],
)  # fmt: skip
def test_what_changes_a_result_changes_it(load: Load, factory: str, change: tuple[str, str], expected: str) -> None:
    before = fingerprint(getattr(load(), factory)())
    assert fingerprint(getattr(load(), factory)()) == before
    assert difference(before, fingerprint(getattr(load(change), factory)())) == expected


def test_what_changes_no_result_does_not(load: Load) -> None:
    module = load()
    # Where a module is mentioned all of it counts, and where globals() is called, all of one's own.
    whole = {"looked_up", "defaults", "part", "late"}
    before = {name: fingerprint(getattr(module, name)()) for name in FACTORIES if name not in whole}
    changed = load(
        ("# a remark", "# another\n"),
        ("'''The first line.'''", "'''Another.'''"),
        ("POWER = 0.5", "OTHER = 1\nPOWER = 0.5"),
        ("def unused(x):\n    return x", "def unused(x):\n    return 2 * x"),
        ("class Sum", "def one_more():\n    return 3\n\nclass Sum"),
    )
    for name, expected in before.items():
        assert fingerprint(getattr(changed, name)()) == expected


def test_the_same_in_every_process(load: Load, tmp_path: Path) -> None:
    names = [name for name in FACTORIES if name != "looked_up"]
    module = load()
    here = [str(fingerprint(getattr(module, name)())) for name in names]
    script = textwrap.dedent(f"""
        import own_methods
        from secateur.core.fingerprint import fingerprint
        for name in {names}:
            print(fingerprint(getattr(own_methods, name)()))
    """)
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # another than this process has
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-B", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.stdout.splitlines() == here, done.stderr


def test_of_our_own_it_is_name_options_and_revision() -> None:
    made = {name: fingerprint(factory()) for name, factory in METHODS.items()}
    assert len({str(entry) for entry in made.values()}) == len(METHODS)
    for entry in made.values():
        assert not [name for name in entry if "code of" in name or name == "python"]
    refined = fingerprint(secateur.chain(secateur.wanda(), *(factory() for factory in REFINEMENTS.values())))
    for name in REFINEMENTS:
        assert refined[f"{name}: revision of {name}"] == "1"
    assert difference(made["sparsegpt"], fingerprint(secateur.sparsegpt(damping=0.1))) == (
        "option damping was 0.01, is 0.1"
    )


def test_a_raised_revision_changes_it() -> None:
    from dataclasses import replace

    method = secateur.wanda()
    assert difference(fingerprint(method), fingerprint(replace(method, revision=2))) == (
        "revision of wanda was 1, is 2"
    )
    refinement = secateur.swaps()
    chains = [secateur.chain(method, one) for one in (refinement, replace(refinement, revision=2))]
    assert difference(*map(fingerprint, chains)) == "swaps: revision of swaps was 1, is 2"


def of_score(score: Any) -> dict[str, str]:
    return fingerprint(secateur.select("own", score))


class Kind(enum.Enum):
    ONE = 1
    TWO = 2


def test_values_of_all_kinds_are_told_apart() -> None:
    def closed_over(value: Any) -> dict[str, str]:
        return of_score(lambda problem: (problem, value))

    cycle: list[Any] = []
    cycle.append(cycle)
    values = [
        *(1, 1.0, True, None, "1", b"1", 0.1, 0.1 + 1e-17 + 1e-16, "x" * 200, "x" * 199 + "y"),
        *(
            [1, 2],
            (1, 2),
            [2, 1],
            {1, 2},
            {"a": 1},
            {"a": 2},
            {"a": {"b": torch.zeros(2)}},
            {"a": {"b": torch.ones(2)}},
        ),
        *(torch.zeros(2), torch.zeros(3), torch.zeros(2, dtype=torch.bfloat16), torch.tensor(0.0), torch.float32),
        *(Kind.ONE, Kind.TWO, random.Random(1), random.Random(2), range(3), cycle),
        *(torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)),
        *(torch.abs, torch.square, functools.partial(torch.add, 1), functools.partial(torch.add, 2), dict, list),
        *(secateur.wanda(), secateur.wanda(weighting="published")),
    ]
    made = [str(closed_over(value)) for value in values]
    assert len(set(made)) == len(values)
    assert made == [str(closed_over(value)) for value in values]


def test_functions_without_a_file_are_told_apart_by_what_they_do() -> None:
    def of_text(text: str) -> dict[str, str]:
        return of_score(eval(text, {"__name__": "__main__"}))

    assert of_text("lambda problem: problem.weight") == of_text("lambda problem: problem.weight ")
    assert of_text("lambda problem: problem.weight + 1") != of_text("lambda problem: problem.weight + 2")
    assert of_score(torch.abs) != of_score(torch.square)


def test_an_object_that_nobody_can_name_is_refused() -> None:
    with Path(__file__).open() as opened:
        method = secateur.select("own", lambda problem: opened)
        with pytest.raises(PatternError, match=r"own: opened in \S+ holds a _io.TextIOWrapper, of which nobody can"):
            fingerprint(method)
        assert "opened in" in recorded(method)["unknown"]
    running = (number for number in [1])
    with pytest.raises(PatternError, match=r"holds a builtins.generator"):
        of_score(lambda problem: running)
