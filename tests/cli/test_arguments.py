"""Errors of Python calls speak of arguments, those of commands of options, and messages are written once."""
# ruff: noqa: E501 - one message a line

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur
import tiny
from command_line import Call
from secateur import arguments
from secateur.arguments import in_a_call
from secateur.errors import MethodError, SecateurError
from secateur.pruning.settings import PlanSettings
from secateur.runs.options import Settings, called_by_name, options

SOURCES = Path(secateur.__file__).parent


@pytest.fixture
def _in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "_spoken", "arguments")


MESSAGES = {
    "--samples: got 0, expected at least 1.": "samples: got 0, expected at least 1.",
    "Use --sampling concat or a --length below 12.": 'Use sampling="concat" or a length below 12.',
    "--bos always: token ids are taken as they are. Leave --bos out.": 'bos="always": token ids are taken as they are. Leave bos out.',
    "out: exists already. Choose another folder, or pass --overwrite.": "out: exists already. Choose another folder, or pass overwrite=True.",
    "with --resume it goes on; with --overwrite it starts anew.": "with resume=True it goes on; with overwrite=True it starts anew.",
    "Remove more weights, or leave --packed out.": "Remove more weights, or leave packed out.",
    "--correction is for --targets residual, and targets are dense.": 'correction is for targets="residual", and targets are dense.',
    'leave it dense (--unseen skip), or with --skip "*.up_proj".': 'leave it dense (unseen="skip"), or with skip="*.up_proj".',
    "--sparsity 0.25 and --pattern 2:4 were both given.": 'sparsity=0.25 and pattern="2:4" were both given.',
    "--pattern {'*': 0.5}: --plan says already": "pattern={'*': 0.5}: plan says already",
    "--method mine.py:own: the module mine.py has no such thing": 'method="mine.py:own": the module mine.py has no such thing',
    "--gradient g: the method wanda uses no gradients.": 'gradient="g": the method wanda uses no gradients.',
    "--batch-size 1, or --statistics-device cpu": 'batch_size=1, or statistics_device="cpu"',
    "a smaller --batch-size (now 4), or more --samples": "a smaller batch_size (now 4), or more samples",
    # Commands stay commands, and options that the function does not have stay options.
    "Make another with secateur gradients --norm l1, or use --norm l2.": 'Make another with secateur gradients --norm l1, or use norm="l2".',
    "give it to all: --plan plan.json. Start Ray with --num-gpus.": 'give it to all: plan="plan.json". Start Ray with --num-gpus.',
}


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_in_a_call(message: str) -> None:
    assert in_a_call(message, called_by_name(PlanSettings)) == MESSAGES[message]
    assert in_a_call(MESSAGES[message], called_by_name(PlanSettings)) == MESSAGES[message]  # once is enough


