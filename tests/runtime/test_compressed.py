"""`pack --compress`: smaller files for transport, which are what the packed ones are."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import secateur
import tiny
from command_line import Call
from pruned_checkpoints import file_hashes
from secateur.errors import CheckpointError
from secateur.files.checkpoint import PACKED_FILE
from secateur.files.packed import PackedCheckpoint, record_text
from secateur.report.inspect import inspect
from secateur.runtime.load import load
from secateur.runtime.pack import pack
from secateur.runtime.unpack import unpack

pytest.importorskip("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")

SHARD = "sparse-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model: pruned, packed, and packed for transport."""
    folder = tmp_path_factory.mktemp("compressed")
    tiny.build("llama", dtype=torch.bfloat16).save_pretrained(folder / "model")
    secateur.prune(folder / "model", method="magnitude", pattern=0.5, output=folder / "pruned")
    pack(folder / "pruned", folder / "packed")
    pack(folder / "pruned", folder / "small", compress=True)
    return folder


def test_it_is_smaller_and_what_the_packed_one_is(made: Path, tmp_path: Path) -> None:
    small, packed = PackedCheckpoint(made / "small"), PackedCheckpoint(made / "packed")
    assert sum(record.bytes for record in small.stored.values()) < sum(
        record.bytes for record in packed.stored.values()
    )
    assert secateur.verify(made / "small").ok
    assert small.digests == packed.digests
    unpack(made / "small", tmp_path / "plain")
    assert file_hashes(tmp_path / "plain") == file_hashes(made / "pruned")
    ids = tiny.tokens(samples=4, length=16)
    assert secateur.perplexity(made / "small", ids).perplexity == secateur.perplexity(made / "pruned", ids).perplexity
    assert torch.equal(load(made / "small")(ids).logits, load(made / "packed")(ids).logits)
    found = inspect(made / "small")
    assert found.matrices == inspect(made / "packed").matrices
    assert found.packed is not None
    assert found.packed["bytes"] == small.packed_bytes


def test_the_same_files_every_time(made: Path, tmp_path: Path) -> None:
    pack(made / "pruned", tmp_path / "small", compress=True)
    assert file_hashes(tmp_path / "small") == file_hashes(made / "small")


def test_there_and_back(made: Path, tmp_path: Path) -> None:
    """A packed checkpoint is packed for its way, and packed plainly where it arrives."""
    result = pack(made / "packed", tmp_path / "small", compress=True)
    assert file_hashes(tmp_path / "small") == file_hashes(made / "small")
    assert result.total_after == sum(record.bytes for record in PackedCheckpoint(tmp_path / "small").stored.values())
    pack(tmp_path / "small", tmp_path / "packed")
    assert file_hashes(tmp_path / "packed") == file_hashes(made / "packed")
    for name, options in (("packed", {}), ("small", {"compress": True})):
        with pytest.raises(CheckpointError, match="is packed already"):
            pack(tmp_path / name, tmp_path / "again", **options)


def test_int8_values_stay_as_they_were_rounded(made: Path, tmp_path: Path) -> None:
    rounded = pack(made / "packed", tmp_path / "int8", values="int8")
    assert rounded.errors
    again = pack(tmp_path / "int8", tmp_path / "small", values="int8", compress=True)
    assert again.errors == rounded.errors
    assert again.bits < rounded.bits
    assert PackedCheckpoint(tmp_path / "small").digests == PackedCheckpoint(tmp_path / "int8").digests
    for name in ("int8", "small"):
        assert secateur.verify(tmp_path / name).ok


def damaged(made: Path, folder: Path, change: Callable[[Any, dict[str, torch.Tensor]], None]) -> Path:
    """The compressed checkpoint with another record, whose digest is right, and other shards."""
    folder.mkdir()
    for file in (made / "small").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    record, tensors = json.loads((folder / PACKED_FILE).read_text()), load_file(folder / SHARD)
    change(record, tensors)
    save_file(tensors, folder / SHARD)
    (folder / PACKED_FILE).write_text(record_text(record))
    return folder


NAME = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        (0, f"{NAME}.compressed: its compressed bytes differ from those that were written"),  # a plane as it was
        (-1, f"{NAME}.compressed: cannot be decompressed"),
    ],
)
def test_a_changed_byte_is_found_and_named(made: Path, tmp_path: Path, place: int, problem: str) -> None:
    def flip(record: Any, tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{NAME}.compressed"][place] ^= 1

    folder = damaged(made, tmp_path / "damaged", flip)
    problems = secateur.verify(folder).problems
    assert any(problem in found for found in problems), problems
    with pytest.raises(CheckpointError, match="damaged"):
        unpack(folder, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def put(key: str, value: Any) -> Callable[[Any, Any], None]:
    return lambda record, tensors: record["compressed"][f"{NAME}.compressed"].update({key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("shape", [1 << 50]), r"down_proj.compressed: a compressed tensor of [\d,]+ bytes in 1 chunks, expected"),
        (put("dtype", "F16"), r"down_proj.compressed is F16 \[\d+\] in the shards, expected BF16"),
        (put("planes", [[1, 1]]), r"down_proj.compressed: its planes take 2 bytes, and [\d,]+ are stored"),
        (lambda record, tensors: record.update(version=1), r"version 1, and \d+ compressed tensors"),
        (lambda record, tensors: record.update(compressed={}, version=1), "is U8 .* in the shards, expected U8"),
        (
            lambda record, tensors: record["compressed"].pop("model.norm.weight"),
            "model.norm.weight: is not described as compressed, as others are",
        ),
        (
            lambda record, tensors: record["compressed"].update(other=record["compressed"]["model.norm.weight"]),
            "other: described as compressed, and not stored as bytes",
        ),
    ],
)  # fmt: skip
def test_a_record_that_does_not_fit_is_refused(made: Path, tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        PackedCheckpoint(damaged(made, tmp_path / "damaged", change))


def test_on_the_command_line(made: Path, call: Call, tmp_path: Path) -> None:
    done = call("pack", made / "pruned", "-o", tmp_path / "small", "--compress")
    assert done.code == 0
    assert "21 packed matrices" in done.out
    assert "compressed" in call("inspect", tmp_path / "small").out
    refused = call("pack", made / "pruned", "--compress", "--dry-run")
    assert refused.code == 2
    assert "known only when it is done" in refused.message


def test_without_the_library_the_extra_is_named(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("backports", "backports.zstd", "compression", "compression.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    for work in (
        lambda: pack(made / "pruned", tmp_path / "small", compress=True),
        lambda: load(made / "small"),
        lambda: unpack(made / "small", tmp_path / "plain"),
    ):
        with pytest.raises(secateur.SecateurError, match=r'pip install "secateur\[compress\]"'):
            work()
    assert list(tmp_path.iterdir()) == []
