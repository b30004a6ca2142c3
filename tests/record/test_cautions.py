"""What a reader of a manifest is warned of."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

import tiny
from secateur.methods.sparsegpt import sparsegpt
from secateur.methods.wanda import wanda
from secateur.pruning.engine import prune
from secateur.pruning.named import method_of
from secateur.record.manifest import cautions
from secateur.report import checkpoint_page
from secateur.report.terminal import manifest_tables
from second_order import calibration


@pytest.mark.parametrize("name", ["sparsegpt", "wanda+least_squares", "magnitude+obs_update"])
def test_more_damping_than_asked_for_is_said_everywhere(name: str, tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "source")
    part = name.partition("+")[2]
    method = method_of(name, [f"{part}.damping=0" if part else "damping=0"])
    # One token again and again: whatever reads it has a Gram matrix of rank one.
    manifest = prune(source, method=method, calibration=torch.full((2, 16), 7), output=tmp_path / "out")
    few, more = sorted(cautions(manifest), key=lambda text: "damping" in text)
    assert re.search(
        rf"^\d+ of {len(manifest.matrices)} matrices could not be solved with .*damping 0 and took more", more
    )
    worst = max(entry["notes"][f"{part}_damping" if part else "damping"] for entry in manifest.matrices.values())
    assert f"up to {worst:g} (model.layers." in more
    assert "were solved with fewer tokens than they have inputs" in few
    assert more in (tmp_path / "out" / "README.md").read_text()
    console = Console(width=400, file=io.StringIO())
    console.print(manifest_tables(manifest, str(tmp_path / "out")))
    assert more in console.file.getvalue()
    if name == "sparsegpt":  # a page has pictures of every matrix, and this is about one line of it
        assert few.partition(",")[0] in checkpoint_page.build(tmp_path / "out").read_text()


def test_an_update_that_swaps_undo_is_said() -> None:
    (said,) = cautions(prune(tiny.build("llama"), method=method_of("sparsegpt+swaps"), calibration=calibration()))
    assert said.startswith("Swaps put the dense weights of 21 of 21 matrices back: ")
    for name in ("wanda+swaps", "sparsegpt+swaps+least_squares"):
        assert cautions(prune(tiny.build("llama"), method=method_of(name), calibration=calibration())) == []


def test_enough_tokens_and_damping_are_nothing_to_warn_of() -> None:
    assert cautions(prune(tiny.build("llama"), method=sparsegpt(), calibration=calibration())) == []
    assert cautions(prune(tiny.build("llama"), method=wanda(), calibration=calibration()[:1, :8])) == []
    (few,) = cautions(prune(tiny.build("llama"), method=sparsegpt(), calibration=calibration()[:1, :8]))
    assert "8 tokens for " in few
