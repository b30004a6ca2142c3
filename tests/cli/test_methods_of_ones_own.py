"""`--method module:function`, and the options that reach it."""

import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

from command_line import CALIBRATION, FIRST, Call
from secateur import cli
from secateur.errors import MethodError
from secateur.files.checkpoint import SINGLE_FILE
from secateur.methods import METHODS, REFINEMENTS
from secateur.pruning.settings import MethodName, RefinementName

ROOT = Path(__file__).parents[2]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current directory with a module of methods."""
    (tmp_path / "own_methods.py").write_text(
        "import secateur\n"
        "def largest(problem):\n"
        "    return -problem.weight.abs()\n"
        "value = secateur.select('keep-smallest', largest, needs=frozenset())\n"
        "def factory():\n"
        "    return secateur.select('made', largest, needs=frozenset())\n"
        "number = 3\n"
        "def powered(power=1, scale=1.0, word=None):\n"
        "    def score(problem):\n"
        "        return problem.weight.abs() ** power * scale\n"
        "    return secateur.select(f'powered-{power}-{scale}-{word}', score)\n"
        "def nothing():\n"
        "    return None\n"
        "def broken():\n"
        "    raise ValueError('my own fault')\n"
        "def hungry():\n"
        "    import torch\n"
        "    raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 1 GiB.')\n"
    )
    (tmp_path / "broken_module.py").write_text("x = 1\nvalue = (\n")
    (tmp_path / "missing_module.py").write_text("import numpyy\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    sys.modules.pop("own_methods", None)


@pytest.mark.parametrize(("attribute", "name"), [("value", "keep-smallest"), ("factory", "made")])
def test_a_method_of_ones_own(call: Call, model: Path, workplace: Path, attribute: str, name: str) -> None:
    result = call("prune", model, "-o", "out", "--method", f"own_methods:{attribute}", "--json")
    assert result.code == 0, result.err
    assert result.json["method"] == name
    dense, sparse = load_file(model / SINGLE_FILE)[FIRST], load_file(workplace / "out" / SINGLE_FILE)[FIRST]
    assert dense[sparse == 0].abs().min() > dense[sparse != 0].abs().median()


@pytest.mark.parametrize("home", ["own_methods", "./own_methods.py", "~/own_methods.py"])
def test_options_reach_a_method_of_ones_own(
    home: str, call: Call, model: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(workplace))
    options = ["--option", "power=0.3", "--option", "scale=2", "--option", "word=some"]
    result = call("prune", model, "-o", "out", "--method", f"{home}:powered+swaps", *options, *CALIBRATION, "--json")
    assert result.code == 0, result.err
    assert result.json["method"] == "powered-0.3-2.0-some+swaps"
    found = {key: value for key, value in result.json["settings"]["options"].items() if "." not in key}
    assert found == {"power": 0.3, "scale": 2.0, "word": "some"}


def test_a_method_of_ones_own_is_refined(call: Call, model: Path, workplace: Path) -> None:
    options = [*CALIBRATION, "--option", "least-squares.damping=0.5"]
    result = call("prune", model, "-o", "out", "--method", "own_methods:factory+least-squares", *options, "--json")
    assert result.code == 0, result.err
    assert result.json["method"] == "made+least_squares"
    manifest = json.loads((workplace / "out" / "secateur.json").read_text())
    assert manifest["settings"]["options"]["least_squares.damping"] == 0.5
    assert not any(entry["kept_identical"] for entry in manifest["matrices"].values())


@pytest.mark.parametrize(
    ("method", "option", "message"),
    [
        (
            "own_methods:factory",
            "damping=1",
            "--option damping=1: own_methods:factory has no option damping; it has none.",
        ),
        ("own_methods:factory+swaps", "limit=1", "factory has no option limit; it has none. Did you mean swaps.limit?"),
        ("own_methods:value", "power=1", "--option power=1: own_methods:value is a Method already, with its options."),
        ("own_methods:powered", "power=much", '--option power=much: got "much", expected a number.'),
        ("own_methods:powered", "powr=1", "own_methods:powered has no option powr; it has power, scale, word."),
        ("own_methods:factory+swaps", "swaps.limits=1", "--option swaps.limits=1: swaps has no option limits; it has"),
        ("own_methods:factory+swap", "swaps.limit=1", 'unknown refinement "swap". Did you mean "swaps"?'),
    ],
)
@pytest.mark.usefixtures("workplace")
def test_options_of_a_method_of_ones_own(call: Call, model: Path, method: str, option: str, message: str) -> None:
    result = call("prune", model, "-o", "out", "--method", method, "--option", option)
    assert (result.code, result.out) == (2, "")
    assert message in result.message


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("own_methodz:value", "--method own_methodz:value: No module named 'own_methodz'. Looked in "),
        (
            "own_methods:values",
            'has no "values". Did you mean "value"? It has largest, value, factory, powered',
        ),
        ("./own_method.py:value", "own_method.py is no Python file. Did you mean own_methods.py?"),
        ("./own_methods.py:values", 'the module ./own_methods.py has no "values". Did you mean "value"?'),
        ("no_such_module:value", "and on the Python path. There are broken_module, missing_module, own_methods."),
        ("broken_module:value", "the module broken_module cannot be imported: SyntaxError: "),
        ("./broken_module.py:value", "broken_module.py:2). --debug shows the traceback."),
        (
            "missing_module:value",
            "the module missing_module cannot be imported: ModuleNotFoundError: No module nam",
        ),
        ("missing_module:value", "missing_module.py:1, in <module>). --debug shows the traceback."),
        ("own_methods:number", "--method own_methods:number: got a int, expected a secateur.Method."),
        ("own_methods:nothing", "--method own_methods:nothing: got a NoneType, expected a secateur.Method."),
        ("own_methods:largest", "or a function without arguments that returns one, and this one cannot be called so"),
        ("own_methods:", 'unknown method "own_methods:".'),
        (":value", 'unknown method ":value".'),
    ],
)
def test_a_method_that_is_none(call: Call, model: Path, workplace: Path, method: str, message: str) -> None:
    result = call("prune", model, "-o", "out", "--method", method)
    assert (result.code, result.out) == (2, "")
    assert message in result.message
    assert not (workplace / "out").exists()


@pytest.mark.usefixtures("workplace")
def test_an_error_inside_a_method_of_ones_own_is_told_with_its_line(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["secateur", "plan", str(model), "--method", "own_methods:broken"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert re.fullmatch(
        r"Error: --method own_methods:broken failed: ValueError: my own fault \(\S+own_methods\.py:\d+, in broken\)\. "
        r"--debug shows the traceback\.\n",
        told,
    )
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--debug"])
    with pytest.raises(MethodError) as caught:
        cli.main()
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.usefixtures("workplace")
def test_too_little_memory_is_told_without_a_traceback(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    arguments = ["secateur", "plan", str(model), "--method", "own_methods:hungry"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    assert capsys.readouterr().err.startswith("Error: CUDA out of memory. What takes less: --batch-size 1, fewer")
    monkeypatch.setattr(sys, "argv", [*arguments, "--debug"])
    with pytest.raises(torch.OutOfMemoryError):
        cli.main()


def test_the_names_of_methods() -> None:
    assert tuple(METHODS) == get_args(MethodName)
    assert tuple(REFINEMENTS) == get_args(RefinementName)
    text = (ROOT / "docs" / "methods.md").read_text()
    table = text[text.index("| name |") : text.index("The weights with the lowest scores are removed.")]
    assert re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE) == list(METHODS)
    for name, make in METHODS.items():
        assert make().name == name


def test_the_options_of_methods_are_documented_with_their_defaults() -> None:
    text = (ROOT / "docs" / "methods.md").read_text()
    table = text[text.index("| option | of | default |") : text.index("`--option weighting=published`")]
    documented = {
        (option, owner): default
        for option, owners, default in re.findall(r"^\| `([^`]+)` \| (.+?) \| (.+?) \|", table, re.MULTILINE)
        for owner in re.findall(r"`([^`]+)`", owners)
    }
    found = {
        (option, owner): str(parameter.default).lower().removesuffix(".0").replace("1e-04", "0.0001")
        for owner, make in {**METHODS, **REFINEMENTS}.items()
        for option, parameter in inspect.signature(make).parameters.items()
        if option not in ("alpha", "norm")  # options of the command line itself
    }
    assert documented == found
