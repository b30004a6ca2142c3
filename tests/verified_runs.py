"""A model that was really pruned, changes to its files, and manifests forged to match them."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny
from secateur.core.patterns import NM
from secateur.files.checkpoint import Checkpoint, tensor_bytes, tensor_digest
from secateur.methods.wanda import wanda
from secateur.pruning.engine import prune
from secateur.record.manifest import Manifest, file_digests, read_manifest

PLANNED = "model.layers.1.mlp.up_proj.weight"
UNPLANNED = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in several shards, with files beside it."""
    folder = tiny.save("llama", tmp_path_factory.mktemp("dense") / "model", max_shard_size="40KB")
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"vocab": {"é": 1}}}, indent=2))
    (folder / "LICENSE").write_text("Do what you like.\n")
    return folder


@pytest.fixture(scope="module")
def kept(dense: Path) -> Path:
    """Its projections of the MLP pruned to 2:4. Tests that change it take `pruned` instead."""
    folder = dense.parent / "pruned"
    prune(dense, method=wanda(), pattern=NM(2, 4), calibration=tiny.tokens(), only=["*.mlp.*"], output=folder)
    return folder


@pytest.fixture
def pruned(kept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept, tmp_path / "pruned"))


def edit(folder: Path, name: str, change: Callable[[Tensor], None]) -> None:
    """Change one tensor of a checkpoint where it lies."""
    checkpoint = Checkpoint(folder)
    tensor, record = checkpoint.read([name])[name], checkpoint.tensors[name]
    change(tensor)
    with record.file.open("r+b") as file:
        file.seek(record.start)
        file.write(tensor_bytes(tensor))


def forge(folder: Path, change: Callable[[Manifest], None] = lambda manifest: None) -> None:
    """Make the manifest's digests those of the files as they are now: only comparisons can find a change then."""
    manifest, checkpoint = read_manifest(folder), Checkpoint(folder)
    manifest.tensors = {name: tensor_digest(checkpoint.read([name])[name]) for name in checkpoint.names}
    manifest.headers = {file.name: header.digest for file, header in checkpoint.headers.items()}
    manifest.files = file_digests(folder)
    change(manifest)
    manifest.write(folder)


@contextlib.contextmanager
def flipped(file: Path, position: int, bit: int) -> Iterator[None]:
    """The file with one bit turned over, until the end of the block."""

    def flip() -> None:
        with file.open("r+b") as stream:
            stream.seek(position)
            byte = stream.read(1)[0]
            stream.seek(position)
            stream.write(bytes([byte ^ (1 << bit)]))

    flip()
    try:
        yield
    finally:
        flip()
