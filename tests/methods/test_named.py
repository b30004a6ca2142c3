"""Methods and patterns by name from Python, and what a method of one's own may do wrong."""
# ruff: noqa: E501 - one fault a line

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur
import tiny
from secateur.errors import MethodError, NumericalError, PatternError, SecateurError
from secateur.pruning.named import as_method, as_pattern

FIRST = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("named") / "model")


def test_names_stand_for_methods_and_patterns() -> None:
    assert as_method("wanda").name == as_method(secateur.wanda).name == as_method(secateur.wanda()).name == "wanda"
    assert as_method("wanda+least-squares").name == "wanda+least_squares"
    assert as_method(functools.partial(secateur.gblm, norm="l2")).options["norm"] == "l2"
    for value in (0.5, "0.5", "50%", " 50% ", secateur.Unstructured(0.5)):
        assert as_pattern(value) == secateur.Unstructured(0.5)
    assert as_pattern("2:4") == secateur.NM(2, 4)
    assert as_pattern(None) == secateur.Unstructured(0.5)
    assert as_pattern(0) == secateur.Unstructured(0.0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("wnada", 'unknown method "wnada". Did you mean "wanda"?'),
        (secateur.swaps, "method: swaps refines a method and is none: secateur.chain(secateur.wanda(), swaps())."),
        (secateur.swaps(), "method: swaps refines a method and is none"),
        (3, "method: got 3, expected a secateur.Method such as secateur.wanda(), or its name."),
        (None, "method: got None, expected"),
        (
            secateur.select,
            "method select: expected a secateur.Method, or a function without arguments that returns one",
        ),
        (lambda: 3, "method <lambda>: got a int, expected a secateur.Method."),
        (lambda: 1 // 0, "method <lambda> failed: ZeroDivisionError: integer division or modulo by zero ("),
    ],
)
def test_what_is_no_method(value: Any, message: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match=re.escape(message)):
        secateur.prune(model, method=value, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("half", 'pattern must be N:M, such as 2:4 (keep 2 of every 4), got "half"'),
        (50, "Did you mean 0.5?"),
        ("150%", "got 1.5"),
        (True, 'pattern: got True, expected a secateur.Unstructured or secateur.NM, or 0.5, "50%" or "2:4".'),
        ([0.5], "pattern: got [0.5], expected"),
        ("nan", "nan"),
    ],
)
def test_what_is_no_pattern(value: Any, message: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(PatternError, match=re.escape(message)):
        secateur.prune(model, method="magnitude", pattern=value, output=tmp_path / "out")


def test_the_same_run_by_name(model: Path, tmp_path: Path) -> None:
    ids = tiny.tokens(samples=4, length=12)
    secateur.prune(model, method="wanda+swaps", pattern="2:4", calibration=ids, output=tmp_path / "named")
    method = secateur.chain(secateur.wanda(), secateur.swaps())
    secateur.prune(model, method=method, pattern=secateur.NM(2, 4), calibration=ids, output=tmp_path / "made")
    named, made = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("named", "made"))
    assert named == made
    assert secateur.estimate(model, method=secateur.magnitude, pattern="50%").method == "magnitude"
    found = secateur.sweep(
        model, methods=["magnitude", secateur.wanda], patterns=[0.5, "2:4"], calibration=ids, output=tmp_path / "sweep",
        data=str(write_tokens(tmp_path)), dry_run=True,
    )  # fmt: skip
    assert [cell.name for cell in found.cells] == ["magnitude 50%", "magnitude 2:4", "wanda 50%", "wanda 2:4"]


def write_tokens(folder: Path) -> Path:
    from safetensors.torch import save_file

    save_file({"input_ids": tiny.tokens(samples=2, length=12)}, folder / "ids.safetensors")
    return folder / "ids.safetensors"


