"""`verify` on checkpoints that were really pruned: it agrees with what was done, and no bit can change unnoticed."""

import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import tiny
from secateur.core.patterns import NM, Pattern, Unstructured
from secateur.core.problem import Method, Problem, Solution, chain
from secateur.errors import CheckpointError
from secateur.files.checkpoint import CARD_FILE, INDEX_FILE, SINGLE_FILE, Checkpoint, tensor_bytes
from secateur.methods import METHODS, REFINEMENTS
from secateur.methods.magnitude import magnitude
from secateur.methods.wanda import wanda
from secateur.models.opening.opened import open_model
from secateur.pruning.engine import prune
from secateur.record.manifest import FILE_NAME, Manifest, file_digests, read_manifest, tensor_digest
from secateur.record.verify import only_chooses, verify

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


# What holds


def test_a_pruned_model_is_what_its_manifest_says(kept: Path, dense: Path) -> None:
    result, source = verify(kept), Checkpoint(dense)
    assert result.problems == []
    assert result.ok
    assert result.compared_to is None
    assert (result.folder, result.tensors) == (kept, len(source.names))
    assert result.matrices == 9
    assert result.weights == 9 * 32 * 48
    assert result.zeros == result.weights // 2
    assert result.sparsity == 0.5


def test_and_its_source_agrees(kept: Path, dense: Path) -> None:
    calls: list[tuple[int, int]] = []
    result = verify(kept, Checkpoint(dense), lambda done, total: calls.append((done, total)))
    assert result.problems == []
    assert result.compared_to == str(dense)
    assert calls == [(number + 1, result.tensors) for number in range(result.tensors)]


def test_what_verify_promises_is_so(kept: Path, dense: Path) -> None:
    before, after = Checkpoint(dense), Checkpoint(kept)
    assert after.names == before.names
    changed = [n for n in before.names if tensor_bytes(before.read([n])[n]) != tensor_bytes(after.read([n])[n])]
    assert sorted(changed) == sorted(read_manifest(kept).plan) == sorted(n for n in before.names if ".mlp." in n)
    for name in changed:
        old, new = before.read([name])[name], after.read([name])[name]
        removed = new == 0
        assert torch.equal(new.view(torch.int32), torch.where(removed, 0, old).view(torch.int32))
        assert (~removed).view(old.shape[0], -1, 4).sum(dim=2).eq(2).all()
    for file in dense.iterdir():
        if file.suffix != ".safetensors" and file.name != INDEX_FILE:
            assert (kept / file.name).read_bytes() == file.read_bytes(), file.name


SELECTIONS: list[tuple[str, Pattern, tuple[str, ...]]] = [
    ("llama_tied", Unstructured(0.5), ()),
    ("gpt2", NM(2, 4), ()),  # stores (in, out)
    ("gpt2", Unstructured(0.3, "row"), ()),
    ("mixtral", NM(1, 4), ()),  # one tensor per expert
    ("llama4_text", NM(2, 4), ()),  # fused experts
    ("gpt_oss", Unstructured(0.6, "matrix"), ()),
    ("qwen2", Unstructured(0.5, "search"), ()),
    ("opt", Unstructured(0.0), ()),
    ("mamba", Unstructured(0.5), ("*in_proj*",)),
    ("zamba", Unstructured(0.5), ()),  # shares blocks
]


