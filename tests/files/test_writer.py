"""Checkpoints written as safetensors and transformers expect them, and disks without room or permission."""

import errno
import hashlib
import json
import os
import random
import re
import struct
from pathlib import Path

import psutil
import pytest
import safetensors
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tiny
from checkpoint_files import every_kind, layout_of, same_bytes
from full_disks import file_size_limit, small_disk, unprivileged
from secateur.errors import CheckpointError
from secateur.files.checkpoint import (
    INDEX_FILE,
    SINGLE_FILE,
    Checkpoint,
    shard_names,
    tensor_bytes,
)
from secateur.files.folders import companions
from secateur.files.writer import CheckpointWriter


@pytest.mark.parametrize("seed", range(3))
def test_written_in_any_order_it_reads_the_same(seed: int, tmp_path: Path) -> None:
    tensors = every_kind()
    names = list(tensors)
    random.Random(seed).shuffle(names)
    writer = CheckpointWriter(tmp_path, layout_of(tensors))
    for name in names:
        digest = writer.write(name, tensors[name])
        assert digest == hashlib.sha256(tensor_bytes(tensors[name])).hexdigest()
    writer.close()
    with safetensors.safe_open(tmp_path / SINGLE_FILE, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
    loaded, ours = load_file(tmp_path / SINGLE_FILE), Checkpoint(tmp_path)
    for name, tensor in tensors.items():
        assert same_bytes(loaded[name], tensor), name
        assert same_bytes(ours.read([name])[name], tensor), name
    assert not (tmp_path / INDEX_FILE).exists()
    assert ours.headers[tmp_path / SINGLE_FILE].digest == writer.header_digests[SINGLE_FILE]
    assert ours.names == list(tensors)


def test_the_order_of_writing_leaves_no_trace(tmp_path: Path) -> None:
    tensors, digests = every_kind(), set()
    for seed in range(3):
        folder = tmp_path / str(seed)
        folder.mkdir()
        names = list(tensors)
        random.Random(seed).shuffle(names)
        writer = CheckpointWriter(folder, layout_of(tensors))
        for name in names:
            writer.write(name, tensors[name])
        writer.close()
        digests.add(hashlib.sha256((folder / SINGLE_FILE).read_bytes()).hexdigest())
    assert len(digests) == 1


def test_views_are_written_as_what_they_show(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    tensors = {"t": base.t(), "slice": base[1:3, ::2], "expanded": base[:1].expand(3, 6), "grad": base.clone()}
    tensors["grad"].requires_grad_()
    writer = CheckpointWriter(tmp_path, layout_of(tensors))
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()
    loaded = load_file(tmp_path / SINGLE_FILE)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_the_data_is_aligned_to_eight_bytes(tmp_path: Path) -> None:
    for size in range(1, 9):
        folder = tmp_path / str(size)
        folder.mkdir()
        CheckpointWriter(folder, [(SINGLE_FILE, [("n" * size, torch.float32, (2,))])]).close()
        (length,) = struct.unpack("<Q", (folder / SINGLE_FILE).read_bytes()[:8])
        assert length % 8 == 0


def test_sharded_as_transformers_expects_it(llama: Path, tmp_path: Path) -> None:
    source = Checkpoint(llama)
    writer = CheckpointWriter(tmp_path, source.layout())
    assert set(writer.missing) == set(source.names)
    names = list(source.names)
    random.Random(0).shuffle(names)
    for count, name in enumerate(names):
        assert len(writer.missing) == len(names) - count
        writer.write(name, source.read([name])[name])
        writer.flush()
    assert writer.missing == []
    writer.close()
    for file in companions(llama)[0]:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    theirs, ours = json.loads((llama / INDEX_FILE).read_text()), json.loads((tmp_path / INDEX_FILE).read_text())
    assert ours["weight_map"] == theirs["weight_map"]
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"] == writer.total_bytes
    one, other = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (llama, tmp_path))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert {file.name: header.digest for file, header in Checkpoint(tmp_path).headers.items()} == writer.header_digests


@pytest.mark.parametrize("name", ["llama_tied", "mixtral", "gpt2", "mamba"])
def test_a_copy_through_the_writer_loads_as_the_same_model(name: str, tmp_path: Path) -> None:
    source = Checkpoint(tiny.save(name, tmp_path / "source"))
    (tmp_path / "copy").mkdir()
    writer = CheckpointWriter(tmp_path / "copy", source.layout())
    for tensor in reversed(source.names):
        writer.write(tensor, source.read([tensor])[tensor])
    writer.close()
    for file in companions(source.folder)[0]:
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", output_loading_info=True)
    assert not any(info.values()), info
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "source").state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_files_are_readable_by_others_as_their_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        CheckpointWriter(tmp_path, layout_of({"a": torch.ones(1)})).close()
    finally:
        os.umask(before)
    assert (tmp_path / SINGLE_FILE).stat().st_mode & 0o777 == 0o640


