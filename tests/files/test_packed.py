"""Packed checkpoints as they lie on the disk: what is damaged or does not fit together is refused by name."""

import json
import struct
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_files import same_bytes
from secateur.errors import CheckpointError, SecateurError
from secateur.files.checkpoint import PACKED_FILE, PACKED_INDEX, SINGLE_FILE, Checkpoint
from secateur.files.packed import PackedCheckpoint, open_files, record_text
from secateur.runtime.pack import pack

NAME, STEM, SHARD = "layer.weight", "layer", "sparse-00001-of-00001.safetensors"


def plain_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 43, generator=generator).bfloat16()
    weight[torch.rand(weight.shape, generator=generator) < 0.6] = 0
    return {NAME: weight, "norm.weight": torch.ones(43), "full.weight": torch.ones(8, 8)}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    folder = tmp_path / "plain"
    folder.mkdir()
    save_file(plain_tensors(), folder / SINGLE_FILE, {"format": "pt"})
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def packed(plain: Path) -> Path:
    pack(plain, plain.with_name("packed"))
    return plain.with_name("packed")


def change_record(folder: Path, change: Callable[[Any], None]) -> None:
    """Change sparse_config.json, with a digest that is right again."""
    record = json.loads((folder / PACKED_FILE).read_text())
    change(record)
    (folder / PACKED_FILE).write_text(record_text(record))