@pytest.mark.parametrize(("name", "pattern", "only"), SELECTIONS, ids=lambda value: str(value))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_kind_of_storage(
    name: str, pattern: Pattern, only: tuple[str, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    tiny.build(name, dtype=dtype).save_pretrained(tmp_path / "dense")
    method = wanda() if not isinstance(pattern, Unstructured) or pattern.sparsity else magnitude()
    calibration = tiny.tokens(16, 32)
    manifest = prune(
        tmp_path / "dense", method=method, pattern=pattern, calibration=calibration, only=only, output=tmp_path / "out"
    )
    result = verify(tmp_path / "out", Checkpoint(tmp_path / "dense"))
    assert result.problems == []
    assert result.matrices == len(manifest.matrices) == len(manifest.plan)
    assert result.zeros == manifest.totals["zeros"]
    assert result.sparsity == pytest.approx(manifest.totals["sparsity"])
    other = tmp_path / "other"
    tiny.build(name, seed=1, dtype=dtype).save_pretrained(other)
    problems = verify(tmp_path / "out", Checkpoint(other)).problems
    planned = {entry["tensor"] for entry in manifest.matrices.values()}
    reported = {text.partition(": the source is not the one that was pruned")[0] for text in problems} & planned
    assert reported == planned


@pytest.mark.parametrize("method", [wanda, magnitude])
def test_a_module_in_memory_verifies_against_its_files(
    method: Callable[[], Method], dense: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense)
    prune(model, method=method(), pattern=Unstructured(0.5), calibration=tiny.tokens(), output=tmp_path / "out")
    assert verify(tmp_path / "out", Checkpoint(dense)).problems == []
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(value, written[name]) for name, value in model.state_dict().items())


def test_a_module_verifies_as_a_source_too(kept: Path, dense: Path) -> None:
    opened = open_model(AutoModelForCausalLM.from_pretrained(dense))
    assert verify(kept, opened.skeleton.source).problems == []


def test_methods_that_move_the_kept_weights_verify(dense: Path, tmp_path: Path) -> None:
    def halved(problem: Problem) -> Solution:
        mask = problem.pattern.mask(problem.weight.abs())
        return Solution(problem.weight * mask * 0.5, mask)

    manifest = prune(dense, method=Method("halved", halved), output=tmp_path / "out")
    assert not any(entry["kept_identical"] for entry in manifest.matrices.values())
    assert verify(tmp_path / "out", Checkpoint(dense)).problems == []


def test_weight_times_mask_leaves_no_negative_zero(dense: Path, tmp_path: Path) -> None:
    def masked(problem: Problem) -> Solution:
        mask = problem.pattern.mask(problem.weight.abs())
        return Solution(problem.weight * mask, mask)

    prune(dense, method=Method("masked", masked), output=tmp_path / "out")
    assert verify(tmp_path / "out", Checkpoint(dense)).problems == []
    weight = Checkpoint(tmp_path / "out").read([PLANNED])[PLANNED]
    assert not bool((weight.signbit() & weight.eq(0)).any())


def test_a_pruned_model_pruned_again_verifies_against_the_first(kept: Path, tmp_path: Path) -> None:
    prune(kept, method=magnitude(), pattern=Unstructured(0.75), output=tmp_path / "out")
    assert verify(tmp_path / "out", Checkpoint(kept)).problems == []
    assert read_manifest(tmp_path / "out").method == "magnitude"


def test_moving_and_renaming_the_folder_changes_nothing(pruned: Path, dense: Path) -> None:
    moved = pruned.rename(pruned.with_name("elsewhere"))
    assert verify(moved, Checkpoint(dense)).ok


# No bit can change unnoticed


def positions(folder: Path) -> dict[str, list[tuple[Path, int]]]:
    """Every byte of the folder, by the kind of place where it lies: {kind: [(file, position)]}."""
    checkpoint, planned = Checkpoint(folder), set(read_manifest(folder).plan)
    places: dict[str, list[tuple[Path, int]]] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix != ".safetensors":
            places[file.name] = [(file, position) for position in range(file.stat().st_size)]
            continue
        header = checkpoint.headers[file]
        start = min(record.start for record in header.tensors.values())
        places[f"{file.name}, length"] = [(file, position) for position in range(8)]
        places[f"{file.name}, header"] = [(file, position) for position in range(8, start)]
        for name, record in header.tensors.items():
            kind = f"{file.name}, {'planned' if name in planned else 'unplanned'}"
            places.setdefault(kind, []).extend((file, position) for position in range(record.start, record.end))
    return places


def test_a_flipped_bit_anywhere_is_reported(pruned: Path) -> None:
    places = positions(pruned)
    assert sum(map(len, places.values())) == sum(file.stat().st_size for file in pruned.iterdir())
    assert {FILE_NAME, INDEX_FILE, "config.json", "generation_config.json", "tokenizer.json", "LICENSE"} < set(places)
    assert sum("unplanned" in kind for kind in places) > 2
    assert sum(kind.endswith(", planned") for kind in places) > 2
    checkpoint, generator = Checkpoint(pruned), random.Random(0)
    assert places.pop(CARD_FILE)  # people go on writing it
    for kind, bytes_ in places.items():
        for file, position in generator.sample(bytes_, 8):
            bit = generator.randrange(8)
            with flipped(file, position, bit):
                try:
                    problems = verify(pruned).problems
                except CheckpointError as error:
                    problems = [str(error)]
            where = [file.name]
            if kind.endswith("planned"):
                where = [n for n, r in checkpoint.tensors.items() if r.file == file and r.start <= position < r.end]
            elif file.name == INDEX_FILE:
                where += [shard.name for shard in checkpoint.files] + [str(pruned)]
            assert any(name in problem for problem in problems for name in where), (kind, position, bit, problems)
    assert verify(pruned).ok


def test_every_bit_of_a_header_counts(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path / "dense")
    prune(tmp_path / "dense", method=magnitude(), output=tmp_path / "out", only=["*.0.mlp.up_proj"])
    file = tmp_path / "out" / SINGLE_FILE
    (digest,) = read_manifest(tmp_path / "out").headers.values()
    start = min(record.start for record in Checkpoint(file.parent).tensors.values())
    for position, bit in random.Random(1).sample([(p, b) for p in range(start) for b in range(8)], 500):
        with flipped(file, position, bit):
            try:
                found = Checkpoint(file.parent).headers[file].digest
            except CheckpointError:
                continue
        assert found != digest, (position, bit)


def test_every_bit_of_the_manifest_counts(pruned: Path) -> None:
    file = pruned / FILE_NAME
    size = file.stat().st_size
    for position, bit in random.Random(2).sample([(p, b) for p in range(size) for b in range(8)], 600):
        with flipped(file, position, bit), pytest.raises(CheckpointError, match=FILE_NAME):
            read_manifest(pruned)
    assert verify(pruned).ok


def test_the_same_values_spelled_differently_are_reported(pruned: Path) -> None:
    forge(pruned, lambda manifest: manifest.seconds.update(total=0.1 + 0.2, solve=1e-07))
    text = (pruned / FILE_NAME).read_text()
    for one, other in (("0.30000000000000004", "0.30000000000000005"), ("1e-07", "1E-07"), ("{\n", "{ \n")):
        altered = text.replace(one, other, 1)
        assert altered != text
        assert json.loads(altered) == json.loads(text)
        (pruned / FILE_NAME).write_text(altered)
        with pytest.raises(CheckpointError) as caught:
            verify(pruned)
        assert str(caught.value) == (
            f"{pruned / FILE_NAME}: altered since it was written: the same values, spelled differently."
        )
    (pruned / FILE_NAME).write_text(text)
    assert verify(pruned).ok


# Files and tensors that come and go


def test_no_manifest(dense: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        verify(dense)
    assert str(caught.value) == (f"{dense}: no {FILE_NAME} in it; only checkpoints that Secateur wrote have one.")


def test_a_manifest_of_another_format(pruned: Path) -> None:
    value = json.loads((pruned / FILE_NAME).read_text())
    (pruned / FILE_NAME).write_text(json.dumps(value | {"format": 99}))
    with pytest.raises(CheckpointError) as caught:
        verify(pruned)
    assert str(caught.value) == (f"{pruned / FILE_NAME}: format 99, expected 1; another version of Secateur wrote it.")


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "{}", '{"digest": "0"}', '"digest"'])
def test_a_manifest_that_is_none(text: str, pruned: Path) -> None:
    (pruned / FILE_NAME).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        verify(pruned)
    assert str(caught.value).startswith(f"{pruned / FILE_NAME}: {'damaged' if text else 'not JSON'}")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "LICENSE"])
