"""Choices, the nearest of them, nested YAML, a pattern for each glob, and the table of options."""

# ruff: noqa: F811 - fixtures of another file

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from test_config_file import Config, config  # noqa: F401
from test_help import OPTIONS, options

from command_line import CALIBRATION, FIRST, Call

ROOT = Path(__file__).parents[2]

# Choices and the nearest of them


@pytest.mark.parametrize("command", OPTIONS)
def test_the_help_shows_the_values_of_every_choice(command: str, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # one line for each option
    shown = call(command, "--help").out
    for name, option in options(command).items():
        if option.show and (values := option.get_choices()):
            lines = [line for line in shown.splitlines() if not line.startswith("Usage")]
            line = next(line for line in lines if f" {name} " in line)
            assert f"[choices: {', '.join(values)}]" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--within", "sites"], '--within: got "sites", expected block or site. Did you mean "site"?'),
        (["--sampling", "dokument"], 'expected document or concat. Did you mean "document"?'),
        (["--sparsty", "1"], "Unknown option: --sparsty. Did you mean --sparsity?"),
        (["--batch-size", "1.5"], '--batch-size: got "1.5", expected a whole number.'),
        (["--alpha", "much"], '--alpha: got "much", expected a number.'),
        (["--only"], "--only needs a value."),
        (["other"], 'unexpected argument "other".'),
    ],
)
def test_mistakes_in_options_name_what_was_meant(call: Call, arguments: list[str], message: str) -> None:
    result = call("prune", "model", "-o", "out", *arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("Error: ")
    assert message in result.message


def test_the_last_value_counts(call: Call, model: Path) -> None:
    result = call("plan", model, "-m", "magnitude", "--sparsity", "0.9", "--sparsity", "0.25", "--json", "--json")
    assert result.json["plan"][FIRST]["sparsity"] == 0.25


# Nested YAML, and a pattern for each glob

DOWN = "model.layers.0.mlp.down_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def test_nested_options_and_patterns_in_a_file(call: Call, model: Path, config: Config, tmp_path: Path) -> None:
    file = config(
        'method: wanda+least_squares\npattern: {"*.down_proj": 4:8, "*": 0.25}\n'
        "option: {least-squares: {damping: 0.5}}\ncalibration: python-docs\nsampling: concat\nsamples: 4\nlength: 32\n"
    )
    result = call("prune", model, "-o", tmp_path / "out", "--config", file, "--json")
    assert result.code == 0, result.err
    assert result.json["plan"][DOWN] == {"n": 4, "m": 8}
    assert result.json["plan"][UP] == {"sparsity": 0.25, "per": "row"}
    assert result.json["settings"]["options"]["least_squares.damping"] == 0.5
    given = call("plan", model, "--config", file, "--pattern", "2:4", "--json")
    assert given.json["plan"][UP] == {"n": 2, "m": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('pattern: {"*.down": 4:8}\n', 'pattern "*.down" matches none of 21 matrices. Did you mean "*.down_proj"?'),
        ('pattern: {"*": 0.5, "*.mlp.*": 2:4}\n', 'pattern "*.mlp.*": earlier globs match all of its matrices. Put it'),
        ('pattern: {"*": half}\n', 'got "half"'),
        ('pattern: {"*": 2:4}\nsparsity: 0.5\n', "were both given"),
        ("within: {a: b}\n", '"within" holds keys and values, expected one text.'),
        ("within: sites\n", '--within: got "sites", expected block or site. Did you mean "site"?'),
        ("option: {damping: much}\nmethod: sparsegpt\n", '--option damping=much: got "much", expected a number.'),
    ],
)
def test_nested_values_that_cannot_be(call: Call, model: Path, config: Config, text: str, message: str) -> None:
    result = call("plan", model, "--config", config(text), *CALIBRATION)
    assert (result.code, result.out) == (2, "")
    assert message in result.message


# The settings


def test_the_table_of_options_is_that_of_the_code() -> None:
    from options_table import table

    assert (ROOT / "docs" / "options.md").read_text() == table()


def test_choices_without_torch_are_those_of_the_code() -> None:
    from secateur.calibration.text import Bos
    from secateur.pruning.settings import PruneSettings
    from secateur.runs.options import options as fields

    found = {field.name: field.choices for field in fields(PruneSettings)}
    assert found["bos"] == ("auto", *get_args(Bos))
    assert found["per"] == ("row", "matrix", "search")
    assert found["method"] == ()  # others are allowed beside