def test_the_signature_and_the_words_are_those_of_the_function() -> None:
    import inspect

    for function in (secateur.prune, secateur.sweep, secateur.estimate):
        assert "method" in str(inspect.signature(function))
        assert '"wanda+swaps"' in str(function.__doc__)
    parameters = inspect.signature(secateur.prune).parameters
    assert next(iter(parameters)) == "model"
    assert parameters["model"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    others = list(parameters.values())[1:]
    assert {parameter.kind for parameter in others} == {inspect.Parameter.KEYWORD_ONLY}
    assert {"pattern", "sparsity", "calibration", "tokenizer", "on_event", "statistics"} <= set(parameters)
    assert parameters["within"].default == "block"
    estimated = dict(inspect.signature(secateur.estimate).parameters)
    for name in ("processes", "bandwidth", "device_memory"):
        del estimated[name]
    assert estimated == parameters
    with pytest.raises(TypeError, match="sparsty"):
        secateur.prune("model", sparsty=0.5)  # type: ignore[call-arg]


def test_options_of_a_named_method(model: Path) -> None:
    damping = {"least_squares": {"damping": 0.25}}
    assert as_method("wanda+least_squares", damping).options["least_squares.damping"] == 0.25
    assert as_method("sparsegpt", ["damping=0.5"]).options["damping"] == 0.5
    with pytest.raises(PatternError, match=r"^norm: is for a method that is named; give it to the function that makes"):
        secateur.estimate(model, method=secateur.gblm(), norm="l2")
    with pytest.raises(PatternError, match=r"--sparsity 0.25 and --pattern 0.5 were both given"):
        as_pattern(0.5, 0.25)
    assert as_pattern(0.25, per="matrix") == as_pattern(None, 0.25, "matrix") == secateur.Unstructured(0.25, "matrix")
    with pytest.raises(PatternError, match="--per row has no meaning for --pattern 2:4: N:M compares within groups"):
        as_pattern("2:4", per="row")


def test_a_pattern_for_each_glob(model: Path) -> None:
    patterns = {"*.1.mlp.down_proj": secateur.NM(4, 8), "*.down_proj.weight": "2:4", "*.mlp.*": 0.25}
    plan = secateur.estimate(model, method="magnitude", pattern=patterns, skip="*.2.*").plan
    assert not any(".2." in name or "attn" in name for name in plan)  # what no glob matches stays dense
    found = {name.removeprefix("model.layers.").removesuffix(".weight"): str(own) for name, own in plan.items()}
    assert found["0.mlp.down_proj"] == "2:4"
    assert found["1.mlp.down_proj"] == "4:8"
    assert plan["model.layers.0.mlp.up_proj.weight"] == secateur.Unstructured(0.25, "matrix")
    for wrong, message in (
        ({"*.dwn_proj": 0.5}, 'pattern "*.dwn_proj" matches none of 21 matrices. Did you mean "*.down_proj"?'),
        ({"*": 0.5, "*.mlp.*": 0.25}, 'pattern "*.mlp.*": earlier globs match all of its matrices.'),
        ({"*": [0.5]}, "pattern: got [0.5], expected"),
        ({}, "nothing is left to prune: no glob of the pattern matches any of 21 matrices."),
    ):
        with pytest.raises(PatternError, match=re.escape(message)):
            secateur.estimate(model, method="magnitude", pattern=wrong)  # type: ignore[arg-type]


# What a method of one's own may do wrong


def scored(score: Callable[[secateur.Problem], Any]) -> secateur.Method:
    return secateur.select("mine", score)


def solved(solve: Callable[[secateur.Problem], Any]) -> secateur.Method:
    return secateur.Method("mine", solve)


def half(problem: secateur.Problem) -> torch.Tensor:
    return problem.pattern.mask(problem.weight.abs())


def nan_score(problem: secateur.Problem) -> torch.Tensor:
    return problem.weight.log()


def deep(problem: secateur.Problem) -> torch.Tensor:
    return torch.nn.functional.linear(problem.weight, problem.weight[:, :3])


HERE = re.escape(str(Path(__file__)))
FAULTS: dict[str, tuple[secateur.Method, type[SecateurError], str]] = {
    "raises": (scored(lambda problem: 1 // 0), MethodError, r"mine failed with ZeroDivisionError: .* \({here}:\d+, in <"),
    "raises in torch": (scored(deep), MethodError, r"mine failed with RuntimeError: .* \({here}:\d+, in deep\)\.$"),
    "missing need": (
        scored(lambda problem: problem.statistic(secateur.SquaredNorm).norm()),
        MethodError,
        r"mine failed with KeyError: {first}: SquaredNorm was not collected; list it in the needs .* \({here}:\d+, in",
    ),
    "missing gradient": (
        solved(lambda problem: problem.gradient_norm()),
        MethodError,
        r"KeyError: {first}: no gradients were collected; list a GradientKind .* \({here}:\d+, in <lambda>\)",
    ),
    "no score": (scored(lambda problem: None), MethodError, r"mine returned a NoneType as its scores, .* in {here}:\d+\.$"),
    "score of a row": (
        scored(lambda problem: problem.weight[0]),
        MethodError,
        r"mine returned torch.float32 scores of shape \(32,\) on cpu, expected real ones of \(32, 32\) on .* in {here}:\d+\.$",
    ),
    "complex score": (scored(lambda problem: problem.weight * 1j), MethodError, r"mine returned torch.complex64 scores"),
    "score elsewhere": (
        scored(lambda problem: problem.weight.to("meta")), MethodError, r"on meta, expected real ones of .* on cpu"
    ),
    "NaN score": (scored(nan_score), NumericalError, r"\d+ of 1024 mine scores are not finite .* in {here}:\d+\.$"),
    "nothing": (solved(lambda problem: None), MethodError, r"mine returned a NoneType, expected a secateur.Solution. It is"),
    "a tensor": (solved(lambda problem: problem.weight), MethodError, r"mine returned a Tensor, expected a secateur.Solution"),
    "no mask": (
        solved(lambda problem: secateur.Solution(problem.weight, None)),  # type: ignore[arg-type]
        MethodError,
        r"mine returned a mask that is a NoneType, expected a tensor on cpu\. It is made in {here}:\d+\.$",
    ),
    "weight elsewhere": (
        solved(lambda problem: secateur.Solution(problem.weight.to("meta"), half(problem))),
        MethodError,
        r"mine returned a weight on meta, expected a tensor on cpu",
    ),
    "wrong dtype": (
        solved(lambda problem: secateur.Solution((problem.weight * half(problem)).double(), half(problem))),
        PatternError,
        r"mine returned a torch.float64 weight of shape",
    ),
    "wrong shape": (
        solved(lambda problem: secateur.Solution(problem.weight[:1], half(problem))), PatternError, r"of shape \(1, 32\)"
    ),
    "NaN weight": (
        solved(lambda problem: secateur.Solution(problem.weight.log(), half(problem))), NumericalError, "NaN or infinite"
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_error_with_matrix_method_and_line(fault: str, model: Path, tmp_path: Path) -> None:
    method, kind, message = FAULTS[fault]
    expected = f"^{re.escape(FIRST)}: .*{message.replace('{here}', HERE).replace('{first}', re.escape(FIRST))}"
    with pytest.raises(kind, match=expected):
        secateur.prune(model, method=method, pattern=0.5, only=["*.0.self_attn.q_proj*"], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_error_of_ours_inside_ones_own_method_stays_what_it_is(model: Path, tmp_path: Path) -> None:
    def score(problem: secateur.Problem) -> torch.Tensor:
        raise PatternError("as I say")

    with pytest.raises(PatternError, match=r"^as I say$"):
        secateur.prune(model, method=scored(score), output=tmp_path / "out")


def test_the_manifest_names_what_a_method_depends_on(model: Path, tmp_path: Path) -> None:
    power = 0.25
    secateur.prune(model, method=scored(lambda problem: problem.weight.abs() ** power), output=tmp_path / "out")
    found = json.loads((tmp_path / "out" / "secateur.json").read_text())["settings"]["fingerprint"]
    assert [value for name, value in found.items() if name.startswith("power in")] == ["0.25"]