def _mistakes(model: Path, folder: Path) -> dict[str, tuple[Callable[[], Any], list[str], str, str]]:
    """For each mistake the call, the command, and what either says."""
    ids, out = tiny.tokens(), folder / "out"
    prune, name = ["prune", str(model), "-o", str(out)], str(model)
    return {
        "a word": (
            lambda: secateur.prune(model, output=out, within="layer"),  # type: ignore[arg-type]
            [*prune, "--within", "layer"],
            'within: got "layer", expected block or site.',
            '--within: got "layer", expected block or site.',
        ),
        "a number": (
            lambda: secateur.estimate(model, samples=0),
            ["plan", name, "--samples", "0"],
            "samples: got 0, expected at least 1.",
            "--samples: got 0, expected at least 1.",
        ),
        "two that contradict each other": (
            lambda: secateur.prune(model, output=out, sparsity=0.5, pattern="2:4"),
            [*prune, "--sparsity", "0.5", "--pattern", "2:4"],
            'sparsity=0.5 and pattern="2:4" were both given; the pattern sets the sparsity. Drop one.',
            "--sparsity 0.5 and --pattern 2:4 were both given; the pattern sets the sparsity. Drop one.",
        ),
        "deep inside": (
            lambda: secateur.prune(model, output=out, method="magnitude", pattern=secateur.NM(3, 7)),
            [*prune, "--method", "magnitude", "--pattern", "3:7"],
            'got 48. Skip it with skip="model.layers.0.mlp.down_proj.weight" or choose an unstructured pattern.',
            'got 48. Skip it with --skip "model.layers.0.mlp.down_proj.weight" or choose an unstructured pattern.',
        ),
        "a preset": (
            lambda: secateur.prune(model, output=out, preset="best", method="wanda"),
            [*prune, "--preset", "best", "--method", "wanda"],
            'method="wanda": preset="best" says alps.',
            "--method wanda: --preset best says alps.",
        ),
        "another name": (
            lambda: secateur.sweep(model, output=out, patterns="half", data={"ids": ids}),
            ["sweep", name, "-o", str(out), "--pattern", "half"],
            'got "half". For unstructured pruning use sparsity=0.5.',
            'got "half". For unstructured pruning use --sparsity 0.5.',
        ),
    }


@pytest.mark.usefixtures("_in_python")
def test_the_same_mistakes_in_python_and_in_a_command(call: Call, model: Path, tmp_path: Path) -> None:
    for name, (python, command, said, told) in _mistakes(model, tmp_path).items():
        with pytest.raises(SecateurError) as caught:
            python()
        assert said in str(caught.value), name
        assert "--" not in str(caught.value).partition("stands for")[0], name
        result = call(*command)
        assert result.code == 2
        assert told in result.message, name


@pytest.mark.usefixtures("_in_python")
def test_other_functions_and_own_code(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match=r"^length: got 0, expected at least 1\.$"):
        secateur.calibration_windows("python-docs", object(), length=0)
    with pytest.raises(SecateurError, match=r'^bos="always": token ids are taken as they are\. Leave bos out\.$'):
        secateur.evaluation_windows(tiny.tokens(), None, bos="always")
    plan = tmp_path / "plan.json"
    plan.write_text("{}")
    with pytest.raises(SecateurError, match=r"exists already\. Choose another name, or pass overwrite=True\.$"):
        secateur.allocate(model, allocation="owl", output=plan, calibration=tiny.tokens())

    def score(problem: secateur.Problem) -> torch.Tensor:
        raise ValueError("no")

    # The traceback is there already.
    with pytest.raises(MethodError, match=r"failed with ValueError: no \(.*test_arguments\.py:\d+, in score\)\.$"):
        secateur.prune(model, method=secateur.select("mine", score), output=tmp_path / "out")


def _written() -> Iterator[tuple[str, str]]:
    """(where, text) of every text in the code below the command line that names an option, but docs and help."""
    for file in SOURCES.rglob("*.py"):
        if "cli" in file.relative_to(SOURCES).parts:
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        helps = [
            node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Option"
        ]
        left_out = {id(inner) for own in helps for inner in ast.walk(own)}
        docs = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
        left_out |= {id(inner) for own in docs for inner in ast.walk(own)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in left_out:
                yield f"{file.name}:{node.lineno}", node.value


def test_every_option_that_a_message_names_is_an_argument_somewhere() -> None:
    for file in SOURCES.rglob("settings.py"):
        import_module(".".join(["secateur", *file.relative_to(SOURCES).with_suffix("").parts]))
    kinds, known = [Settings], set()
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        known |= {field.flag for field in options(kind)} | {
            f"--{name.replace('_', '-')}" for name in inspect.signature(kind).parameters
        }
    named = [(where, flag) for where, text in _written() for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text)]
    assert len(named) > 150
    # Of commands alone, and of another program's.
    others = {"--json", "--no-eval", "--source", "--num-gpus"}
    assert {flag for _, flag in named} - known == others