def test_a_missing_file(name: str, pruned: Path) -> None:
    (pruned / name).unlink()
    assert verify(pruned).problems == [f"{name}: the file is missing"]


def test_a_changed_file(pruned: Path) -> None:
    (pruned / "config.json").write_text((pruned / "config.json").read_text() + "\n")
    assert verify(pruned).problems == ["config.json: the file differs from the one that was written"]


def test_a_model_card_may_be_added(pruned: Path) -> None:
    (pruned / "README.md").write_text("# Mine\n")
    assert verify(pruned).ok


def test_a_missing_shard(pruned: Path) -> None:
    shard = Checkpoint(pruned).files[1]
    shard.unlink()
    with pytest.raises(CheckpointError) as caught:
        verify(pruned)
    assert str(caught.value) == (
        f"{shard}: the shard is missing, and {INDEX_FILE} lists it ({len(read_manifest(pruned).headers)} shards "
        "expected). Download the checkpoint again."
    )


def test_a_missing_index(pruned: Path) -> None:
    (pruned / INDEX_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"no {SINGLE_FILE} and no {INDEX_FILE} in it"):
        verify(pruned)


def test_a_missing_index_of_a_shard_that_is_one_no_more(pruned: Path) -> None:
    """Without the index, a single file beside the shards would be taken for the model."""
    (pruned / INDEX_FILE).unlink()
    checkpoint = load_file(next(iter(sorted(pruned.glob("*.safetensors")))))
    save_file(checkpoint, pruned / SINGLE_FILE)
    problems = verify(pruned).problems
    assert f"{INDEX_FILE}: the file is missing" in problems
    assert f"{SINGLE_FILE}: a shard that was not written by the run" in problems
    assert f"{PLANNED}: the tensor is missing" in problems or f"{UNPLANNED}: the tensor is missing" in problems


