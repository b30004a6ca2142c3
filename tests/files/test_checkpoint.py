"""Checkpoints on disk, read byte for byte as safetensors and transformers read them, and the files beside them."""

import json
import random
import shutil
from pathlib import Path

import psutil
import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny
from checkpoint_files import every_kind, same_bytes
from secateur.files.checkpoint import (
    DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    Checkpoint,
)
from secateur.files.folders import companions
from secateur.files.writer import CheckpointWriter
from secateur.models.flow.memory import trim

# Reading


def test_every_dtype_of_safetensors_is_known() -> None:
    from safetensors.torch import _TYPES

    assert set(DTYPES.items()) >= set(_TYPES.items())


def test_reads_what_safetensors_reads(tmp_path: Path) -> None:
    expected = every_kind()
    save_file(expected, tmp_path / SINGLE_FILE, {"format": "pt"})
    checkpoint = Checkpoint(tmp_path)
    with safetensors.safe_open(tmp_path / SINGLE_FILE, "pt") as file:
        assert set(checkpoint.names) == set(file.keys()) == set(expected)
        for name in expected:
            theirs, ours = file.get_tensor(name), checkpoint.read([name])[name]
            assert same_bytes(ours, theirs), name
            assert same_bytes(ours, expected[name]), name
            assert checkpoint.shape(name) == tuple(theirs.shape)
            assert checkpoint.dtype(name) == theirs.dtype
    assert checkpoint.headers[tmp_path / SINGLE_FILE].metadata == {"format": "pt"}


def test_reads_several_tensors_at_once_in_the_order_asked(tmp_path: Path) -> None:
    tensors = every_kind()
    save_file(tensors, tmp_path / SINGLE_FILE)
    names = random.Random(0).sample(sorted(tensors), 20)
    read = Checkpoint(tmp_path).read(names)
    assert list(read) == names
    assert all(same_bytes(read[name], tensors[name]) for name in names)


def test_what_is_read_is_a_copy_of_its_own(tmp_path: Path) -> None:
    save_file({"a": torch.arange(6.0)}, tmp_path / SINGLE_FILE)
    before = (tmp_path / SINGLE_FILE).read_bytes()
    checkpoint = Checkpoint(tmp_path)
    checkpoint.read(["a"])["a"].zero_()
    assert checkpoint.read(["a"])["a"].tolist() == [0, 1, 2, 3, 4, 5]
    assert (tmp_path / SINGLE_FILE).read_bytes() == before


def test_an_empty_file_has_no_tensors(tmp_path: Path) -> None:
    save_file({}, tmp_path / SINGLE_FILE)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.names == []
    assert checkpoint.read([]) == {}


def test_a_sharded_model_reads_as_safetensors_reads_it(llama: Path) -> None:
    checkpoint = Checkpoint(llama)
    index = json.loads((llama / INDEX_FILE).read_text())
    assert len(checkpoint.files) > 2
    assert {name: record.file.name for name, record in checkpoint.tensors.items()} == index["weight_map"]
    for file in checkpoint.files:
        for name, tensor in load_file(file).items():
            assert same_bytes(checkpoint.read([name])[name], tensor), name
    assert sum(record.bytes for record in checkpoint.tensors.values()) == index["metadata"]["total_size"]


def test_the_single_file_comes_before_the_index_as_in_transformers(llama: Path, tmp_path: Path) -> None:
    for file in llama.iterdir():
        shutil.copy(file, tmp_path)
    tiny.build("llama", seed=1).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / SINGLE_FILE).rename(tmp_path / SINGLE_FILE)
    ours = Checkpoint(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert ours.files == [tmp_path / SINGLE_FILE]
    assert all(torch.equal(ours.read([name])[name], theirs[name]) for name in ours.names)


def test_shards_outside_the_index_are_not_read(llama: Path, tmp_path: Path) -> None:
    for file in llama.iterdir():
        shutil.copy(file, tmp_path)
    save_file({"stray": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    assert Checkpoint(tmp_path).names == Checkpoint(llama).names


def test_reading_keeps_no_file_mapped_or_open(llama: Path) -> None:
    checkpoint = Checkpoint(llama)
    kept = checkpoint.read(checkpoint.names)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc here")
    assert str(llama) not in maps.read_text()
    assert not [file for file in psutil.Process().open_files() if str(llama) in file.path]
    assert len(kept) == len(checkpoint.names)


def test_reading_one_tensor_costs_the_memory_of_one_tensor(tmp_path: Path) -> None:
    size = 64 << 20
    layout = [(SINGLE_FILE, [(name, torch.uint8, (size,)) for name in "abc"])]
    writer = CheckpointWriter(tmp_path, layout)
    for name in "abc":
        writer.write(name, torch.ones(size, dtype=torch.uint8))
    writer.close()
    checkpoint, process = Checkpoint(tmp_path), psutil.Process()
    before = process.memory_info().rss
    for name in "abc":
        tensor = checkpoint.read([name])[name]
        assert int(tensor[-1]) == 1
        assert process.memory_info().rss - before < 1.5 * size
        del tensor
    trim()  # an environment that keeps freed memory (MALLOC_TRIM_THRESHOLD_) must not count
    assert process.memory_info().rss - before < 0.5 * size


# Companions


def test_companions_are_everything_but_weights_and_the_card(tmp_path: Path) -> None:
    kept = ["LICENSE", "config.json", "modeling_own.py", "tokenizer.json", "vocab.txt"]
    left = ["README.md", "model.safetensors", INDEX_FILE, "pytorch_model.bin", "x.gguf", ".gitattributes"]
    for name in [*kept, *left, "secateur.json"]:
        (tmp_path / name).write_text("{}")
    (tmp_path / "onnx").mkdir()
    assert [file.name for file in companions(tmp_path)[0]] == kept
