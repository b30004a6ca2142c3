"""Checkpoints on disk: read and written byte for byte as safetensors and transformers do it, and every way to fail."""

import errno
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import struct
from pathlib import Path

import psutil
import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny
from full_disks import file_size_limit, small_disk, unprivileged
from secateur.errors import CheckpointError
from secateur.files.checkpoint import (
    DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    Checkpoint,
    read_header,
    shard_names,
    tensor_bytes,
)
from secateur.files.folders import companions
from secateur.files.writer import CheckpointWriter
from secateur.models.flow.memory import trim

SHAPES = [(), (1,), (7,), (0,), (3, 5), (4, 0, 2), (2, 3, 4), (1, 1, 1, 1)]


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Random bytes as a tensor, so that NaN, infinities, subnormal numbers and -0.0 all occur."""
    generator = torch.Generator().manual_seed(seed)
    size = dtype.itemsize * torch.Size(shape).numel()
    high = 2 if dtype == torch.bool else 256
    data = torch.randint(0, high, (size,), generator=generator, dtype=torch.uint8)
    return data.view(dtype).view(shape)


def every_kind() -> dict[str, torch.Tensor]:
    """A tensor of each dtype and shape."""
    pairs = itertools.product(DTYPES, SHAPES)
    return {f"{name}.{shape}": random_tensor(DTYPES[name], shape, seed) for seed, (name, shape) in enumerate(pairs)}


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and tensor_bytes(one) == tensor_bytes(other)


def layout_of(*shards: dict[str, torch.Tensor]) -> list[tuple[str, list[tuple[str, torch.dtype, tuple[int, ...]]]]]:
    return [
        (file, [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()])
        for file, tensors in zip(shard_names(len(shards)), shards, strict=True)
    ]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in several shards."""
    return tiny.save("llama", tmp_path_factory.mktemp("llama") / "model", max_shard_size="40KB")


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
        (tmp_path / file.name).symlink_to(file)
    tiny.build("llama", seed=1).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / SINGLE_FILE).rename(tmp_path / SINGLE_FILE)
    ours = Checkpoint(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert ours.files == [tmp_path / SINGLE_FILE]
    assert all(torch.equal(ours.read([name])[name], theirs[name]) for name in ours.names)


def test_shards_outside_the_index_are_not_read(llama: Path, tmp_path: Path) -> None:
    for file in llama.iterdir():
        (tmp_path / file.name).symlink_to(file)
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


# Files that are damaged


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


# Writing


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


# Companions


def test_companions_are_everything_but_weights_and_the_card(tmp_path: Path) -> None:
    kept = ["LICENSE", "config.json", "modeling_own.py", "tokenizer.json", "vocab.txt"]
    left = ["README.md", "model.safetensors", INDEX_FILE, "pytorch_model.bin", "x.gguf", ".gitattributes"]
    for name in [*kept, *left, "secateur.json"]:
        (tmp_path / name).write_text("{}")
    (tmp_path / "onnx").mkdir()
    assert [file.name for file in companions(tmp_path)[0]] == kept
