"""Methods with refinements by name, and their options as text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny
from secateur.core.gram import Gram
from secateur.core.harmonic import HarmonicNorm
from secateur.core.patterns import Pattern, Unstructured
from secateur.core.problem import Refinement, chain, with_options
from secateur.errors import CalibrationError, PatternError
from secateur.methods import METHODS
from secateur.methods.least_squares import least_squares
from secateur.methods.sparsegpt import sparsegpt
from secateur.pruning.engine import prune
from secateur.pruning.named import method_of
from second_order import CHAINS, calibration, every_pattern, inputs, load

# Chains by name


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_by_name(name: str) -> None:
    first = METHODS[name.split("+")[0]]()
    method = method_of(name)
    assert method.name == method_of(name.replace("_", "-")).name == name
    assert method.needs == first.needs | {Gram}
    assert (method.per, method.gradient) == (first.per, first.gradient)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "wanda+least-square",
            'unknown refinement "least_square". Did you mean "least_squares"? Known: least_squares, obs_update, swaps.',
        ),
        ("wanda+wanda", 'unknown refinement "wanda". Known: least_squares, obs_update, swaps.'),
        ("wanda+", 'unknown refinement "". Known: least_squares, obs_update, swaps.'),
        ("wanda+swaps+swap", 'unknown refinement "swap". Did you mean "swaps"? Known: '),
        ("least_squares", 'unknown method "least_squares". Known: magnitude, wanda, '),
        ("+swaps", 'unknown method "". Known: magnitude, wanda, '),
    ],
)
def test_a_chain_of_unknown_parts(name: str, message: str) -> None:
    with pytest.raises(PatternError) as told:
        method_of(name)
    assert str(told.value).startswith(message)


def test_options_of_a_chain_are_those_of_its_method() -> None:
    method = method_of("gblm+least_squares", norm="l2", alpha=3.0, nothing=None)
    assert {"norm": "l2", "alpha": 3.0}.items() <= method.options.items()
    assert method.gradient is not None
    assert method.gradient.norm == "l2"
    with pytest.raises(PatternError, match=r"^--alpha: the method wanda has no such option; gblm"):
        method_of("wanda+least_squares", alpha=3.0)


def test_options_are_in_the_manifest() -> None:
    fitted: Refinement = with_options(least_squares)(damping=0.1, iterations=5)
    method = chain(with_options(sparsegpt)(damping=0.02), fitted)
    manifest = prune(tiny.build("llama"), method=method, calibration=calibration())
    assert manifest.settings["options"] == method.options
    assert {
        "damping": 0.02,
        "least_squares.damping": 0.1,
        "least_squares.iterations": 5,
        "least_squares.exact": False,
    }.items() <= manifest.settings["options"].items()
    assert manifest.method == "sparsegpt+least_squares"
    for entry in manifest.matrices.values():
        assert (entry["notes"]["damping"], entry["notes"]["least_squares_damping"]) == (0.02, 0.1)
        assert entry["notes"]["least_squares_iterations"] <= 5


def test_refinements_come_in_the_order_of_their_names() -> None:
    """Swaps give the dense weights back, and least squares fits them: the last one decides."""
    manifests, states = {}, {}
    for name in ("ria+swaps", "ria+swaps+least_squares", "ria+least_squares+swaps"):
        model = tiny.build("llama", dtype=torch.float64)
        manifests[name] = prune(model, method=method_of(name), calibration=calibration(), only=["model.layers.0.*"])
        states[name] = model.state_dict()
        identical = {entry["kept_identical"] for entry in manifests[name].matrices.values()}
        assert identical == {name.endswith("swaps")}
    for name, entry in manifests["ria+swaps+least_squares"].matrices.items():
        swapped, fitted, back = (state[name] for state in states.values())
        assert torch.equal(swapped != 0, fitted != 0)
        assert torch.equal(swapped, back)
        notes, other = entry["notes"], manifests["ria+swaps"].matrices[name]["notes"]
        assert notes["swaps"] == other["swaps"]
        assert notes["reconstruction_error"] < other["reconstruction_error"]


@every_pattern
def test_least_squares_keeps_the_mask(pattern: Pattern) -> None:
    """In the first block, which both runs see alike; behind it the inputs are others."""
    plain, fitted = tiny.build("llama"), tiny.build("llama")
    for model, name in ((plain, "wanda"), (fitted, "wanda+least_squares")):
        names = prune(model, method=method_of(name), pattern=pattern, calibration=calibration()).matrices
    one, two = plain.state_dict(), fitted.state_dict()
    same = {name for name in names if torch.equal(one[name] != 0, two[name] != 0)}
    assert {name for name in names if ".layers.0." in name} <= same
    assert same != set(names)
    assert not any(torch.equal(one[name], two[name]) for name in names)


# Options by name, and the weighting of the published ablations


def test_options_as_text() -> None:
    method = method_of("alps+least-squares", ["damping=0.05", "iterations=12", "least_squares.exact=true"])
    assert method.options["damping"] == 0.05
    assert method.options["iterations"] == 12
    assert method.options["least_squares.exact"] is True
    assert method.options["least_squares.iterations"] == 32
    assert method_of("gblm", ["norm=l2"], alpha=3.0).options == {"norm": "l2", "alpha": 3.0}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("damping", '--option damping: expected NAME=VALUE, such as "damping=0.02".'),
        ("damping=much", '--option damping=much: got "much", expected a number.'),
        ("iterations=1.5", '--option iterations=1.5: got "1.5", expected a whole number.'),
        ("least_squares.exact=1", '--option least_squares.exact=1: got "1", expected true or false.'),
        ("swaps.limit=3", "--option swaps.limit=3: swaps is no part of admm+least_squares."),
        (
            "exact=true",
            "--option exact=true: admm has no option exact; it has damping, penalty, iterations, growing. "
            "Did you mean least_squares.exact?",
        ),
    ],
)
def test_options_that_are_none(setting: str, message: str) -> None:
    with pytest.raises(PatternError, match=f"^{re.escape(message)}$"):
        method_of("admm+least_squares", [setting])


def test_the_weighting_of_the_published_ablations(tmp_path: Path) -> None:
    """Each sample's squares are scaled by 2 / j and averaged, as the published loop does, one sample at a time."""
    source = tiny.save("llama", tmp_path / "source")
    ids = calibration()
    name = "model.layers.0.mlp.down_proj.weight"
    path = name.removesuffix(".weight")
    scaler = torch.zeros(1, dtype=torch.float64)
    for number, sample in enumerate(ids, 1):
        x = inputs(load(source), [path], sample[None])[path].double()
        scaled = x.T * (2 / number) ** 0.5
        scaler = scaler * (number - 1) / number + scaled.norm(dim=1) ** 2 / number
    score = load_file(source / "model.safetensors")[name].double().abs() * scaler.sqrt()
    expected = Unstructured(0.5, "row").mask(score)
    method = method_of("wanda", ["weighting=published"])
    prune(source, method=method, calibration=ids, output=tmp_path / "out", only=[name])
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name] != 0, expected)
    prune(source, method=method_of("wanda"), calibration=ids, output=tmp_path / "equal", only=[name])
    assert not torch.equal(load_file(tmp_path / "equal" / "model.safetensors")[name] != 0, expected)
    with pytest.raises(CalibrationError, match=r"^--batch-size: got 2, expected 1: HarmonicNorm goes by samples\.$"):
        prune(source, method=method, calibration=ids, output=tmp_path / "no", batch_size=2)
    assert method_of("wanda_iterative", ["weighting=published"]).needs == {Gram, HarmonicNorm}
    with pytest.raises(PatternError, match='weighting: got "other", expected equal or published'):
        method_of("wanda", ["weighting=other"])