def change_shard(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file(tensors, folder / SHARD)


def test_it_is_read_as_the_plain_one(plain: Path, packed: Path) -> None:
    theirs, ours = Checkpoint(plain), open_files(packed)
    assert isinstance(ours, PackedCheckpoint)
    assert ours.names == theirs.names
    assert ours.layout() == theirs.layout()
    for name, tensor in theirs.read(theirs.names).items():
        assert ours.shape(name) == tuple(tensor.shape)
        assert ours.dtype(name) == tensor.dtype
        assert ours.tensors[name].bytes == tensor.nbytes
        assert same_bytes(ours.read([name])[name], tensor)
        assert same_bytes(torch.cat(list(ours.parts(name))).view(tensor.shape), tensor)


def test_what_lies_there_is_what_the_documentation_says(packed: Path) -> None:
    tensors, weight = load_file(packed / SHARD), plain_tensors()[NAME]
    assert set(tensors) == {f"{STEM}.bitmask", f"{STEM}.compressed", "norm.weight", "full.weight"}
    assert tensors[f"{STEM}.bitmask"].shape == (24, 6)
    assert same_bytes(tensors[f"{STEM}.compressed"], weight[weight != 0])
    index = json.loads((packed / PACKED_INDEX).read_text())
    assert set(index["weight_map"]) == set(tensors)
    record = json.loads((packed / PACKED_FILE).read_text())
    assert record["dense"]["full.weight"]["reason"] == "no zeros"
    assert record["matrices"][NAME]["kept"] == int((weight != 0).sum())


def test_every_stored_tensor_is_aligned(packed: Path) -> None:
    for name, record in PackedCheckpoint(packed).stored.items():
        assert record.start % load_file(packed / SHARD)[name].dtype.itemsize == 0


def test_a_folder_with_both_is_refused(plain: Path, packed: Path) -> None:
    (packed / SINGLE_FILE).write_bytes((plain / SINGLE_FILE).read_bytes())
    with pytest.raises(CheckpointError, match=r"holds model.safetensors of a plain checkpoint and sparse_config.json"):
        open_files(packed)


def test_where_a_plain_one_is_needed_the_command_is_told(packed: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a packed checkpoint, and a plain one .* secateur unpack"):
        Checkpoint(packed)


def put(path: str, value: Any) -> Callable[[Any], None]:
    """Put a value at a path of a record."""

    def change(record: Any) -> None:
        *above, last = path.split("/")
        for key in above:
            record = record[key]
        record[last] = value

    return change


def remove(path: str) -> Callable[[Any], None]:
    def change(record: Any) -> None:
        *above, last = path.split("/")
        for key in above:
            record = record[key]
        del record[last]

    return change


ENTRY = f"matrices/{NAME}"
RECORDS: dict[str, tuple[Callable[[Any], None], str]] = {
    "another format": (put("format", "x"), "format 'x', version 1, expected 'secateur-bitmask'"),
    "a later version": (put("version", 3), "version 3, expected"),
    "a version of compressed tensors without any": (put("version", 2), "version 2, and 0 compressed tensors"),
    "fewer rows": (put(f"{ENTRY}/shape", [23, 43]), r"layer.bitmask is U8 \[24, 6\] in .*, expected U8 \[23, 6\]"),
    "more columns": (put(f"{ENTRY}/shape", [24, 49]), r"layer.bitmask is U8 \[24, 6\] in .*, expected U8 \[24, 7\]"),
    "a shape that overflows": (put(f"{ENTRY}/shape", [1 << 50, 1 << 50]), "layer.weight: has more numbers than"),
    "a side that overflows": (put(f"{ENTRY}/shape", [24, 1 << 62]), "Expected `int` <"),
    "a negative side": (put(f"{ENTRY}/shape", [24, -43]), "Expected `int` >= 0"),
    "one dimension": (put(f"{ENTRY}/shape", [43]), "length >= 2"),
    "many dimensions": (put(f"{ENTRY}/shape", [1] * 99), "length <= 16"),
    "more values": (put(f"{ENTRY}/kept", 1 << 59), r"layer.compressed is BF16 \[\d+\] in .*, expected BF16 \[57"),
    "another dtype": (put(f"{ENTRY}/dtype", "F16"), r"layer.compressed is BF16 \[\d+\] in the shards, expected F16"),
    "a dtype that is none": (put(f"{ENTRY}/dtype", "X"), "layer.weight: has the unknown dtype X"),
    "no digest": (put(f"{ENTRY}/sha256", "../x"), "matching regex"),
    "no mask": (remove(f"{ENTRY}/stored/bitmask"), "layer.weight: has no digest of its bitmask"),
    "another part": (put(f"{ENTRY}/stored/other", "0" * 64), "layer.other: it is described, and nothing else knows it"),
    "a tensor that is not stored": (
        lambda record: [put("dense/x", {"sha256": "0" * 64})(record), record["shards"][0]["tensors"].append("x")],
        "sparse_config.json: x: the tensor is listed, and not described or not stored",
    ),
    "a tensor listed twice": (
        lambda record: record["shards"][0]["tensors"].append(NAME),
        "the tensors of its shards are not those that it describes",
    ),
    "a tensor that no shard lists": (
        lambda record: record["shards"][0]["tensors"].remove(NAME),
        "the tensors of its shards are not those that it describes",
    ),
    "a stored tensor that is not described": (
        lambda record: [record["dense"].pop("norm.weight"), record["shards"][0]["tensors"].remove("norm.weight")],
        "norm.weight: the shards hold it, and nothing else knows it",
    ),
    "more shards": (
        lambda record: record["shards"].append({"header": "0" * 64, "tensors": []}),
        "sparse-00001-of-00002.safetensors: the shard is missing; sparse_config.json lists 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RECORDS)
def test_a_record_that_does_not_fit_the_shards_is_refused(packed: Path, case: str) -> None:
    change, message = RECORDS[case]
    change_record(packed, change)
    with pytest.raises(CheckpointError, match=message):
        PackedCheckpoint(packed)


def test_a_record_that_was_altered_is_refused(packed: Path) -> None:
    text = (packed / PACKED_FILE).read_text()
    (packed / PACKED_FILE).write_text(text.replace('"reason": "no zeros"', '"reason": "many zeros"'))
    with pytest.raises(CheckpointError, match="altered since it was written"):
        PackedCheckpoint(packed)


def flip(place: tuple[int, int], bit: int) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{STEM}.bitmask"][place] ^= 1 << bit

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip((3, 2), 1), r"packed: layer.weight: its mask keeps \d+ entries, and \d+ values are stored"),
        (lambda tensors: tensors[f"{STEM}.bitmask"].fill_(255), "layer.weight: its mask keeps 1,152 entries"),
    ],
    ids=["a bit more or less", "all bits"],
)
def test_a_mask_that_does_not_fit_its_values_is_refused(packed: Path, change: Any, message: str) -> None:
    change_shard(packed, change)
    with pytest.raises(CheckpointError, match=message):
        PackedCheckpoint(packed).read([NAME])


def test_bits_after_the_last_column_are_refused(packed: Path) -> None:
    def move(tensors: dict[str, torch.Tensor]) -> None:
        mask = tensors[f"{STEM}.bitmask"]
        place = int(mask[0, 0].item() & -mask[0, 0].item()).bit_length() - 1
        mask[0, 0] ^= 1 << place
        mask[0, 5] |= 1 << 3

    change_shard(packed, move)
    with pytest.raises(CheckpointError, match=r"layer.weight: its mask has bits after the last of 43 columns"):
        PackedCheckpoint(packed).read([NAME])


def test_a_shard_cut_short_is_refused(packed: Path) -> None:
    data = (packed / SHARD).read_bytes()
    (packed / SHARD).write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=f"{SHARD}: truncated or damaged"):
        PackedCheckpoint(packed)


def test_a_shard_cut_short_after_it_was_opened_names_the_tensor_s_file(packed: Path) -> None:
    checkpoint = PackedCheckpoint(packed)
    data = (packed / SHARD).read_bytes()
    (packed / SHARD).write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=f"{SHARD}: ended at byte {len(data) - 1}, expected {len(data)}"):
        checkpoint.read([NAME])


def test_bytes_changed_anywhere_are_an_error_or_a_tensor_and_take_no_memory(packed: Path) -> None:
    """Whatever one byte of the header or the record becomes, nothing else is raised, and nothing large is made."""
    generator = torch.Generator().manual_seed(0)
    for file in (packed / SHARD, packed / PACKED_FILE):
        whole = file.read_bytes()
        size = 8 + struct.unpack("<Q", whole[:8])[0] if file.suffix == ".safetensors" else len(whole)
        for _ in range(150):
            place = int(torch.randint(size, (), generator=generator))
            value = int(torch.randint(256, (), generator=generator))
            file.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            tracemalloc.start()
            with suppress(SecateurError):
                checkpoint = PackedCheckpoint(packed)
                checkpoint.read(checkpoint.names)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert peak < 4 << 20
        file.write_bytes(whole)
