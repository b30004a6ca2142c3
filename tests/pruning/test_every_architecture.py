"""Every architecture is pruned as planned and nowhere else, from a folder as in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import tiny
from pruned_checkpoints import (
    LENGTH,
    NEVER_SEEN,
    PATTERNS,
    SAMPLES,
    STREAMED,
    assert_same_tensors,
    bits,
    calibration,
    file_hashes,
    load,
    read_tensors,
    recording,
    same_bytes,
    stored,
)
from secateur.core.patterns import NM
from secateur.files.checkpoint import Checkpoint
from secateur.methods.wanda import wanda
from secateur.models.opening.opened import open_model
from secateur.pruning.engine import prune
from secateur.record.verify import verify

# Multiplied without their module being called, so that no hook on it fires.
BY_WEIGHT_ALONE = ("mixer.dt_proj.weight", "mamba.dt_proj.weight")


def each_with(kinds: Sequence[str], turn: int) -> Any:
    """Every architecture with every kind of run; of a third, from the one numbered `turn` on, one kind is not slow."""

    def marks(number: int, place: int) -> list[Any]:
        return [] if number % 3 == turn and number // 3 % len(kinds) == place else [pytest.mark.slow]

    return pytest.mark.parametrize(
        ("name", "kind"),
        [
            pytest.param(name, kind, marks=marks(number, place))
            for number, name in enumerate(STREAMED)
            for place, kind in enumerate(kinds)
        ],
    )


@each_with(list(PATTERNS), turn=0)
def test_prunes_every_architecture(name, kind, tmp_path):
    pattern = PATTERNS[kind]
    source, out = tiny.save(name, tmp_path / "source"), tmp_path / "out"
    before = file_hashes(source)
    matrices = open_model(source).skeleton.matrices
    skip = list(NEVER_SEEN.get(name, []))
    if isinstance(pattern, NM):
        skip += [matrix.name for matrix in matrices if matrix.shape[1] % pattern.m]

    manifest = prune(source, method=wanda(), pattern=pattern, calibration=calibration(), skip=skip, output=out)

    assert file_hashes(source) == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "source"]
    assert {*before, "secateur.json", "README.md"} == set(file_hashes(out))
    assert all(file_hashes(out)[file] == digest for file, digest in before.items() if file != "model.safetensors")

    # Every planned matrix was seen. What is no expert saw every token, and Gemma 3n's predictor of modalities twice.
    assert manifest.matrices.keys() == manifest.plan.keys()
    assert len(manifest.matrices) > len(matrices) / 2
    for matrix, entry in manifest.matrices.items():
        assert entry["tokens"] > 0
        if "experts" not in entry["tensor"] and entry["index"] is None:
            assert entry["tokens"] == SAMPLES * LENGTH * (2 if "modality_router" in matrix else 1)

    # The plan is met exactly, counted on the file.
    dense, sparse = read_tensors(source), read_tensors(out)
    for matrix, entry in manifest.matrices.items():
        original, pruned = stored(dense, entry), stored(sparse, entry)
        assert list(pruned.shape) == entry["shape"]
        assert bool(original.ne(0).all()), "random weights hold no zeros"
        kept = pruned != 0
        if isinstance(pattern, NM):
            assert bool((kept.reshape(-1, 4).sum(dim=1) == 2).all()), matrix
        else:
            assert bool(((~kept).sum(dim=1) == original.shape[1] // 2).all()), matrix
        assert torch.equal(pruned[kept], original[kept])
        assert not bool(bits(pruned)[~kept].any()), "zeros are +0.0"
        assert entry["zeros"] == int((~kept).sum())

    # Everything else is byte-identical.
    assert {name: (t.shape, t.dtype) for name, t in sparse.items()} == {n: (t.shape, t.dtype) for n, t in dense.items()}
    planned = {(entry["tensor"], entry["index"]) for entry in manifest.matrices.values()}
    tensors = {tensor for tensor, _ in planned}
    for tensor, original in dense.items():
        if tensor not in tensors:
            assert same_bytes(sparse[tensor], original), tensor
        elif (tensor, None) not in planned:
            for index in range(original.shape[0]):
                if (tensor, index) not in planned:
                    assert same_bytes(sparse[tensor][index], original[index])

    report = verify(out, Checkpoint(source))
    assert report.ok, report.problems
    assert report.matrices == len(manifest.matrices)
    assert report.tensors == len(dense)
    pruned_model = load(out)
    with torch.no_grad():
        ids = tiny.tokens()
        assert pruned_model(ids, use_cache=False).logits.isfinite().all()
        assert not torch.equal(pruned_model(ids, use_cache=False).logits, load(source)(ids, use_cache=False).logits)


@each_with(["pruned", "dense"], turn=1)
def test_statistics_are_those_of_the_model_itself(name, kind, tmp_path):
    """Hooks on whole forwards of the model, with blocks before this one pruned or dense, see the same inputs."""
    source, out = tiny.save(name, tmp_path / "source"), tmp_path / "out"
    taken: dict[str, tuple[Tensor, int, int]] = {}
    ids = calibration()
    prune(
        source,
        method=recording(taken),
        calibration=ids,
        skip=NEVER_SEEN.get(name, []),
        output=out,
        propagate=kind,
        batch_size=3,
    )
    skeleton = open_model(source).skeleton
    (stack,) = skeleton.stacks
    model, pruned = load(source), load(out)
    blocks, pruned_blocks = model.get_submodule(stack.path), pruned.get_submodule(stack.path)
    seen: dict[str, Tensor] = {}

    def hook(parameter: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            squares = args[0].double().square().reshape(-1, args[0].shape[-1]).sum(dim=0)
            seen[parameter] = seen.get(parameter, torch.zeros(())) + squares

        return add

    for index, block in enumerate(blocks):
        handles = [
            module.register_forward_pre_hook(hook(f"{stack.path}.{index}.{path}.weight"))
            for path, module in block.named_modules()
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        ]
        with torch.no_grad():
            model(ids, use_cache=False)
        for handle in handles:
            handle.remove()
        if kind == "pruned":
            block.load_state_dict(pruned_blocks[index].state_dict())

    matrices = [matrix for matrix in skeleton.matrices if matrix.name in taken and matrix.expert is None]
    missed = []
    for matrix in matrices:
        total, tokens, samples = taken[matrix.name]
        assert samples == SAMPLES
        if matrix.parameter not in seen:
            missed.append(matrix.name)
            continue
        expected = seen[matrix.parameter]
        expected = expected if matrix.columns is None else expected[matrix.columns]
        assert torch.allclose(total, expected, rtol=1e-4, atol=1e-6 * float(expected.max())), matrix.name
        assert tokens > 0
    assert all(name.endswith(BY_WEIGHT_ALONE) for name in missed), missed
    assert len(missed) < len(matrices)


@tiny.by_turns(STREAMED, 2, of=6)
def test_a_module_in_memory_is_pruned_as_its_folder(name, tmp_path):
    source = tiny.save(name, tmp_path / "source")
    settings: dict[str, Any] = {
        "method": wanda(),
        "calibration": calibration(),
        "skip": NEVER_SEEN.get(name, []),
        "batch_size": 3,
    }
    streamed = prune(source, output=tmp_path / "streamed", **settings)
    model = AutoModelForCausalLM.from_pretrained(source)
    in_memory = prune(model, output=tmp_path / "in_memory", **settings)

    assert in_memory.plan == streamed.plan
    assert_same_tensors(tmp_path / "in_memory", tmp_path / "streamed")
    assert load(tmp_path / "in_memory") is not None
    assert verify(tmp_path / "in_memory", Checkpoint(source)).ok
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed").state_dict()
    assert model.state_dict().keys() == expected.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key
