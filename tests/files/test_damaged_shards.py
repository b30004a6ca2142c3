"""Checkpoints on disk that are damaged, cut short, or not what they claim to be: each is refused by name."""

import json
import os
import re
import shutil
import struct
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from checkpoint_files import same_bytes
from full_disks import unprivileged
from secateur.errors import CheckpointError
from secateur.files.checkpoint import (
    INDEX_FILE,
    SINGLE_FILE,
    Checkpoint,
    read_header,
    shard_names,
)


def damage(file: Path, header: object, data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def entry(start: int = 0, end: int = 8, shape: object = (2,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


DAMAGED = {
    "not an object": ([1, 2], b"", "header: damaged, or not what its name says: Expected `object`"),
    "not JSON": (b"{'a': 1}", b"", "header: not JSON (Expecting property name"),
    "not UTF-8": (b'{"\xff\xfe": 1}', b"", "header: not JSON ('utf-8' codec"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, b"x" * 8, "missing required field `dtype`"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, b"x" * 8, "missing required field `shape`"),
    "shape of text": ({"a": entry(shape=["2"])}, b"x" * 8, "Expected `int`, got `str` - at `$[...].shape[0]`"),
    "shape of fractions": ({"a": entry(shape=[2.0])}, b"x" * 8, "Expected `int`, got `float` - at `$[...].shape[0]`"),
    "a list as dtype": ({"a": entry(dtype=["F32"])}, b"x" * 8, "Expected `str`, got `array`"),
    "one offset": (
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8]}},
        b"x" * 8,
        "Expected `array` of length 2",
    ),
    "offsets of text": ({"a": entry("0", "8")}, b"x" * 8, "Expected `int`, got `str`"),
    "unknown dtype": ({"a": entry(dtype="F4")}, b"x" * 8, "tensor a has the unknown dtype F4; known are F64, F32"),
    "wrong size": ({"a": entry(shape=[3])}, b"x" * 8, "tensor a lies at bytes 69 to 77, expected 69 to 81"),
    "a hole": ({"a": entry(), "b": entry(12, 20)}, b"x" * 20, "tensor b lies at bytes"),
    "an overlap": ({"a": entry(), "b": entry(4, 12)}, b"x" * 12, "tensor b lies at bytes"),
    "negative": ({"a": entry(-8, 0)}, b"x" * 8, "Expected `int` >= 0 - at `$[...].data_offsets[0]`"),
    "negative shape": ({"a": entry(shape=[-2])}, b"x" * 8, "Expected `int` >= 0 - at `$[...].shape[0]`"),
    "a product beyond all numbers": (
        {"a": entry(shape=[1 << 40, 1 << 40])},
        b"x" * 8,
        "tensor a has more numbers than",
    ),
    "nested too deeply": (b"[" * 100_000, b"", "lie more than 100 deep inside each other"),
    "a tensor twice": (b'{"a": 1, "a": 2}', b"", "not JSON (a is there twice)"),
    "metadata that is no text": ({"__metadata__": {"format": 1}}, b"", "__metadata__: damaged"),
    "cut short": ({"a": entry()}, b"x" * 7, "truncated or damaged: the header describes 77 bytes, the file has 76."),
    "too long": ({"a": entry()}, b"x" * 9, "truncated or damaged: the header describes 77 bytes, the file has 78."),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_header_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    header, data, expected = DAMAGED[kind]
    damage(tmp_path / SINGLE_FILE, header, data)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / SINGLE_FILE}: ")
    assert expected in str(caught.value)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.safe_open(tmp_path / SINGLE_FILE, "pt").__enter__()


@pytest.mark.parametrize("shape", [[0, 1 << 62], [0, 1 << 50, 1 << 50], [0] * 17])
def test_an_empty_tensor_with_sides_that_cannot_be(shape: list[int], tmp_path: Path) -> None:
    damage(tmp_path / SINGLE_FILE, {"a": entry(0, 0, shape=shape)})
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / SINGLE_FILE))):
        Checkpoint(tmp_path)


def test_a_header_longer_than_the_format_allows(tmp_path: Path) -> None:
    file = tmp_path / SINGLE_FILE
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", 100_000_001))
        stream.truncate(200_000_000)  # a hole: it takes no room
    with pytest.raises(
        CheckpointError, match="its header claims 100,000,001 bytes, and the format allows for 100,000,000"
    ):
        read_header(file)


