"""Plans that a run makes first, or is given: the same zeros, judged by transformers' own losses, and resumed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import secateur
import tiny
from command_line import Call, call, model  # noqa: F401 - fixtures
from secateur.errors import CalibrationError, CheckpointError, PatternError
from secateur.plans.allocated import read_plan
from secateur.runs.events import Event

CALIBRATION: dict[str, Any] = {"calibration": tiny.tokens(16), "batch_size": 4}
ALLOCATION: dict[str, Any] = {"allocation": "dlp", "unit": "matrix", "sparsity": 0.6}


def zeros(folder: Path) -> int:
    return sum(int((value == 0).sum()) for value in secateur.load(folder).state_dict().values() if value.ndim == 2)


@pytest.mark.parametrize("allocation", ["owl", "alpha", "sensitivity"])
def test_a_plan_made_before_is_the_plan_that_a_run_makes(tmp_path: Path, allocation: str) -> None:
    source = tiny.save("llama", tmp_path / "model")
    asked = {"allocation": allocation, "sparsity": 0.6}
    made = secateur.allocate(source, output=tmp_path / "plan.json", **asked, **CALIBRATION)
    secateur.prune(source, method="wanda", plan=tmp_path / "plan.json", output=tmp_path / "given", **CALIBRATION)
    told = secateur.prune(source, method="wanda", output=tmp_path / "made", **asked, **CALIBRATION)
    secateur.prune(source, method="wanda", sparsity=0.6, output=tmp_path / "even", **CALIBRATION)
    for name in ("given", "made", "even"):
        assert secateur.verify(tmp_path / name).ok
    same = (tmp_path / "given" / "model.safetensors").read_bytes()
    assert same == (tmp_path / "made" / "model.safetensors").read_bytes()
    assert told.settings["allocation"] == made.record == read_plan(tmp_path / "plan.json").record
    assert zeros(tmp_path / "made") == zeros(tmp_path / "even")


@pytest.mark.parametrize(
    ("pattern", "used"), [(secateur.Unstructured(0.7, "matrix"), True), (secateur.NM(4, 8), False)]
)
def test_held_out_losses_are_those_of_transformers(tmp_path: Path, pattern: secateur.Pattern, used: bool) -> None:
    module = tiny.build("llama")
    ids = CALIBRATION["calibration"]
    held_out = ids[14:]  # one of eight
    before = {name: value.clone() for name, value in module.state_dict().items()}
    asked = {"allocation": "dlp", "unit": "matrix", "allocation_option": ["width=0.4"], "pattern": pattern}
    found = secateur.allocate(module, output=tmp_path / "plan.json", overwrite=True, **asked, **CALIBRATION).record
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())

    norms = input_norms(module, ids[:14])
    layers = {f"{name}.weight": layer for name, layer in module.named_modules() if f"{name}.weight" in norms}
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    plans = {"uniform": secateur.uniform(shapes, pattern)}
    if found["used"]:  # otherwise the file holds the uniform one
        plans["plan"] = read_plan(tmp_path / "plan.json").plan
    for judged, plan in plans.items():
        module.load_state_dict(before)
        for name, layer in layers.items():
            mask = plan[name].mask(layer.weight.detach().abs() * norms[name].sqrt())
            layer.weight.data.mul_(mask)
        with torch.no_grad():
            logits = module(input_ids=held_out).logits
        loss = float(cross_entropy(logits[:, :-1].flatten(0, 1), held_out[:, 1:].flatten()))
        assert found["held_out"][judged] == pytest.approx(loss, abs=1e-5)
    assert found["used"] == (found["held_out"]["plan"] < found["held_out"]["uniform"])
    assert found["used"] is used


def input_norms(module: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums of squares of the inputs of every linear layer of the blocks, by hooks."""
    found: dict[str, torch.Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, given, name=name: found.__setitem__(f"{name}.weight", given[0].square().sum(dim=(0, 1)))
        )
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and "layers." in name
    ]
    with torch.no_grad():
        module(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return found


def test_a_run_that_is_resumed_keeps_its_plan(tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "model")
    asked: dict[str, Any] = {"method": "wanda", **ALLOCATION, **CALIBRATION}
    secateur.prune(source, output=tmp_path / "whole", **asked)

    class PowerCutError(Exception):
        """Not an error of ours: whatever ends a run."""

    for stage, block in (("record", 0), ("read", 1)):  # right after the plan, and after a block

        def cut(event: Event, stage: str = stage, block: int = block) -> None:
            if event.stage == stage and event.block == block:
                raise PowerCutError

        with pytest.raises(PowerCutError):
            secateur.prune(source, output=tmp_path / "out", resume=True, on_event=cut, **asked)
        with pytest.raises(CheckpointError, match=r"the plan of an unfinished run|1 of 3 blocks of an unfinished run"):
            secateur.prune(source, output=tmp_path / "out", **asked)
    with pytest.raises(CheckpointError, match="the unfinished run differs from this one: allocation no longer has dlp"):
        secateur.prune(source, output=tmp_path / "out", resume=True, **asked | {"allocation": "owl"})
    seen: list[str] = []
    secateur.prune(
        source, output=tmp_path / "out", resume=True, on_event=lambda event: seen.append(event.stage), **asked
    )
    assert not [stage for stage in seen if stage.startswith("allocation")]
    whole, resumed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert whole == resumed


def test_the_command_line(call: Call, model: Path, tmp_path: Path) -> None:  # noqa: F811
    calibration = ["--calibration", "python-docs", "--sampling", "concat", "--samples", "8", "--length", "32"]
    plan = tmp_path / "plan.json"
    result = call("allocate", model, "-o", plan, "--allocation", "sensitivity", "-s", "0.5", *calibration)
    assert result.code == 0, result.err
    assert "Plan by sensitivity" in result.out
    assert "nats per token beside a uniform plan on 1 held-out window, both pruned by Wanda." in result.out
    judged = json.loads(plan.read_text())["allocation"]
    assert judged["bounds"][0] < 0.5 < judged["bounds"][1]
    assert math.isfinite(judged["held_out"]["difference"])
    assert call("prune", model, "-o", tmp_path / "out", "--plan", plan, *calibration).code == 0
    told = call("plan", model, "--plan", plan, *calibration)
    assert told.code == 0
    report = call("report", tmp_path / "out")
    assert report.code == 0, report.err
    page = (tmp_path / "out" / "report" / "index.html").read_text()
    assert "Zeros were divided by sensitivity, by matrix" in page
    assert "Zeros were divided by sensitivity, by matrix" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"allocation": "owls"}, '--allocation: got "owls".*Did you mean "owl"'),
        ({"allocation": "uniform"}, "--allocation: nothing to make; choose owl, dlp, alpha or sensitivity"),
        ({"allocation_option": ["breadth=2"]}, "--allocation-option"),
        ({"sparsity": None, "pattern": {"*": 0.5}}, "divides the zeros of one pattern, and a pattern for each glob"),
        ({"per": "search"}, "an allocation divides weights by number"),
    ],
)
def test_what_cannot_be_divided(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(PatternError, match=message):
        secateur.allocate(tiny.build("llama"), output=tmp_path / "plan.json", **ALLOCATION | CALIBRATION | change)
    assert list(tmp_path.iterdir()) == []


def test_what_else_is_refused(tmp_path: Path) -> None:
    module, plan = tiny.build("llama"), tmp_path / "plan.json"
    asked = ALLOCATION | CALIBRATION
    with pytest.raises(CalibrationError, match="got 1 calibration sample, expected at least 2"):
        secateur.allocate(module, output=plan, **asked | {"calibration": tiny.tokens(1)})
    with pytest.raises(PatternError, match="--unit: is for an allocation, and --allocation is uniform"):
        secateur.prune(module, unit="block", **CALIBRATION)
    secateur.allocate(module, output=plan, **asked)
    with pytest.raises(CheckpointError, match="exists already"):
        secateur.allocate(module, output=plan, **asked)
    for option, value in (("sparsity", 0.5), ("allocation", "owl"), ("per", "row"), ("skip", ["*.up_proj*"])):
        with pytest.raises(PatternError, match=rf"--{option} .*--plan says already which matrix loses how many"):
            secateur.prune(module, plan=plan, **{option: value}, **CALIBRATION)
    with pytest.raises(PatternError, match=r"model\.layers"):
        secateur.prune(tiny.build("gpt2"), plan=plan, **CALIBRATION)
    for text, message in (("[]", "expected the plan"), ('{"format": 9, "plan": {}}', "has the format 9, expected 1")):
        plan.write_text(text)
        with pytest.raises(PatternError, match=message):
            secateur.prune(module, plan=plan, **CALIBRATION)
