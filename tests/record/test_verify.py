"""`verify` on checkpoints that were really pruned: it agrees with what was done, and no bit can change unnoticed."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from secateur.core.patterns import NM, Pattern, Unstructured
from secateur.core.problem import Method, Problem, Solution
from secateur.errors import CheckpointError
from secateur.files.checkpoint import CARD_FILE, INDEX_FILE, SINGLE_FILE, Checkpoint, tensor_bytes
from secateur.methods.magnitude import magnitude
from secateur.methods.wanda import wanda
from secateur.models.opening.opened import open_model
from secateur.pruning.engine import prune
from secateur.record.manifest import FILE_NAME, read_manifest
from secateur.record.verify import verify
from verified_runs import PLANNED, flipped, forge

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