def test_an_extra_shard(pruned: Path) -> None:
    save_file({"extra": torch.ones(2)}, pruned / "extra.safetensors")
    assert verify(pruned).problems == ["extra.safetensors: a shard that was not written by the run"]


def test_a_single_file_that_would_be_loaded_in_place_of_the_shards(pruned: Path) -> None:
    save_file({"extra": torch.ones(2)}, pruned / SINGLE_FILE, {"format": "pt"})
    result = verify(pruned)
    assert f"{SINGLE_FILE}: a shard that was not written by the run" in result.problems
    assert f"{PLANNED}: the tensor is missing" in result.problems
    assert "extra: its bytes differ from those that were written" in result.problems


def test_an_index_beside_a_single_file(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path / "dense")
    prune(tmp_path / "dense", method=magnitude(), output=tmp_path / "out")
    assert verify(tmp_path / "out").ok
    (tmp_path / "out" / INDEX_FILE).write_text("{}")
    assert verify(tmp_path / "out").problems == [f"{INDEX_FILE}: an index that was not written by the run"]


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> str:
    """Rewrite the shard that holds PLANNED, with its index to match; returns its name."""
    file = Checkpoint(folder).tensors[PLANNED].file
    tensors = load_file(file)
    before = set(tensors)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    index = json.loads((folder / INDEX_FILE).read_text())
    for name in before - set(tensors):
        del index["weight_map"][name]
    index["weight_map"].update(dict.fromkeys(tensors, file.name))
    (folder / INDEX_FILE).write_text(json.dumps(index))
    return file.name


def test_a_renamed_tensor(pruned: Path, dense: Path) -> None:
    file = rewrite(pruned, lambda tensors: tensors.update(renamed=tensors.pop(PLANNED)))
    expected = [
        f"{file}: its header differs from the one that was written",
        f"{PLANNED}: the tensor is missing",
        f"{INDEX_FILE}: the file differs from the one that was written",
        "renamed: its bytes differ from those that were written",
    ]
    assert verify(pruned).problems == expected
    absent = [f"{PLANNED}: absent from the pruned checkpoint", "renamed: absent from the source"]
    assert verify(pruned, Checkpoint(dense)).problems == expected[:3] + absent + expected[3:]