def test_a_pipe_in_the_place_of_a_shard(llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    shard = Checkpoint(folder).files[1]
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    assert str(caught.value) == f"{shard}: is a pipe, expected a regular file."


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "{root}/outside.safetensors", "sub/a.safetensors", "..", ""]
)
def test_an_index_that_leaves_its_folder(file: str, llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    shard, index = Checkpoint(folder).files[0], folder / INDEX_FILE
    (folder / "sub").mkdir()
    for place in (tmp_path / "outside.safetensors", folder / "sub" / "a.safetensors"):
        shutil.copy(shard, place)
    file = file.format(root=tmp_path)
    index.write_text(index.read_text().replace(shard.name, file))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    assert f'in "{file}", and a shard lies beside its index, in the same folder.' in str(caught.value)


def test_shards_that_are_links_into_the_cache_of_the_hub(llama: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    shutil.copytree(llama, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../..") / "blobs" / file.name)
    linked, plain = Checkpoint(snapshot), Checkpoint(llama)
    assert linked.names == plain.names
    assert all(same_bytes(linked.read([name])[name], plain.read([name])[name]) for name in plain.names)


def test_an_adapter_is_no_model(llama: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    (adapter / "adapter_model.safetensors").touch()
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(adapter)
    assert str(caught.value) == (
        f"{adapter}: an adapter for org/base, not a model. Give its base, or merge the two into one checkpoint first: "
        f"secateur merge {adapter} --base BASE --output FOLDER"
    )
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    shutil.copy(adapter / "adapter_config.json", folder)
    with pytest.raises(CheckpointError, match=r"the adapter for org/base that transformers would load with them\."):
        Checkpoint(folder)


@pytest.mark.parametrize("length", [0, 1, 1 << 20, 1 << 63])
def test_a_header_length_that_cannot_be(length: int, tmp_path: Path) -> None:
    file = tmp_path / SINGLE_FILE
    file.write_bytes(struct.pack("<Q", length) + b"{}" + b"x" * 20)
    with pytest.raises(CheckpointError, match=f"the header claims {length} bytes, the file has 30"):
        read_header(file)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.arange(4.0), "b": torch.arange(3)}, tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    for size in range(len(data)):
        (tmp_path / SINGLE_FILE).write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / SINGLE_FILE))):
            Checkpoint(tmp_path)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    file = tmp_path / SINGLE_FILE
    save_file({"a": torch.arange(64.0)}, file)
    checkpoint, size = Checkpoint(tmp_path), file.stat().st_size
    os.truncate(file, size - 100)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(["a"])
    assert str(caught.value) == f"{file}: ended at byte {size - 100}, expected {size}."
    file.unlink()
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(["a"])
    assert str(caught.value) == f"{file}: cannot be read (No such file or directory)."


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for file in shard_names(2):
        save_file({"a": torch.ones(2)}, tmp_path / file)
    index = {"weight_map": {"a": shard_names(2)[0], "b": shard_names(2)[1]}}
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(tmp_path)
    assert str(caught.value) == f"{tmp_path}: tensor a is in {shard_names(2)[0]} and {shard_names(2)[1]}."


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", "{}", '{"weight_map": []}', '{"weight_map": null}'])
def test_an_index_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(tmp_path)
    assert re.fullmatch(
        re.escape(f"{tmp_path / INDEX_FILE}: ")
        + r"(not JSON \(.*\)|damaged, or not what its name says: .*)\. Download it again\.",
        str(caught.value),
    )


def test_a_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / SINGLE_FILE).mkdir()
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(tmp_path)
    assert str(caught.value) == f"{tmp_path / SINGLE_FILE}: is a folder, expected a regular file."


def test_files_that_may_not_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tensors = {"a": torch.ones(2)}
    folder.mkdir()
    save_file(tensors, folder / SINGLE_FILE)
    (folder / SINGLE_FILE).chmod(0)
    with unprivileged(folder), pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    assert str(caught.value) == f"{folder / SINGLE_FILE}: cannot be read (Permission denied)."
    (folder / SINGLE_FILE).rename(folder / "part.safetensors")
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
    (folder / INDEX_FILE).chmod(0)
    with unprivileged(folder), pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    assert str(caught.value) == f"{folder / INDEX_FILE}: cannot be read (Permission denied)."
