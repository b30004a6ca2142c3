"""Files that earlier versions wrote are read as they were, or refused by what differs."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import secateur
from kept_files import IDS
from secateur.collect.gradient_file import GradientFile
from secateur.core.gradients import GradientKind
from secateur.errors import CheckpointError
from secateur.record.manifest import read_manifest
from secateur.runs.journal import Journal

VERSIONS = sorted(Path(__file__).with_name("kept").iterdir())


@pytest.fixture(params=VERSIONS, ids=lambda folder: folder.name)
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(request.param, tmp_path / "kept"))


def test_a_manifest(kept: Path) -> None:
    manifest = read_manifest(kept / "pruned")
    assert manifest.method == "sparsegpt"
    assert (manifest.totals["matrices"], manifest.totals["sparsity"]) == (14, 0.5)
    assert secateur.verify(kept / "pruned").ok


def test_a_file_of_gradients(kept: Path) -> None:
    file = GradientFile(kept / "gradients.safetensors")
    assert len(file.matrices) == 14
    assert file.provenance["tokens_digest"]
    for norm in ("l1", "l2"):
        read = file.read(file.matrices[0], GradientKind(norm))
        assert torch.equal(read.total, load_file(file.path)[f"{norm}:{file.matrices[0]}"])


@pytest.mark.parametrize(
    ("name", "run", "told", "parts"),
    [
        ("unfinished", "prune", "1 of 2 blocks", ["taking gradients", "gradients of block 1", "gradients of block 0"]),
        ("half", "gradients", "the gradients of 1 of 2 blocks", ["taking gradients", "gradients of block 1"]),
    ],
)
def test_a_journal(kept: Path, name: str, run: str, told: str, parts: list[str]) -> None:
    journal = Journal(kept / f"{name}.partial" / "journal.jsonl")
    assert (journal.run, journal.told(), journal.parts) == (run, told, 2)
    assert [part for part in journal.found if "of block" in part or part.startswith("taking")] == parts
    assert {"versions", "machine", "tokens"} <= set(journal.facts)


@pytest.mark.parametrize("name", ["unfinished", "half"])
def test_an_unfinished_run(kept: Path, name: str) -> None:
    """It goes on where nothing that its bytes depend on has changed, and says what has otherwise."""
    partial = kept / f"{name}.partial"
    before = {file: file.read_bytes() for file in partial.rglob("*") if file.is_file()}
    facts = Journal(partial / "journal.jsonl").facts

    def run(folder: Path, *, resume: bool) -> None:
        if name == "half":
            secateur.gradients(kept / "model", folder, calibration=IDS, resume=resume)
        else:
            secateur.prune(kept / "model", output=folder, method="gblm", calibration=IDS, resume=resume)

    threads = torch.get_num_threads()
    torch.set_num_threads(facts["machine"]["threads"])
    refused: CheckpointError | None = None
    try:
        run(kept / name, resume=True)
        run(kept / "again", resume=False)
    except CheckpointError as error:
        refused = error
    finally:
        torch.set_num_threads(threads)
    if refused is not None:
        assert "the unfinished run differs from this one: " in str(refused)
        assert {file: file.read_bytes() for file in partial.rglob("*") if file.is_file()} == before
        return
    shards = [path if path.is_file() else path / "model.safetensors" for path in (kept / name, kept / "again")]
    first, second = map(load_file, shards)
    assert all(torch.equal(first[tensor], second[tensor]) for tensor in second)