def test_a_tensor_less(pruned: Path) -> None:
    file = rewrite(pruned, lambda tensors: tensors.pop(PLANNED) is None)
    assert verify(pruned).problems == [
        f"{file}: its header differs from the one that was written",
        f"{PLANNED}: the tensor is missing",
        f"{INDEX_FILE}: the file differs from the one that was written",
    ]


@pytest.mark.parametrize("change", [lambda t: t.t().contiguous(), lambda t: t[:, :6], lambda t: t.unsqueeze(0)])
def test_a_planned_matrix_of_another_shape(change: Callable[[Tensor], Tensor], pruned: Path, dense: Path) -> None:
    rewrite(pruned, lambda tensors: tensors.update({PLANNED: change(tensors[PLANNED]).contiguous()}))
    shape = tuple(Checkpoint(pruned).shape(PLANNED))
    problems = verify(pruned, Checkpoint(dense)).problems
    assert f"{PLANNED}: its bytes differ from those that were written" in problems or shape == (1, 48, 32)
    assert f"{PLANNED}: of shape {list(shape)}, the manifest records [48, 32]" in problems
    assert f"{PLANNED}: {shape} torch.float32, the source has (48, 32) torch.float32" in problems


def test_another_dtype_of_the_same_bytes(pruned: Path, dense: Path) -> None:
    rewrite(pruned, lambda tensors: tensors.update({UNPLANNED: tensors[UNPLANNED].view(torch.int32)}))
    forge(pruned)
    assert verify(pruned).ok  # nothing in the files tells; the source does
    assert verify(pruned, Checkpoint(dense)).problems == [
        f"{UNPLANNED}: (32, 32) torch.int32, the source has (32, 32) torch.float32"
    ]


# Weights that are not what they should be


def first_zero(folder: Path, name: str) -> tuple[int, int]:
    row, column = Checkpoint(folder).read([name])[name].eq(0).nonzero()[5].tolist()
    return row, column


def test_a_zero_filled_by_a_value_breaks_the_pattern(pruned: Path, dense: Path) -> None:
    row, column = first_zero(pruned, PLANNED)
    edit(pruned, PLANNED, lambda tensor: tensor[row, column].fill_(1e-20))
    start = column // 4 * 4
    pattern = f"{PLANNED}: row {row}, columns {start} to {start + 3}: 3 non-zeros, expected at most 2"
    zeros = f"{PLANNED}: 767 zeros, the manifest records 768"
    assert verify(pruned).problems == [f"{PLANNED}: its bytes differ from those that were written", pattern, zeros]
    forge(pruned)
    assert verify(pruned).problems == [pattern, zeros]
    kept_weight = f"{PLANNED}: a kept weight is not bit-identical to the source, or a zero is -0.0"
    assert verify(pruned, Checkpoint(dense)).problems == [pattern, zeros, kept_weight]


@pytest.mark.parametrize(
    ("per", "expected"),
    [("row", "row {row} has 15 zeros"), ("matrix", "the matrix has 767 zeros")],
)
def test_unstructured_patterns_count_their_zeros(per: str, expected: str, dense: Path, tmp_path: Path) -> None:
    prune(dense, method=magnitude(), pattern=Unstructured(0.5, per), output=tmp_path / "out")
    row, column = first_zero(tmp_path / "out", PLANNED)
    edit(tmp_path / "out", PLANNED, lambda tensor: tensor[row, column].fill_(1.0))
    forge(tmp_path / "out")
    first, second = verify(tmp_path / "out").problems
    assert first.startswith(f"{PLANNED}: {expected.format(row=row)}")
    assert second == f"{PLANNED}: 767 zeros, the manifest records 768"


