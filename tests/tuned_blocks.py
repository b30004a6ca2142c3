"""Pruned checkpoints and the options with which tests tune their blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import secateur
import tiny
from pruned_blocks import pruned_model
from pruned_checkpoints import bits, masks, read_tensors, same_bytes
from secateur.models.opening.opened import open_source
from secateur.record.manifest import Manifest, read_manifest
from secateur.recover.block import reconstruct

SAMPLES, HELD_OUT = 16, 4
OPTIONS: dict[str, Any] = {"epochs": 2, "step": 4, "learning_rate": 0.01, "held_out": HELD_OUT / SAMPLES}


def samples() -> Tensor:
    return tiny.tokens(samples=SAMPLES, length=24, seed=1)


def tuned(pruned: Path, **changes: Any) -> Manifest:
    return reconstruct(pruned, output=pruned.parent / "tuned", **OPTIONS | {"calibration": samples()} | changes)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pruned_model("llama", tmp_path_factory.mktemp("llama"))


def run(pruned: Path, folder: Path, **changes: Any) -> dict[str, Tensor]:
    reconstruct(pruned, output=folder, **OPTIONS | {"calibration": samples()} | changes)
    return read_tensors(folder)


def losses(manifest: Manifest) -> list[tuple[float, float]]:
    assert manifest.recovery is not None
    return [(record["before"], record["after"]) for record in manifest.recovery["blocks"]]


def assert_only_tuned(folder: Path, only: set[str] | None = None) -> None:
    """Zeros are where they were and nowhere else; all other tensors (than `only`) are byte-identical; verify agrees."""
    before, after = read_manifest(folder / "pruned"), read_manifest(folder / "tuned")
    first, second = masks(folder / "pruned", before), masks(folder / "tuned", after)
    assert first.keys() == second.keys()
    for name, mask in first.items():
        assert torch.equal(mask, second[name]), name
        assert after.matrices[name]["zeros"] == before.matrices[name]["zeros"]
    planned = {entry["tensor"] for entry in before.matrices.values()} if only is None else only
    old, new = read_tensors(folder / "pruned"), read_tensors(folder / "tuned")
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        assert name in planned or same_bytes(tensor, new[name]), name
        # What is removed is +0.0, to the bit.
        assert torch.equal(bits(tensor) == 0, bits(new[name]) == 0), name
    for source in ("dense", "pruned"):
        assert secateur.verify(folder / "tuned", open_source(str(folder / source))).problems == []


def assert_refused(
    error: type[BaseException], message: str, pruned: Path, folder: Path, *, kept: bool = False, **changes: Any
) -> None:
    """The run ends with that, and leaves nothing, or with `kept` the finished blocks alone."""
    before = set(folder.iterdir())
    with pytest.raises(error, match=message):
        run(pruned, folder / "out", **changes)
    assert set(folder.iterdir()) == before | ({folder / "out.partial"} if kept else set())
