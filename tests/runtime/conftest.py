"""The kernel, compiled from the sources beside these tests, and each of its paths."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from command_line import call, model  # noqa: F401 - pytest finds them by name
from made_once import made_once
from secateur.runtime import library
from secateur.runtime.library import PathName

NATIVE = Path(__file__).parents[2] / "native"
EMULATED = Path(__file__).parent / "emulated"
SANITIZED = os.environ.get("SECATEUR_KERNEL_LIBRARY")  # before the fixtures set it


def build_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("native_build", NATIVE / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library for this processor. SECATEUR_KERNEL_LIBRARY names one that was built with sanitizers."""
    if SANITIZED:
        return Path(SANITIZED)
    folder = made_once(tmp_path_factory, "kernel", build_script().build)
    if not (folder / build_script().LIBRARY).exists():
        pytest.skip("there is no C compiler")
    return folder / build_script().LIBRARY


@pytest.fixture(scope="session")
def compiled_emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with the instructions of AVX-512 and AMX replaced by C."""
    script = build_script()

    def build(folder: Path) -> None:
        paths = script.build(folder, script.SANITIZERS if SANITIZED else (), emulated=EMULATED)
        if paths is not None and "avx512" not in paths:
            (folder / script.LIBRARY).unlink()

    folder = made_once(tmp_path_factory, "emulated", build)
    if not (folder / script.LIBRARY).exists():
        pytest.skip("there is no C compiler for x86")
    return folder / script.LIBRARY


@pytest.fixture(autouse=True)
def _kernel(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SECATEUR_KERNEL_LIBRARY", str(compiled))
    monkeypatch.delenv("SECATEUR_KERNEL", raising=False)
    library.found.cache_clear()
    yield
    library.found.cache_clear()


@pytest.fixture(params=["torch", "plain", "avx2", "avx512", "amx"])
def path(request: pytest.FixtureRequest, _kernel: None, monkeypatch: pytest.MonkeyPatch) -> PathName:
    """Each path, forced: on this processor's instructions, or on emulated ones."""
    name: PathName = request.param
    if library.available()[name]:
        if name not in ("avx512", "amx"):
            pytest.skip(f"{name}: {library.available()[name]}")
        monkeypatch.setenv("SECATEUR_KERNEL_LIBRARY", str(request.getfixturevalue("compiled_emulated")))
        library.found.cache_clear()
        if library.available()[name]:
            pytest.skip(f"{name}: {library.available()[name]}")
    monkeypatch.setenv("SECATEUR_KERNEL", name)
    assert library.chosen() == name
    return name