def test_a_kept_weight_that_differs_in_its_last_bit(pruned: Path, dense: Path) -> None:
    row, column = Checkpoint(pruned).read([PLANNED])[PLANNED].nonzero()[7].tolist()
    edit(pruned, PLANNED, lambda tensor: tensor.view(torch.int32)[row, column].bitwise_xor_(1))
    assert verify(pruned).problems == [f"{PLANNED}: its bytes differ from those that were written"]
    forge(pruned)
    assert verify(pruned).ok
    assert verify(pruned, Checkpoint(dense)).problems == [
        f"{PLANNED}: a kept weight is not bit-identical to the source, or a zero is -0.0"
    ]


def test_one_zero_too_many(pruned: Path, dense: Path) -> None:
    row, column = Checkpoint(pruned).read([PLANNED])[PLANNED].nonzero()[7].tolist()
    edit(pruned, PLANNED, lambda tensor: tensor[row, column].zero_())
    forge(pruned)
    assert verify(pruned, Checkpoint(dense)).problems == [f"{PLANNED}: 769 zeros, the manifest records 768"]


def test_a_negative_zero(pruned: Path, dense: Path) -> None:
    row, column = first_zero(pruned, PLANNED)
    edit(pruned, PLANNED, lambda tensor: tensor[row, column].fill_(-0.0))
    assert verify(pruned).problems == [f"{PLANNED}: its bytes differ from those that were written"]
    forge(pruned)
    assert verify(pruned, Checkpoint(dense)).problems == [
        f"{PLANNED}: a kept weight is not bit-identical to the source, or a zero is -0.0"
    ]


def test_a_negative_zero_in_an_unplanned_tensor(pruned: Path, dense: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(dense, tmp_path / "source"))
    edit(source, UNPLANNED, lambda tensor: tensor[0, 0].fill_(0.0))
    edit(pruned, UNPLANNED, lambda tensor: tensor[0, 0].fill_(-0.0))
    forge(pruned)
    assert verify(pruned, Checkpoint(source)).problems == [
        f"{UNPLANNED}: not planned, yet its bytes differ from the source"
    ]


def test_nan_compares_by_its_bits(pruned: Path, dense: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(dense, tmp_path / "source"))
    for folder in (source, pruned):
        edit(folder, UNPLANNED, lambda tensor: tensor[0, 0].fill_(float("nan")))
    forge(pruned)
    assert verify(pruned, Checkpoint(source)).ok


@pytest.mark.parametrize("name", [PLANNED, UNPLANNED, "model.embed_tokens.weight", "model.norm.weight"])
def test_the_source_is_compared_tensor_by_tensor(name: str, kept: Path, dense: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(dense, tmp_path / "source"))
    zero = (0,) * len(Checkpoint(source).shape(name))
    if name == PLANNED:
        zero = first_zero(kept, PLANNED)
    edit(source, name, lambda tensor: tensor[zero].add_(1.0))
    problem = (
        "the source is not the one that was pruned; its bytes differ from the record"
        if name == PLANNED
        else "not planned, yet its bytes differ from the source"
    )
    assert verify(kept, Checkpoint(source)).problems == [f"{name}: {problem}"]


def test_a_source_of_another_seed_differs_in_every_tensor(kept: Path, tmp_path: Path) -> None:
    tiny.build("llama", seed=1).save_pretrained(tmp_path / "other")
    result = verify(kept, Checkpoint(tmp_path / "other"))
    assert result.compared_to == str(tmp_path / "other")
    names = Checkpoint(kept).names
    assert {problem.partition(":")[0] for problem in result.problems} == set(names)
    planned = [name for name in names if ".mlp." in name]
    assert sum("the source is not the one that was pruned" in problem for problem in result.problems) == len(planned)


