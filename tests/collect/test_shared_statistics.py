"""Statistics that several runs share: bit-equal to separate runs, and without their forwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import secateur
import tiny
from counted_forwards import HALF, counted, run
from secateur.collect.survey import Survey
from secateur.core.gram import Gram
from secateur.core.statistics import SquaredNorm
from secateur.errors import CalibrationError, CheckpointError, PatternError
from secateur.pruning.engine import prune

KINDS = frozenset({Gram, SquaredNorm})


# Fused and single experts, keys and values that later blocks read, and blocks that are not attention.
@pytest.mark.parametrize(
    "name",
    [
        *("mixtral", "gemma3n_text", "mamba"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "gpt2", "qwen2_moe")),
    ],
)
def test_bit_equal_to_separate_runs_without_their_forwards(name: str, tmp_path: Path) -> None:
    source = tiny.save(name, tmp_path / "source")
    methods = {"wanda": secateur.wanda(), "sparsegpt": secateur.sparsegpt(), "alps": secateur.alps(iterations=3)}
    shared = Survey(tmp_path / "statistics", KINDS)
    for position, (label, method) in enumerate(methods.items()):
        with counted(name) as separate:
            expected = run(source, tmp_path / f"{label}-separate", method)
        with counted(name) as forwards:
            found = run(source, tmp_path / f"{label}-shared", method, statistics=shared)
        assert found == expected  # among others the sha256 of every tensor, and how far every block moved
        again = {file.name: file.read_bytes() for file in (tmp_path / f"{label}-separate").glob("*.safetensors")}
        assert again == {file.name: file.read_bytes() for file in (tmp_path / f"{label}-shared").glob("*.safetensors")}
        kinds = len(set(separate))  # one of each class runs on two tokens, for what it returns
        assert len(separate) == tiny.BLOCKS * (8 + 1) + kinds
        assert len(forwards) == (tiny.BLOCKS * 2 + kinds if position else len(separate))
    shared.close()
    assert not (tmp_path / "statistics").exists()


def test_a_run_that_fails_leaves_nothing_to_share(tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "source")
    shared = Survey(tmp_path / "statistics", KINDS)

    def broken(problem: secateur.Problem) -> torch.Tensor:
        if problem.name.startswith("model.layers.1."):
            raise secateur.NumericalError("no")
        return problem.weight.abs()

    method = secateur.select("broken", broken, needs=frozenset({SquaredNorm}))
    with pytest.raises(secateur.NumericalError):
        run(source, tmp_path / "broken", method, statistics=shared)
    assert not shared.complete
    expected = run(source, tmp_path / "separate", secateur.wanda())
    assert run(source, tmp_path / "after", secateur.wanda(), statistics=shared) == expected
    assert shared.complete


def test_a_method_sees_only_what_it_asked_for(tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "source")
    shared = Survey(tmp_path / "statistics", KINDS)
    seen: set[frozenset[type]] = set()

    def score(problem: secateur.Problem) -> torch.Tensor:
        seen.add(frozenset(problem.evidence))
        return problem.weight.abs()

    for number in range(2):
        method = secateur.select("own", score, needs=frozenset({Gram}))
        run(source, tmp_path / f"out-{number}", method, statistics=shared)
    assert seen == {frozenset({Gram})}


def test_what_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "source")
    shared = Survey(tmp_path / "statistics", KINDS)
    ids = tiny.tokens(samples=4, length=12)
    base: dict[str, Any] = {"method": secateur.wanda(), "pattern": HALF, "calibration": ids, "statistics": shared}
    with pytest.raises(PatternError, match='with propagate="dense" only'):
        prune(source, output=tmp_path / "a", **base)
    base["propagate"] = "dense"
    with pytest.raises(PatternError, match="wanda_plus: runs that share statistics need its gradients as a file"):
        prune(source, output=tmp_path / "b", **base | {"method": secateur.wanda_plus()})
    prune(source, output=tmp_path / "c", **base)
    for options, name in (
        ({"calibration": tiny.tokens(samples=4, length=12, seed=1)}, "tokens"),
        ({"skip": ["*.down_proj"]}, "matrices"),
        ({"batch_size": 1}, "batch_size"),
        ({"dtype": "bfloat16"}, "dtype"),
    ):
        with pytest.raises(CalibrationError, match=f"shared by runs with {name} "):
            prune(source, output=tmp_path / "d", **base | options)
    with pytest.raises(CalibrationError, match="HarmonicNorm is not among the statistics that these runs share"):
        prune(source, output=tmp_path / "d", **base | {"method": secateur.wanda(weighting="published")})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "source", "statistics"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    source = tiny.save("llama", tmp_path / "source")
    (tmp_path / "taken").touch()
    shared = Survey(tmp_path / "taken", KINDS)
    with pytest.raises(CheckpointError, match="cannot be written"):
        run(source, tmp_path / "out", secateur.wanda(), statistics=shared)
