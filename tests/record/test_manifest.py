"""What manifests say of a run, and manifests that say what cannot be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from secateur.core.patterns import NM
from secateur.core.problem import chain
from secateur.errors import CheckpointError
from secateur.files.checkpoint import CARD_FILE, Checkpoint
from secateur.methods import METHODS, REFINEMENTS
from secateur.methods.wanda import wanda
from secateur.pruning.engine import prune
from secateur.record.manifest import FILE_NAME, Manifest, read_manifest
from secateur.record.verify import only_chooses, verify
from verified_runs import PLANNED, edit, forge

# The manifest itself


def test_a_manifest_reads_as_it_was_written(kept: Path) -> None:
    manifest = read_manifest(kept)
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert manifest.method == "wanda"
    assert set(manifest.headers) == {file.name for file in Checkpoint(kept).files}
    assert set(manifest.tensors) == set(Checkpoint(kept).names)
    assert set(manifest.source_tensors) == set(manifest.plan) == set(manifest.matrices)
    assert set(manifest.files) == {f.name for f in kept.iterdir() if f.suffix != ".safetensors"} - {
        FILE_NAME,
        CARD_FILE,
    }
    assert (kept / FILE_NAME).read_text().isascii()


def test_the_same_run_twice_differs_in_times_and_paths_alone(kept: Path, dense: Path, tmp_path: Path) -> None:
    prune(dense, method=wanda(), pattern=NM(2, 4), calibration=tiny.tokens(), only=["*.mlp.*"], output=tmp_path / "b")
    one, other = read_manifest(kept), read_manifest(tmp_path / "b")
    for manifest in (one, other):
        manifest.seconds, manifest.created = {}, ""
        for entry in manifest.matrices.values():
            del entry["seconds"]
    assert one == other


# What the record says of itself


def test_a_manifest_cannot_switch_off_the_comparison_of_kept_weights(pruned: Path, dense: Path) -> None:
    edit(pruned, PLANNED, lambda tensor: tensor.copy_(torch.where(tensor != 0, tensor * 1.5, tensor)))
    forge(pruned, lambda manifest: manifest.matrices[PLANNED].update(kept_identical=False))
    assert verify(pruned).ok
    problem = f"{PLANNED}: a kept weight is not bit-identical to the source, or a zero is -0.0"
    assert verify(pruned, Checkpoint(dense)).problems == [problem]
    # One that names another method lies about more than that; what it claims is then said.
    forge(pruned, lambda manifest: setattr(manifest, "method", "sparsegpt"))
    result = verify(pruned, Checkpoint(dense))
    assert result.problems == []
    assert result.notes == [
        "Kept weights of 1 of 9 matrices differ from the source: the manifest says that sparsegpt changed them. What "
        "they should be, only its digests say."
    ]


def test_which_methods_only_choose(dense: Path, tmp_path: Path) -> None:
    calibration, only = tiny.tokens(4, 16), ["*.1.mlp.*"]
    made = {name: make() for name, make in METHODS.items()}
    made |= {f"wanda+{name}": chain(wanda(), make()) for name, make in REFINEMENTS.items()}
    made["sparsegpt+swaps"] = chain(METHODS["sparsegpt"](), REFINEMENTS["swaps"]())
    for name, method in made.items():
        out = tmp_path / name
        manifest = prune(dense, method=method, pattern=NM(2, 4), calibration=calibration, only=only, output=out)
        assert manifest.method == name
        assert all(entry["kept_identical"] for entry in manifest.matrices.values()) == only_chooses(name), name
    assert not only_chooses("mine:powered")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda m: m.matrices[PLANNED].update(shape=[3]), r"shape"),
        (lambda m: m.matrices[PLANNED].update(shape=["3", 4]), r"shape\[0\]"),
        (lambda m: m.matrices[PLANNED].update(pattern={"n": 9, "m": 4}), rf"{PLANNED}: "),
        (lambda m: m.matrices[PLANNED].update(pattern=[1]), "pattern"),
        (lambda m: m.matrices[PLANNED].update(index=-1), "index"),
        (lambda m: m.matrices[PLANNED].update(tensor=4), "tensor"),
        (lambda m: m.matrices[PLANNED].update(notes={"damping": "x"}), "notes"),
        (lambda m: m.matrices[PLANNED].update(scores={"scale": "linear"}), "scores"),
        (lambda m: m.matrices[PLANNED].pop("zeros"), "zeros"),
        (lambda m: m.plan.update(x={"sparsity": 2}), "plan of x"),
        (lambda m: setattr(m, "matrices", []), "matrices"),
        (lambda m: setattr(m, "blocks", [3]), "blocks"),
        (lambda m: setattr(m, "totals", {}), "totals"),
        (lambda m: setattr(m, "files", {"config.json": 1}), "files"),
        (lambda m: setattr(m, "method", None), "method"),
        (lambda m: setattr(m, "recovery", {"earlier": {"trained": []}}), r"recovery\.earlier\.trained"),
        (lambda m: setattr(m, "surprise", 1), "surprise"),
    ],
)
def test_a_manifest_of_other_types_with_a_valid_digest(change: Callable[[Any], Any], what: str, pruned: Path) -> None:
    manifest = read_manifest(pruned)
    change(manifest)
    manifest.write(pruned)
    with pytest.raises(CheckpointError, match=rf"{FILE_NAME}: damaged.*{what}"):
        read_manifest(pruned)


def test_a_matrix_that_its_tensor_cannot_hold(pruned: Path, dense: Path) -> None:
    forge(pruned, lambda manifest: manifest.matrices[PLANNED].update(index=7))
    problem = f"{PLANNED}: of shape [48, 32], the manifest records [48, 32] at 7"
    for source in (None, Checkpoint(dense)):
        assert verify(pruned, source).problems == [problem]
