"""The public names, what importing them costs, and the tree of errors."""

import ast
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import secateur
from secateur import errors

TREE = {
    "ModelStructureError": ValueError,
    "PatternError": ValueError,
    "CalibrationError": ValueError,
    "MethodError": RuntimeError,
    "NumericalError": ArithmeticError,
    "CheckpointError": OSError,
    "ProcessError": RuntimeError,
}


def test_all_is_sorted_and_without_repetition() -> None:
    assert secateur.__all__ == sorted(set(secateur.__all__))


@pytest.mark.parametrize("name", secateur.__all__)
def test_every_public_name_resolves_to_a_documented_thing_of_that_name(name: str) -> None:
    value = getattr(secateur, name)
    assert value.__name__ == name
    assert value.__module__.split(".")[0] == "secateur"
    assert inspect.getdoc(value)


def test_the_names_for_type_checkers_are_the_names_loaded_on_demand() -> None:
    stub = ast.parse(Path(secateur.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imported = {
        alias.asname: (statement.module or "").removeprefix("secateur.")
        for statement in stub.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
        if alias.asname == alias.name  # without `as`, a stub keeps a name to itself
    }
    assert imported == secateur._HOMES


@pytest.mark.parametrize("module", sorted(set(secateur._HOMES.values())))
def test_every_home_is_a_module(module: str) -> None:
    assert importlib.import_module(f"secateur.{module}").__doc__


def test_no_public_name_is_also_a_module() -> None:
    # Importing secateur.x sets the attribute x of the package to the module, and the public x is gone.
    modules = {module.name for module in pkgutil.iter_modules(secateur.__path__)}
    assert modules.isdisjoint(secateur.__all__)


def test_dir_lists_the_public_names() -> None:
    assert set(dir(secateur)) == {*secateur.__all__, "__version__", "testing"}
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", secateur.__version__)


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match=r"^module 'secateur' has no attribute 'sparsify'$"):
        secateur.sparsify  # noqa: B018
    with pytest.raises(AttributeError, match=r"no attribute 'compare'; the command compare is secateur.agreement$"):
        secateur.compare  # noqa: B018
    for name in secateur._OF_COMMANDS.values():
        assert callable(getattr(secateur, name))


def test_windows_is_told_of_at_the_start() -> None:
    code = "import sys; sys.platform = 'win32'; import secateur"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1].startswith("ImportError: Secateur runs on Linux, and on other systems of the ")


def modules_after(code: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after some code."""
    script = (
        f"import json, sys\nbefore = set(sys.modules)\n{code}\nprint(json.dumps(sorted(set(sys.modules) - before)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return set(json.loads(result.stdout))


def test_importing_secateur_imports_nothing_heavy() -> None:
    loaded = modules_after(
        "import secateur; secateur.__all__; secateur.__version__; dir(secateur); import secateur.errors"
    )
    assert "secateur" in loaded
    roots = {name.split(".")[0] for name in loaded}
    assert roots.isdisjoint({"torch", "transformers", "numpy", "safetensors", "huggingface_hub", "cyclopts", "rich"})
    assert {name for name in loaded if name.startswith("secateur.")} == {"secateur.errors"}


def test_the_mathematics_imports_no_model_library() -> None:
    loaded = modules_after("import secateur.methods, secateur.plans.plan")
    assert "torch" in loaded
    roots = {name.split(".")[0] for name in loaded}
    assert roots.isdisjoint({"transformers", "safetensors", "huggingface_hub", "tokenizers", "accelerate"})


# Errors


def error_classes() -> dict[str, type]:
    return {
        name: kind for name, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__
    }


def test_the_tree_of_errors() -> None:
    classes = error_classes()
    root = classes.pop("SecateurError")
    assert root.__bases__ == (Exception,)
    assert {name: kind.__bases__ for name, kind in classes.items()} == {
        name: (root, base) for name, base in TREE.items()
    }


def test_the_tree_drawn_at_the_top_is_the_tree() -> None:
    lines = (errors.__doc__ or "").splitlines()
    root = lines.index("SecateurError")
    branches = [line for line in lines[root + 1 :] if line.startswith(" ")]
    drawn = [re.fullmatch(r" ([├└])─ (\w+) \((\w+)\) +(\S.*)", line) for line in branches]
    assert all(drawn), branches
    found = [match.groups()[:3] for match in drawn if match]
    assert [(name, base) for _, name, base in found] == [(name, base.__name__) for name, base in TREE.items()]
    assert "".join(corner for corner, _, _ in found) == "├" * (len(TREE) - 1) + "└"


@pytest.mark.parametrize("name", ["SecateurError", *TREE])
def test_errors_are_public_and_keep_their_message(name: str) -> None:
    kind = error_classes()[name]
    assert getattr(secateur, name) is kind
    with pytest.raises(secateur.SecateurError) as caught:
        raise kind("model.layers.0: what is")
    assert str(caught.value) == "model.layers.0: what is"
    assert isinstance(caught.value, TREE.get(name, Exception))
