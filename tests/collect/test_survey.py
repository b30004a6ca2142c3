"""Surveys of the dense model's inputs, bit for bit as a run would take them; and needs of one's own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import secateur
import tiny
from counted_forwards import counted
from secateur.calibration.drawing import calibration_windows
from secateur.collect.survey import Survey, survey
from secateur.core.gram import Gram
from secateur.core.problem import Refinement
from secateur.core.statistics import SquaredNorm
from secateur.errors import CalibrationError
from secateur.models.opening.opened import open_model
from secateur.pruning.engine import prune

KINDS = frozenset({Gram, SquaredNorm})


def taken(source: Path, folder: Path | None, **options: Any) -> Survey:
    opened = open_model(source)
    windows = calibration_windows(tiny.tokens(samples=8, length=12), None)
    return survey(opened, windows, KINDS, folder=folder, batch_size=2, **options)


def pruned(source: Path, out: Path, shared: Survey | None) -> secateur.Manifest:
    ids = tiny.tokens(samples=8, length=12)
    options: dict[str, Any] = {"calibration": ids, "batch_size": 2, "propagate": "dense", "statistics": shared}
    return prune(source, method=secateur.sparsegpt(), output=out, **options)


# Single and fused experts, experts of a tensor that is split while it is loaded, and blocks that are not attention.
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "qwen2_moe", "falcon_h1", "mamba"])
def test_a_survey_holds_what_a_run_leaves_and_takes_its_place(name: str, tmp_path: Path) -> None:
    source = tiny.save(name, tmp_path / "source")
    left = Survey(tmp_path / "left", KINDS)
    with counted(name) as forwards:
        expected = pruned(source, tmp_path / "first", left)
    once = len(forwards)
    for folder in (None, tmp_path / "own"):
        found = taken(source, folder)
        assert found.facts == left.facts
        for matrix in expected.matrices:
            one, other = found.of(matrix), left.of(matrix)
            assert one.keys() == other.keys() == KINDS
            for kind in KINDS:
                mine: Any = one[kind]
                theirs: Any = other[kind]
                assert torch.equal(mine.total, theirs.total)
                assert (mine.tokens, mine.samples) == (theirs.tokens, theirs.samples)
        with counted(name) as forwards:
            again = pruned(source, tmp_path / f"from-{folder is None}", found)
        assert again.tensors == expected.tensors
        assert len(forwards) < once
        found.close()
    assert not (tmp_path / "own").exists()


@torch.no_grad()
def test_statistics_are_those_of_the_inputs_that_transformers_computes(tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(source)
    seen: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in path:
            module.register_forward_pre_hook(lambda _, args, name=path: seen.update({name: args[0].flatten(0, 1)}))
    model(tiny.tokens(samples=8, length=12))
    found = taken(source, None)
    assert seen
    for path, x in seen.items():
        statistics: Any = found.of(f"{path}.weight")
        gram = x.double().T @ x.double()
        torch.testing.assert_close(statistics[Gram].total.double(), gram, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(statistics[SquaredNorm].total, gram.diagonal(), rtol=1e-5, atol=1e-5)
        assert (statistics[Gram].tokens, statistics[Gram].samples) == (96, 8)


def test_what_a_survey_does_not_hold(tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "source")
    opened = open_model(source)
    some = [matrix for matrix in opened.skeleton.matrices if matrix.block < 2]
    with counted("llama") as forwards:
        found = taken(source, None, matrices=some)
    assert len(forwards) == 2 * 4 + 1  # two blocks, four batches, and two tokens once to learn what a block returns
    assert found.of(some[0].name).keys() == KINDS
    name = opened.skeleton.matrices[-1].name
    with pytest.raises(CalibrationError, match=f"^{name}: is not in the survey, which holds {len(some)} matrices.$"):
        found.of(name)
    with pytest.raises(CalibrationError, match="holds 0 matrices and is not complete"):
        Survey(None, KINDS).of(name)


def test_the_statistic_in_the_documentation(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    names: dict[str, Any] = {}
    exec(re.findall(r"^```python\n(.*?)^```$", text[text.index("## Statistics") :], re.M | re.S)[0], names)
    kind = names["LargestInput"]
    assert isinstance(kind.empty(3), secateur.Statistic)
    found: dict[str, Tensor] = {}

    def score(problem: secateur.Problem) -> Tensor:
        found[problem.name] = problem.statistic(kind).largest
        return problem.weight.abs() * found[problem.name]

    source, ids = tiny.save("llama", tmp_path / "source"), tiny.tokens(samples=8, length=12)
    method = secateur.select("largest", score, needs=frozenset({kind}))
    prune(source, method=method, calibration=ids, only=["*.0.*.q_proj"], output=tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(source)
    layer = model.model.layers[0]
    with torch.no_grad():
        inputs = layer.input_layernorm(model.model.embed_tokens(ids)).flatten(0, 1)
    torch.testing.assert_close(*found.values(), inputs.abs().amax(dim=0))
    assert secateur.estimate(source, method=method, calibration=ids).host_bytes > 0


def test_a_need_that_nothing_collects_is_named(tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "source")
    method = secateur.select("odd", lambda problem: problem.weight.abs(), needs=frozenset({"activations"}))
    with pytest.raises(secateur.MethodError, match=r"^needs: nothing collects 'activations'; expected a class"):
        prune(source, method=method, calibration=tiny.tokens(), output=tmp_path / "out")
    further = Refinement("further", lambda problem, solution: solution, frozenset({secateur.GradientKind("l2")}))
    with pytest.raises(secateur.MethodError, match=r"^needs: got gradients of 2 kinds \(l1 per sample, model; l2 per"):
        secateur.chain(secateur.gblm(), further)
