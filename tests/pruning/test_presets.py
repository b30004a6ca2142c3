"""Presets are names for options, and nothing besides."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

import secateur
import tiny
from command_line import Call, call, model  # noqa: F401 - fixtures
from secateur.errors import PatternError
from secateur.pruning.presets import PRESETS, preset_options
from secateur.pruning.settings import PresetName
from secateur.record.manifest import read_manifest

CALIBRATION: dict[str, Any] = {"calibration": tiny.tokens(8), "batch_size": 4}


def test_the_names_of_settings_are_those_of_the_table() -> None:
    assert get_args(PresetName) == tuple(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("pattern", ["60%", "2:4"])
def test_a_preset_is_what_it_stands_for(tmp_path: Path, preset: str, pattern: str) -> None:
    source = tiny.save("llama", tmp_path / "model")
    options = preset_options({"preset": preset, "pattern": pattern})
    assert ("allocation" in options) == (pattern == "60%" and preset != "fast")
    short = secateur.prune(source, preset=preset, pattern=pattern, output=tmp_path / "short", **CALIBRATION)
    secateur.prune(source, pattern=pattern, output=tmp_path / "long", **options, **CALIBRATION)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("short", "long")]
    assert files[0] == files[1]
    assert read_manifest(tmp_path / "short").settings["preset"] == short.settings["preset"] == preset
    if preset != "best":
        assert secateur.verify(tmp_path / "short", source=source).ok  # kept weights are the source's


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "wanda"}, r"--method wanda: --preset best says alps\. Drop one of the two.* --targets residual"),
        ({"allocation": "owl"}, "--allocation owl: --preset best says sensitivity"),
        ({"per": "matrix"}, "--per matrix: --preset best says row"),
        ({"preset": "bset"}, 'got "bset", expected fast, exact or best. Did you mean "best"'),
    ],
)
def test_an_option_that_differs_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PatternError, match=message):
        secateur.prune(tiny.build("llama"), **{"preset": "best", **options}, **CALIBRATION)


def test_the_command_line_says_it_first(call: Call, model: Path, tmp_path: Path) -> None:  # noqa: F811
    calibration = ["--calibration", "python-docs", "--sampling", "concat", "--samples", "8", "--length", "32"]
    words = "--preset best is --method alps --per row --within site --targets residual --allocation sensitivity"
    planned = call("plan", model, "--preset", "best", *calibration)
    assert planned.code == 0, planned.err
    assert planned.err.startswith(words)
    assert "The plan of sensitivity is made first, in about" in planned.out
    pruned = call("prune", model, "-o", tmp_path / "out", "--preset", "best", "--within", "site", *calibration)
    assert pruned.code == 0, pruned.err
    assert pruned.err.startswith(words)
    refused = call("prune", model, "-o", tmp_path / "out2", "--preset", "best", "--method", "wanda", *calibration)
    assert refused.code == 2
    assert "--method wanda: --preset best says alps" in refused.err
