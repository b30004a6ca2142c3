"""`progress=True`: a bar for every stage of a Python call, and nothing without it."""
# ruff: noqa: E501 - one call a line

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import secateur
import tiny
from secateur.errors import CheckpointError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("bars") / "model")


def test_a_bar_for_each_stage(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids, out = tiny.tokens(samples=6, length=12), tmp_path / "out"
    calls: list[tuple[Any, list[str]]] = [
        (lambda **how: secateur.prune(model, method="wanda", calibration=ids, output=out, **how), ["recording calls", "blocks: 100%|██████████| 3/3"]),
        (lambda **how: secateur.perplexity(model, ids, **how), ["record: ", "blocks: 100%|██████████| 3/3", "head: "]),
        (lambda **how: secateur.agreement(model, [out], ids, **how), ["dense: blocks", "pruned: head"]),
        (lambda **how: secateur.verify(out, **how), ["verifying: 100%|██████████| 30/30"]),
        (lambda **how: secateur.inspect(out, **how), ["reading: 100%|██████████| 3/3"]),
        (
            lambda **how: secateur.sweep(model, methods=["magnitude"], calibration=ids, data={"ids": ids}, output=tmp_path / "sweep", **how),
            ["all cells: ids", "cells: 100%|██████████| 1/1"],
        ),
    ]  # fmt: skip
    for call, stages in calls:
        capsys.readouterr()
        call(progress=True)
        shown = capsys.readouterr()
        assert shown.out == ""
        assert not [stage for stage in stages if stage not in shown.err]
        assert shown.err.endswith("\n")  # what is printed next does not stand behind the bar
    secateur.perplexity(model, ids)
    secateur.perplexity(model, ids, progress=False)
    secateur.inspect(out, progress=None)
    assert capsys.readouterr().err == ""


def test_who_is_told_instead(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[str, int, int]] = []
    events: list[str] = []

    def tell(stage: str, done: int, total: int) -> None:
        told.append((stage, done, total))

    how: dict[str, Any] = {"method": "wanda", "calibration": tiny.tokens()}
    secateur.prune(
        model, output=tmp_path / "out", progress=tell, on_event=lambda event: events.append(event.stage), **how
    )
    blocks = [(done, total) for stage, done, total in told if stage == "blocks"]
    assert (blocks[0], blocks[-1]) == ((0, 3), (3, 3))
    assert blocks == sorted(blocks)
    assert {"statistics", "solve", "write", "done"} <= set(events)
    # A run that fails leaves no bar open.
    with pytest.raises(CheckpointError, match="exists already"):
        secateur.prune(model, output=tmp_path / "out", progress=True, **how)
    assert capsys.readouterr().err == ""
