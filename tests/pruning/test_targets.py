"""The dense model's outputs as targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import secateur
import tiny
from secateur.core.gram import CrossGram, Gram
from secateur.core.statistics import SquaredNorm
from secateur.errors import PatternError
from secateur.methods.sparsegpt import sparsegpt
from secateur.methods.wanda import wanda
from secateur.pruning.engine import prune
from second_order import ORDERS, RESIDUAL, Taken, assert_verified, calibration, recording


def test_in_the_first_block_both_models_are_one() -> None:
    taken: Taken = {}
    prune(
        tiny.build("llama"),
        method=recording(taken, wanda()),
        calibration=calibration(),
        targets="dense",
        batch_size=3,
    )
    for name, statistics in taken.items():
        assert torch.equal(statistics[CrossGram][0], statistics[Gram][0]) == (".layers.0." in name), name


def test_no_cross_products_are_taken_for_targets_of_the_pruned_model() -> None:
    taken: Taken = {}
    prune(tiny.build("llama"), method=recording(taken, wanda()), calibration=calibration(), within="site")
    assert all(set(statistics) == {Gram, SquaredNorm} for statistics in taken.values())


@pytest.mark.parametrize("within", ["block", "site"])
def test_experts_are_not_fitted_to_the_dense_model(within: str, tmp_path: Path) -> None:
    """It sends them other tokens, or the same in another order, which their counts do not show."""
    source = tiny.save("mixtral", tmp_path / "source")
    arguments: dict[str, Any] = {
        "method": sparsegpt(),
        "calibration": calibration(),
        "within": within,
        "targets": "dense",
        "output": tmp_path / "out",
    }
    with pytest.raises(
        PatternError,
        match=r"^--targets dense: model\.layers\.0\.block_sparse_moe\.experts\.0\.w1\.weight is an expert, to which "
        r"the dense model sends other tokens than the pruned one, so that their inputs cannot be paired\. "
        r'Use --targets pruned, or leave experts out: --skip "\*expert\*"\.$',
    ):
        prune(source, **arguments)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]
    skipped = prune(source, skip=["*expert*"], **arguments)
    assert len(skipped.matrices) == 4 * tiny.BLOCKS
    assert_verified(tmp_path / "out", source, skipped)


@pytest.mark.parametrize(("within", "targets"), [*ORDERS, RESIDUAL])
def test_hidden_states_on_disk_change_nothing(within: str, targets: str, tmp_path: Path) -> None:
    source = tiny.save("llama" if targets == "residual" else "gemma3n_text", tmp_path / "source")
    settings: dict[str, Any] = {
        "method": sparsegpt(),
        "calibration": calibration(),
        "within": within,
        "targets": targets,
        "batch_size": 3,
    }
    states = tmp_path / "states"
    prune(source, output=tmp_path / "memory", offload_states="never", **settings)
    prune(source, output=tmp_path / "disk", offload_states=str(states), **settings)
    one, two = (load_file(tmp_path / folder / "model.safetensors") for folder in ("memory", "disk"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert list(states.iterdir()) == []


@pytest.mark.parametrize("stage", ["statistics", "solve", "forward", "write"])
def test_a_failure_leaves_nothing_of_both_streams(stage: str, tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "source")

    def fail(event: secateur.Event) -> None:
        if event.stage == stage and event.block == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(
            source,
            method=sparsegpt(),
            calibration=calibration(),
            within="site",
            targets="dense",
            offload_states=str(tmp_path / "states"),
            output=tmp_path / "out",
            on_event=fail,
        )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.partial", "source", "states"]  # block 0
    assert list((tmp_path / "states").iterdir()) == []