def test_a_source_in_another_dtype(kept: Path, dense: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    result = verify(kept, Checkpoint(tmp_path / "half"))
    assert len(result.problems) == result.tensors
    assert f"{PLANNED}: (48, 32) torch.float32, the source has (48, 32) torch.bfloat16" in result.problems


def test_a_source_of_another_architecture(kept: Path, tmp_path: Path) -> None:
    tiny.save("llama_tied", tmp_path / "tied")
    assert "lm_head.weight: absent from the source" in verify(kept, Checkpoint(tmp_path / "tied")).problems
    tiny.save("llama_bias", tmp_path / "bias")
    problems = verify(kept, Checkpoint(tmp_path / "bias")).problems
    assert "model.layers.0.mlp.up_proj.bias: absent from the pruned checkpoint" in problems


def test_a_planned_matrix_without_a_record(pruned: Path) -> None:
    forge(pruned, lambda manifest: manifest.matrices.pop(PLANNED) is None)
    assert verify(pruned).problems == [f"{PLANNED}: planned, but the manifest has no record of pruning it"]


def test_the_unplanned_experts_of_a_fused_tensor(tmp_path: Path) -> None:
    tiny.save("llama4_text", tmp_path / "dense")
    tensor = "model.layers.1.feed_forward.experts.down_proj"
    prune(tmp_path / "dense", method=magnitude(), only=[f"{tensor}.0", f"{tensor}.2"], output=tmp_path / "out")
    source = Checkpoint(tmp_path / "dense")
    assert verify(tmp_path / "out", source).ok
    edit(tmp_path / "out", tensor, lambda value: value[1, 3, 3].add_(1.0))
    forge(tmp_path / "out")
    assert verify(tmp_path / "out").ok
    assert verify(tmp_path / "out", source).problems == [
        f"{tensor}.1: not planned, yet its bytes differ from the source"
    ]


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


# Files that were added


ADDED = (
    "chat_template.jinja",
    "additional_chat_templates/rag.jinja",
    "pytorch_model.bin",
    "modeling_own.py",
    "tokenizer.model",
    "generation_config.json",
    "model.gguf",
    "deep/down/vocab.txt",
    "deep/config.json",
    "license.py",
    ".hidden.json",
    "mcmodel",
)


@pytest.mark.parametrize("name", ADDED)
def test_a_file_that_was_added(name: str, pruned: Path) -> None:
    (pruned / name).parent.mkdir(parents=True, exist_ok=True)
    (pruned / name).unlink(missing_ok=True)
    (pruned / name).write_text("{}")
    if name in read_manifest(pruned).files:
        assert verify(pruned).problems == [f"{name}: the file differs from the one that was written"]
    else:
        problem = f"{name}: not written by the run, and it may change what is loaded; move it away"
        assert verify(pruned).problems == [problem]


def test_an_adapter_that_was_added_is_refused_as_every_command_does(pruned: Path) -> None:
    (pruned / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    with pytest.raises(CheckpointError, match=r"adapter_config.json, the adapter for elsewhere .*Move adapter_config"):
        verify(pruned)


def test_links_and_shards_that_were_added(pruned: Path, dense: Path) -> None:
    (pruned / "additional_chat_templates").symlink_to(dense)
    (pruned / "more").mkdir()
    shutil.copy(next(dense.glob("*.safetensors")), pruned / "more" / "adapter_model.safetensors")
    assert verify(pruned).problems == [
        "additional_chat_templates: not written by the run, and it may change what is loaded; move it away",
        "more/adapter_model.safetensors: a shard that was not written by the run",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "NOTES.md",
        "LICENSE-APACHE",
        "NOTICE.txt",
        ".gitattributes",
        ".git/config",
        "report/index.html",
        "report/matrices.csv",
        "images/a.png",
        ".cache/huggingface/download/x.metadata",
    ],
)
def test_a_harmless_file_that_was_added(name: str, pruned: Path) -> None:
    (pruned / name).parent.mkdir(parents=True, exist_ok=True)
    (pruned / name).write_text("{}")
    assert verify(pruned).problems == []


def test_a_file_that_became_a_pipe_is_not_waited_for(pruned: Path) -> None:
    (pruned / "tokenizer.json").unlink()
    os.mkfifo(pruned / "tokenizer.json")
    assert verify(pruned).problems == ["tokenizer.json: the file is missing"]


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