def test_a_tensor_of_the_wrong_size_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, layout_of({"a": torch.ones(4), "b": torch.ones(4)}))
    writer.write("a", torch.arange(4.0))
    before = (tmp_path / SINGLE_FILE).read_bytes()
    for wrong in (torch.ones(3), torch.ones(5), torch.ones(4, dtype=torch.float64), torch.ones(0)):
        with pytest.raises(CheckpointError) as caught:
            writer.write("b", wrong)
        size = wrong.numel() * wrong.element_size()
        assert str(caught.value) == f"b: {size} bytes to write into {SINGLE_FILE}, expected 16."
    assert writer.missing == ["b"]
    assert set(writer.digests) == {"a"}
    writer.close()
    assert (tmp_path / SINGLE_FILE).read_bytes() == before


def test_a_second_write_counts(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, layout_of({"a": torch.ones(4)}))
    first, second = writer.write("a", torch.ones(4)), writer.write("a", torch.zeros(4))
    writer.close()
    assert first != second == writer.digests["a"]
    assert load_file(tmp_path / SINGLE_FILE)["a"].tolist() == [0, 0, 0, 0]


def test_closing_twice_is_harmless_and_leaves_no_descriptor(tmp_path: Path) -> None:
    before = psutil.Process().num_fds()
    writer = CheckpointWriter(tmp_path, layout_of({"a": torch.ones(4)}, {"b": torch.ones(2)}))
    assert psutil.Process().num_fds() == before + 2
    writer.close()
    writer.close()
    assert psutil.Process().num_fds() == before


def test_existing_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / SINGLE_FILE).write_bytes(b"precious")
    with pytest.raises(CheckpointError, match="File exists"):
        CheckpointWriter(tmp_path, layout_of({"a": torch.ones(4)}))
    assert (tmp_path / SINGLE_FILE).read_bytes() == b"precious"


# No room, no permission


def test_a_full_disk_is_found_out_before_anything_is_written(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 256) as disk:
        before = psutil.Process().num_fds()
        layout = layout_of({"a": torch.ones(20_000)}, {"b": torch.ones(50_000)})
        with pytest.raises(CheckpointError) as caught:
            CheckpointWriter(disk, layout)
        size = 200_000 + 8 + struct.unpack("<Q", header_length(tmp_path, layout[1]))[0]
        assert str(caught.value) == (
            f"{disk / shard_names(2)[1]}: cannot reserve {size:,} bytes (No space left on device). "
            "Free some space or choose another output folder."
        )
        assert psutil.Process().num_fds() == before


def header_length(folder: Path, shard: tuple[str, list[tuple[str, torch.dtype, tuple[int, ...]]]]) -> bytes:
    other = folder / "elsewhere"
    other.mkdir()
    CheckpointWriter(other, [shard]).close()
    return (other / shard[0]).read_bytes()[:8]


def test_space_is_reserved_so_that_a_disk_that_fills_up_later_does_no_harm(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 256) as disk:
        writer = CheckpointWriter(disk, layout_of({"a": torch.ones(40_000)}))
        with pytest.raises(OSError) as full, (disk / "filler").open("wb", buffering=0) as filler:  # noqa: PT012
            while True:
                filler.write(b"x" * 4096)
        assert full.value.errno == errno.ENOSPC
        writer.write("a", torch.full((40_000,), 3.0))
        writer.close()
        assert load_file(disk / SINGLE_FILE)["a"].unique().tolist() == [3.0]


def test_no_room_for_the_index(tmp_path: Path) -> None:
    names = {f"{'n' * 200}.{number}": torch.ones(1) for number in range(500)}
    shards = [dict(list(names.items())[:250]), dict(list(names.items())[250:])]
    with small_disk(tmp_path / "disk", 180) as disk, pytest.raises(CheckpointError) as caught:
        CheckpointWriter(disk, layout_of(*shards))
    assert str(caught.value) == (
        f"{tmp_path / 'disk' / INDEX_FILE}: cannot be written (No space left on device). "
        "Free some space or choose another output folder."
    )


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    with file_size_limit(4096), pytest.raises(CheckpointError) as caught:
        CheckpointWriter(tmp_path, layout_of({"a": torch.ones(2000)}))
    assert re.fullmatch(
        re.escape(f"{tmp_path / SINGLE_FILE}: cannot reserve ")
        + r"8,\d\d\d bytes \(File too large\)\. Free some space or choose another output folder\.",
        str(caught.value),
    )


def test_a_write_that_fails_later_names_the_file(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, layout_of({"a": torch.ones(2000)}))
    with file_size_limit(4096), pytest.raises(CheckpointError) as caught:
        writer.write("a", torch.ones(2000))
    assert str(caught.value) == (
        f"{tmp_path / SINGLE_FILE}: cannot be written (File too large). "
        "Free some space or choose another output folder."
    )
    assert writer.missing == ["a"]
    writer.write("a", torch.ones(2000))
    writer.close()
    assert load_file(tmp_path / SINGLE_FILE)["a"].sum() == 2000


def test_no_permission(tmp_path: Path) -> None:
    folder = tmp_path / "read-only"
    folder.mkdir()
    folder.chmod(0o555)
    with unprivileged(folder), pytest.raises(CheckpointError) as caught:
        CheckpointWriter(folder, layout_of({"a": torch.ones(4)}))
    assert re.fullmatch(
        re.escape(f"{folder / SINGLE_FILE}: cannot reserve ")
        + r"\d+ bytes \(Permission denied\)\. Free some space or choose another output folder\.",
        str(caught.value),
    )
    assert list(folder.iterdir()) == []
