"""Small sweeps, finished ones, and their settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import secateur
import tiny

HALF, MORE, TWO_OF_FOUR = secateur.Unstructured(0.5), secateur.Unstructured(0.6), secateur.NM(2, 4)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and token ids to calibrate and to evaluate on."""
    folder = tmp_path_factory.mktemp("sweep")
    tiny.save("llama", folder / "model")
    for name, samples, seed in (("calibration", 6, 1), ("one", 5, 2), ("two", 4, 3)):
        save_file({"input_ids": tiny.tokens(samples, 16, seed)}, folder / f"{name}.safetensors")
    return folder


Run = Callable[..., secateur.Sweep]


@pytest.fixture
def run(place: Path, tmp_path: Path) -> Run:
    """`run(...)`: a sweep of the tiny model into `tmp_path / "out"`."""

    def start(**options: Any) -> secateur.Sweep:
        defaults: dict[str, Any] = {
            "methods": [secateur.magnitude(), secateur.wanda()],
            "patterns": [HALF, TWO_OF_FOUR],
            "calibration": str(place / "calibration.safetensors"),
            "data": str(place / "one.safetensors"),
            "output": tmp_path / "out",
            "batch_size": 2,
        }
        return secateur.sweep(options.pop("model", place / "model"), **defaults | options)

    return start


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


METHODS = {
    "magnitude": secateur.magnitude(),
    "wanda": secateur.wanda(),
    "gblm": secateur.gblm(),
    "l2": secateur.gblm(norm="l2"),
    "wanda_plus": secateur.wanda_plus(),
    "sparsegpt": secateur.sparsegpt(),
    "wanda+least_squares": secateur.chain(secateur.wanda(), secateur.least_squares()),
    "published": secateur.wanda(weighting="published"),
}


@pytest.fixture(scope="module")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small sweep that is finished; nobody changes it."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    secateur.sweep(
        place / "model",
        methods=[secateur.wanda()],
        calibration=str(place / "calibration.safetensors"),
        data=str(place / "one.safetensors"),
        batch_size=2,
        output=folder,
    )
    return folder
