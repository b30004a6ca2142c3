"""`prune`: from a folder or a module to a checkpoint that is what its plan says, and nothing else, everywhere."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import tiny
from secateur.core.patterns import NM, Unstructured
from secateur.core.problem import Method, Problem, Solution
from secateur.core.statistics import SquaredNorm
from secateur.errors import (
    CalibrationError,
    CheckpointError,
    MethodError,
    ModelStructureError,
    NumericalError,
    PatternError,
)
from secateur.files.checkpoint import Checkpoint
from secateur.methods.magnitude import magnitude
from secateur.methods.wanda import wanda
from secateur.models.opening.opened import open_model
from secateur.models.shape.matrices import Matrix
from secateur.plans.plan import Plan
from secateur.pruning.block_loop import Event
from secateur.pruning.engine import prune
from secateur.record.manifest import Manifest, read_manifest, verify

NOT_STREAMED = {"hrm_text"}  # runs the same blocks several times; see test_stream.py
STREAMED = [name for name in tiny.ARCHITECTURES if name not in NOT_STREAMED]
# Matrices that no token ever reaches, by design: LongCat's zero experts only hand their input on.
NEVER_SEEN = {"longcat_flash": ["*.experts.4.*", "*.experts.5.*"]}
# Multiplied without their module being called, so that no hook on it fires.
BY_WEIGHT_ALONE = ("mixer.dt_proj.weight", "mamba.dt_proj.weight")
SAMPLES, LENGTH = 8, 32
PATTERNS = {"half": Unstructured(0.5), "2:4": NM(2, 4)}

each_pattern = pytest.mark.parametrize("pattern", list(PATTERNS.values()), ids=list(PATTERNS))


def calibration() -> Tensor:
    """256 tokens: enough for every expert to see some."""
    return tiny.tokens(samples=SAMPLES, length=LENGTH)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, by safetensors itself."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            tensors.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118
    return tensors


def file_hashes(folder: Path) -> dict[str, str]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def same_bytes(one: Tensor, two: Tensor) -> bool:
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), two.contiguous().view(-1).view(torch.uint8))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize])


def stored(tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> Tensor:
    """The (out, in) matrix that a manifest entry speaks of."""
    tensor = tensors[entry["tensor"]]
    tensor = tensor if entry["index"] is None else tensor[entry["index"]]
    return tensor.t() if entry["transposed"] else tensor


def masks(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    tensors = read_tensors(folder)
    return {name: stored(tensors, entry) != 0 for name, entry in manifest.matrices.items()}


def load(folder: Path, **kwargs: Any) -> PreTrainedModel:
    """The model as transformers loads it, nothing missing and nothing unexpected, experts one by one."""
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(told.values()), told
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model.eval()


def assert_same_tensors(one: Path, two: Path) -> None:
    first, second = read_tensors(one), read_tensors(two)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert same_bytes(tensor, second[name]), name


def wanda_masks(weight: Tensor, total: Tensor, sparsity: float = 0.5) -> Tensor:
    """True at the kept weights of an (out, in) matrix, by hand."""
    score = weight.abs() * total.to(weight).sqrt()
    mask = torch.ones_like(score, dtype=torch.bool)
    for row in range(score.shape[0]):
        mask[row, score[row].argsort(stable=True)[: int(score.shape[1] * sparsity)]] = False
    return mask


def recording(statistics: dict[str, tuple[Tensor, int, int]], method: Method | None = None) -> Method:
    """Wanda, which leaves (sum of squares, tokens, samples) of every matrix in `statistics`."""
    inner = method or wanda()

    def solve(problem: Problem) -> Solution:
        statistic = problem.statistic(SquaredNorm)
        statistics[problem.name] = (statistic.total.clone(), statistic.tokens, statistic.samples)
        return inner.solve(problem)

    return Method("recording", solve, inner.needs, inner.per)


# Every architecture


@pytest.mark.parametrize("name", STREAMED)
@each_pattern
def test_prunes_every_architecture(name, pattern, tmp_path):
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


@pytest.mark.parametrize("name", STREAMED)
@pytest.mark.parametrize("propagate", ["pruned", "dense"])
def test_statistics_are_those_of_the_model_itself(name, propagate, tmp_path):
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
        propagate=propagate,
        batch_size=3,
    )
    skeleton = open_model(source).skeleton
    model, pruned = load(source), load(out)
    blocks, pruned_blocks = model.get_submodule(skeleton.path), pruned.get_submodule(skeleton.path)
    seen: dict[str, Tensor] = {}

    def hook(parameter: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            squares = args[0].double().square().reshape(-1, args[0].shape[-1]).sum(dim=0)
            seen[parameter] = seen.get(parameter, torch.zeros(())) + squares

        return add

    for index, block in enumerate(blocks):
        handles = [
            module.register_forward_pre_hook(hook(f"{skeleton.path}.{index}.{path}.weight"))
            for path, module in block.named_modules()
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        ]
        with torch.no_grad():
            model(ids, use_cache=False)
        for handle in handles:
            handle.remove()
        if propagate == "pruned":
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


@pytest.mark.parametrize("name", STREAMED)
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


# Hand computations


def moe_inputs(model: PreTrainedModel, module: nn.Module, ids: Tensor) -> Tensor:
    """What goes into a module, as (tokens, hidden)."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids, use_cache=False)
    handle.remove()
    assert len(seen) == 1
    return seen[0].reshape(-1, seen[0].shape[-1])


def squares(x: Tensor) -> Tensor:
    return x.double().square().sum(dim=0)


def test_mixtral_experts_see_the_tokens_routed_to_them(tmp_path):
    source = tiny.save("mixtral", tmp_path / "source")
    dense = read_tensors(source)
    taken: dict[str, tuple[Tensor, int, int]] = {}
    ids = calibration()
    manifest = prune(
        source, method=recording(taken), calibration=ids, output=tmp_path / "out", propagate="dense", batch_size=3
    )
    sparse = read_tensors(tmp_path / "out")
    model = load(source)
    for block in range(tiny.BLOCKS):
        x = moe_inputs(model, model.model.layers[block].mlp, ids)
        prefix = f"model.layers.{block}.block_sparse_moe"
        chosen = (x @ dense[f"{prefix}.gate.weight"].t()).softmax(dim=-1).topk(2, dim=-1).indices
        routed_tokens = 0
        for expert in range(4):
            rows = x[(chosen == expert).any(dim=-1)]
            routed_tokens += len(rows)
            w1, w2, w3 = (dense[f"{prefix}.experts.{expert}.w{number}.weight"] for number in (1, 2, 3))
            inner = F.silu(rows @ w1.t()) * (rows @ w3.t())
            for number, inputs, weight in ((1, rows, w1), (3, rows, w3), (2, inner, w2)):
                name = f"{prefix}.experts.{expert}.w{number}.weight"
                total, tokens, samples = taken[name]
                assert samples == SAMPLES
                assert tokens == manifest.matrices[name]["tokens"] == len(rows) > 0
                assert torch.allclose(total, squares(inputs), rtol=1e-4)
                assert torch.equal(sparse[name] != 0, wanda_masks(weight, total))
        assert routed_tokens == 2 * SAMPLES * LENGTH


def test_gpt2_stores_its_matrices_transposed(tmp_path):
    source = tiny.save("gpt2", tmp_path / "source")
    ids = calibration()
    model = load(source)
    dense = read_tensors(source)
    for pattern in PATTERNS.values():
        out = tmp_path / f"out-{pattern.sparsity}-{type(pattern).__name__}"
        prune(source, method=wanda(), pattern=pattern, calibration=ids, output=out)
        sparse = read_tensors(out)
        block = model.transformer.h[0]
        for leaf, module in {"attn.c_attn": block.attn.c_attn, "mlp.c_fc": block.mlp.c_fc}.items():
            name = f"transformer.h.0.{leaf}.weight"
            norm = squares(moe_inputs(model, module, ids)).sqrt()
            score = dense[name].abs() * norm[:, None].float()  # stored (in, out): inputs go down a column
            expected = torch.ones_like(score, dtype=torch.bool)
            for output in range(score.shape[1]):
                column = score[:, output]
                if isinstance(pattern, NM):
                    for start in range(0, 32, 4):
                        expected[start + column[start : start + 4].argsort()[:2], output] = False
                else:
                    expected[column.argsort()[:16], output] = False
            assert dense[name].shape[0] == 32 != dense[name].shape[1]
            assert torch.equal(sparse[name] != 0, expected), name


def test_gpt_oss_experts_are_stored_transposed(tmp_path):
    source, out = tiny.save("gpt_oss", tmp_path / "source"), tmp_path / "out"
    ids = calibration()
    manifest = prune(source, method=wanda(), calibration=ids, output=out)
    dense, sparse, model = read_tensors(source), read_tensors(out), load(source)
    x = moe_inputs(model, model.model.layers[0].mlp, ids)
    prefix = "model.layers.0.mlp"
    logits = x @ dense[f"{prefix}.router.weight"].t() + dense[f"{prefix}.router.bias"]
    chosen = logits.topk(2, dim=-1).indices
    for expert in range(4):
        rows = x[(chosen == expert).any(dim=-1)]
        gate_up_weight = dense[f"{prefix}.experts.gate_up_proj"][expert]  # (in, out)
        gate_up = rows @ gate_up_weight + dense[f"{prefix}.experts.gate_up_proj_bias"][expert]
        gate, up = gate_up[:, ::2].clamp(max=7), gate_up[:, 1::2].clamp(-7, 7)
        inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        for leaf, inputs in (("gate_up_proj", rows), ("down_proj", inner)):
            name = f"{prefix}.experts.{leaf}"
            expected = wanda_masks(dense[name][expert].t(), squares(inputs)).t()
            assert torch.equal(sparse[name][expert] != 0, expected), (leaf, expert)
            entry = manifest.matrices[f"{name}.{expert}"]
            assert entry["tokens"] == len(rows)
            assert entry["shape"] == [dense[name].shape[2], dense[name].shape[1]]


def test_llama4_experts_are_stored_transposed_and_see_scaled_tokens(tmp_path):
    source, out = tiny.save("llama4_text", tmp_path / "source"), tmp_path / "out"
    ids = calibration()
    manifest = prune(source, method=wanda(), calibration=ids, output=out, only=["*.experts.*"])
    dense, sparse, model = read_tensors(source), read_tensors(out), load(source)
    x = moe_inputs(model, model.model.layers[1].feed_forward, ids)  # the only mixture; block 0 is not planned
    prefix = "model.layers.1.feed_forward"
    logits = x @ dense[f"{prefix}.router.weight"].t()
    chosen = logits.topk(2, dim=-1).indices
    assert len(manifest.matrices) == 8
    for expert in range(4):
        routed = (chosen == expert).any(dim=-1)
        rows = x[routed] * torch.sigmoid(logits[routed, expert, None])
        gate, up = (rows @ dense[f"{prefix}.experts.gate_up_proj"][expert]).chunk(2, dim=-1)
        for leaf, inputs in (("gate_up_proj", rows), ("down_proj", up * F.silu(gate))):
            name = f"{prefix}.experts.{leaf}"
            expected = wanda_masks(dense[name][expert].t(), squares(inputs)).t()
            assert torch.equal(sparse[name][expert] != 0, expected), (leaf, expert)
            assert manifest.matrices[f"{name}.{expert}"]["tokens"] == len(rows)


# Settings


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "gpt2", "mixtral", "gpt_oss", "qwen3_next", "mamba", "gemma4_text"]
)
def test_batch_size_changes_no_mask(name, tmp_path):
    source = tiny.save(name, tmp_path / "source")
    made = {}
    for size in (1, 3, 8):
        out = tmp_path / f"out{size}"
        settings = {"method": wanda(), "calibration": calibration(), "dtype": "float64", "batch_size": size}
        made[size] = masks(out, prune(source, output=out, **settings))
    for size in (3, 8):
        assert made[size].keys() == made[1].keys()
        for matrix, mask in made[1].items():
            assert torch.equal(made[size][matrix], mask), (size, matrix)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_batch_size_hardly_changes_float32_masks(name, tmp_path):
    source = tiny.save(name, tmp_path / "source")
    one, four = (
        masks(out, prune(source, method=wanda(), calibration=calibration(), batch_size=size, output=out))
        for size, out in ((1, tmp_path / "one"), (4, tmp_path / "four"))
    )
    different = sum(int((one[matrix] != four[matrix]).sum()) for matrix in one)
    assert different <= 1e-3 * sum(mask.numel() for mask in one.values())


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma3n_text"])
def test_propagation(name, tmp_path):
    source = tiny.save(name, tmp_path / "source")
    made, manifests = {}, {}
    for propagate in ("pruned", "dense"):
        out = tmp_path / propagate
        manifest = prune(source, method=wanda(), calibration=calibration(), propagate=propagate, output=out)
        assert manifest.settings["propagate"] == propagate
        made[propagate], manifests[propagate] = masks(out, manifest), manifest
    differ = dict.fromkeys(range(tiny.BLOCKS), 0)
    for matrix, mask in made["pruned"].items():
        block = manifests["pruned"].matrices[matrix]["block"]
        differ[block] += int((mask != made["dense"][matrix]).sum())
    assert differ[0] == 0
    assert differ[1] > 0
    assert differ[2] > 0
    for manifest in manifests.values():
        assert [record["index"] for record in manifest.blocks] == [0, 1, 2]
        assert all(0 < record["output_change"] < 2 for record in manifest.blocks)
    changes = [manifests[propagate].blocks[0]["output_change"] for propagate in manifests]
    assert changes[0] == changes[1]


def test_states_on_disk_change_nothing(tmp_path):
    source = tiny.save("gemma2", tmp_path / "source")
    folder = tmp_path / "fast"
    seen: list[list[str]] = []

    def watch(event: Event) -> None:
        if event.stage == "solve":
            seen.append(sorted(file.name for file in folder.rglob("*.bin")))

    settings = {"method": wanda(), "calibration": calibration(), "batch_size": 3}
    prune(source, output=tmp_path / "memory", offload_states="never", **settings)
    prune(source, output=tmp_path / "disk", offload_states=str(folder), on_event=watch, **settings)
    assert_same_tensors(tmp_path / "memory", tmp_path / "disk")
    assert seen
    assert all(files == ["states-0.bin", "states-1.bin", "states-2.bin"] for files in seen)
    assert not list(folder.iterdir())


def test_tied_embeddings_stay_tied(tmp_path):
    source, out = tiny.save("llama_tied", tmp_path / "source"), tmp_path / "out"
    prune(source, method=wanda(), calibration=calibration(), output=out)
    assert "lm_head.weight" not in read_tensors(out)
    model = load(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    in_memory = AutoModelForCausalLM.from_pretrained(source)
    prune(in_memory, method=wanda(), calibration=calibration(), output=tmp_path / "in_memory")
    assert "lm_head.weight" not in read_tensors(tmp_path / "in_memory")
    assert in_memory.lm_head.weight is in_memory.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss"])
def test_shards(name, tmp_path):
    whole = tiny.save(name, tmp_path / "whole")
    sharded = tiny.save(name, tmp_path / "sharded", max_shard_size="50KB")
    shards = sorted(file.name for file in sharded.glob("*.safetensors"))
    assert len(shards) > 2
    settings = {"method": wanda(), "calibration": calibration()}
    prune(whole, output=tmp_path / "out", **settings)
    prune(sharded, output=tmp_path / "out_sharded", **settings)

    out = tmp_path / "out_sharded"
    assert sorted(file.name for file in out.glob("*.safetensors")) == shards
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    original = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == original["weight_map"]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in read_tensors(sharded).values())
    for name_, shard in index["weight_map"].items():
        assert name_ in load_file(out / shard)
    assert_same_tensors(out, tmp_path / "out")
    load(out)
    assert verify(out, Checkpoint(sharded)).ok
    assert verify(out, Checkpoint(whole)).ok


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss", "gpt2"])
@pytest.mark.parametrize("compute", ["auto", "bfloat16"])
def test_bfloat16_stays_bfloat16(name, compute, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    tiny.build(name, dtype=torch.bfloat16).save_pretrained(source)
    manifest = prune(source, method=wanda(), calibration=calibration(), dtype=compute, device="cpu", output=out)
    assert manifest.settings["dtype"] == ("float32" if compute == "auto" else "bfloat16")
    dense, sparse = read_tensors(source), read_tensors(out)
    assert {tensor.dtype for tensor in sparse.values()} == {torch.bfloat16}
    for entry in manifest.matrices.values():
        original, pruned = bits(stored(dense, entry)), bits(stored(sparse, entry))
        kept = pruned != 0
        assert torch.equal(pruned[kept], original[kept])
        assert int(kept.sum()) == kept.numel() // 2
        assert entry["kept_identical"]
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert load(out, dtype="auto").dtype == torch.bfloat16
    assert verify(out, Checkpoint(source)).ok


def test_only_and_skip(tmp_path):
    source, out = tiny.save("llama", tmp_path / "source"), tmp_path / "out"
    manifest = prune(
        source,
        method=wanda(),
        calibration=calibration(),
        only=["*.mlp.*", "model.layers.1.self_attn.q_proj"],
        skip=["*.down_proj", "model.layers.2.*"],
        output=out,
    )
    expected = {f"model.layers.{block}.mlp.{leaf}_proj.weight" for block in (0, 1) for leaf in ("gate", "up")}
    expected.add("model.layers.1.self_attn.q_proj.weight")
    assert set(manifest.plan) == set(manifest.matrices) == expected
    dense, sparse = read_tensors(source), read_tensors(out)
    assert {name for name, tensor in dense.items() if not same_bytes(tensor, sparse[name])} == expected
    assert verify(out, Checkpoint(source)).ok


@pytest.mark.parametrize("block", range(tiny.BLOCKS))
@pytest.mark.parametrize("propagate", ["pruned", "dense"])
def test_one_block_alone(block, propagate, tmp_path):
    """Blocks without a planned matrix only hand the states on, and those behind the last one do not run at all."""
    source = tiny.save("mixtral", tmp_path / "source")
    taken: dict[str, tuple[Tensor, int, int]] = {}
    all_dense: dict[str, tuple[Tensor, int, int]] = {}
    settings = {"calibration": calibration(), "batch_size": 3}
    only = [f"model.layers.{block}.*"]
    events: list[Event] = []
    manifest = prune(
        source,
        method=recording(taken),
        only=only,
        propagate=propagate,
        output=tmp_path / "out",
        on_event=events.append,
        **settings,
    )
    prune(source, method=recording(all_dense), propagate="dense", output=tmp_path / "dense", **settings)
    assert {entry["block"] for entry in manifest.matrices.values()} == {block}
    assert all(torch.equal(total, all_dense[name][0]) for name, (total, _, _) in taken.items())
    assert {event.block for event in events if event.stage == "statistics"} == set(range(block + 1))
    assert {event.block for event in events if event.stage == "write"} == set(range(tiny.BLOCKS))
    assert verify(tmp_path / "out", Checkpoint(source)).ok


def test_some_experts_of_a_fused_tensor(tmp_path):
    for name in ("gpt_oss", "qwen3_moe"):
        source, out = tiny.save(name, tmp_path / name), tmp_path / f"{name}-out"
        shapes = {matrix.name for matrix in open_model(source).skeleton.matrices}
        only = [matrix for matrix in shapes if "experts" in matrix and ("proj.2" in matrix or ".2.down" in matrix)]
        manifest = prune(source, method=wanda(), calibration=calibration(), only=only, output=out)
        assert set(manifest.matrices) == set(only)
        assert verify(out, Checkpoint(source)).ok
        dense, sparse = read_tensors(source), read_tensors(out)
        changed = sum(int((tensor != sparse[key]).sum()) for key, tensor in dense.items())
        assert changed == manifest.totals["zeros"] > 0


def test_sparsity_zero_changes_nothing(tmp_path):
    source, out = tiny.save("mixtral", tmp_path / "source"), tmp_path / "out"
    manifest = prune(source, method=wanda(), pattern=Unstructured(0.0), calibration=calibration(), output=out)
    assert_same_tensors(source, out)
    assert manifest.totals["zeros"] == 0
    assert manifest.totals["matrices"] == 48
    assert [record["output_change"] for record in manifest.blocks] == [0.0, 0.0, 0.0]
    assert verify(out, Checkpoint(source)).ok


def test_a_whole_plan(tmp_path):
    source, out = tiny.save("llama", tmp_path / "source"), tmp_path / "out"
    plan = Plan(
        {
            "model.layers.0.mlp.up_proj.weight": NM(2, 4),
            "model.layers.1.self_attn.o_proj.weight": Unstructured(0.25, "matrix"),
            "model.layers.1.self_attn.q_proj.weight": Unstructured(0.75, "row"),
        }
    )
    manifest = prune(source, method=wanda(), pattern=plan, calibration=calibration(), output=out)
    assert Plan.from_json(manifest.plan) == plan
    kept = masks(out, manifest)
    assert bool((kept["model.layers.0.mlp.up_proj.weight"].view(-1, 4).sum(dim=1) == 2).all())
    assert int(kept["model.layers.1.self_attn.o_proj.weight"].sum()) == 32 * 32 * 3 // 4
    assert bool((kept["model.layers.1.self_attn.q_proj.weight"].sum(dim=1) == 8).all())
    assert verify(out, Checkpoint(source)).ok
    with pytest.raises(PatternError, match="only and skip"):
        prune(source, method=wanda(), pattern=plan, calibration=calibration(), skip=["*"], output=tmp_path / "no")


def test_a_method_of_ones_own(tmp_path):
    """Random masks, and survivors scaled so that the expected output stays: not a selection."""
    source, out = tiny.save("mixtral", tmp_path / "source"), tmp_path / "out"
    generator = torch.Generator().manual_seed(0)
    names: list[str] = []

    def solve(problem: Problem) -> Solution:
        names.append(problem.name)
        assert problem.evidence == {}
        mask = problem.pattern.mask(torch.rand(problem.weight.shape, generator=generator))
        return Solution(problem.weight * mask * 2, mask, {"kept": float(mask.float().mean())})

    manifest = prune(source, method=Method("random", solve, per="matrix"), output=out)
    assert names == list(manifest.matrices)
    assert manifest.method == "random"
    assert manifest.calibration is None
    dense, sparse = read_tensors(source), read_tensors(out)
    for entry in manifest.matrices.values():
        kept = stored(sparse, entry) != 0
        assert entry["notes"] == {"kept": 0.5}
        assert not entry["kept_identical"]
        assert int(kept.sum()) == kept.numel() // 2
        assert torch.equal(stored(sparse, entry)[kept], 2 * stored(dense, entry)[kept])
    assert verify(out, Checkpoint(source)).ok


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_methods_without_data_prune_files_and_modules(name, tmp_path):
    source = tiny.save(name, tmp_path / "source")
    manifest = prune(source, method=magnitude(), pattern=Unstructured(0.6), output=tmp_path / "out")
    dense, sparse = read_tensors(source), read_tensors(tmp_path / "out")
    for entry in manifest.matrices.values():
        weight, pruned = stored(dense, entry), stored(sparse, entry)
        zeros = int(weight.numel() * 0.6)
        assert int((pruned == 0).sum()) == zeros
        assert weight[pruned == 0].abs().max() <= weight[pruned != 0].abs().min()
        assert entry["tokens"] is None
    model = AutoModelForCausalLM.from_pretrained(source)
    prune(model, method=magnitude(), pattern=Unstructured(0.6))
    expected = load(tmp_path / "out").state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_events_tell_of_every_block_and_matrix(tmp_path):
    source = tiny.save("llama", tmp_path / "source")
    events: list[Event] = []
    manifest = prune(
        source,
        method=wanda(),
        calibration=calibration(),
        batch_size=4,
        output=tmp_path / "out",
        on_event=events.append,
    )
    stages = [event.stage for event in events]
    assert (stages[0], stages[-1]) == ("calibrate", "done")
    assert [event.matrix for event in events if event.stage == "solve"] == list(manifest.matrices)
    statistics = [event for event in events if event.stage == "statistics"]
    assert [(event.block, event.done, event.total) for event in statistics] == [
        (block, done, 2) for block in range(3) for done in (1, 2)
    ]
    for block in range(tiny.BLOCKS):
        outside = ("calibrate", "record", "done")
        own = [event.stage for event in events if event.block == block and event.stage not in outside]
        forward = ["forward"] if block < tiny.BLOCKS - 1 else []
        assert list(dict.fromkeys(own)) == ["read", "statistics", "solve", *forward, "write"]
    assert read_manifest(tmp_path / "out").to_json() == manifest.to_json()


# Checkpoints as they come


def test_tensors_that_the_model_does_not_read_are_copied(tmp_path):
    source, out = tiny.save("llama", tmp_path / "source"), tmp_path / "out"
    file = source / "model.safetensors"
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4),
        "model.layers.1.old.weight": torch.rand(8, 8),
        "counter": torch.tensor([3, 4]),
    }
    save_file(load_file(file) | extra, file, metadata={"format": "pt", "note": "mine"})
    manifest = prune(source, method=wanda(), calibration=calibration(), output=out)
    assert len(manifest.matrices) == 21
    sparse = read_tensors(out)
    assert all(same_bytes(sparse[name], tensor) for name, tensor in extra.items())
    assert verify(out, Checkpoint(source)).ok


def test_names_without_the_prefix_of_the_base_model(tmp_path):
    """GPT-2 on the hub: `h.0.attn.c_attn.weight`, where the module has `transformer.h.0.attn.c_attn.weight`."""
    plain, short = tiny.save("gpt2", tmp_path / "plain"), tiny.save("gpt2", tmp_path / "short")
    file = short / "model.safetensors"
    save_file({name.removeprefix("transformer."): t for name, t in load_file(file).items()}, file, {"format": "pt"})
    settings = {"method": wanda(), "calibration": calibration()}
    prune(plain, output=tmp_path / "out", **settings)
    manifest = prune(short, output=tmp_path / "out_short", **settings)
    assert "h.0.attn.c_attn.weight" in manifest.matrices
    expected, got = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "out_short")
    assert {name.removeprefix("transformer.") for name in expected} == set(got)
    assert all(same_bytes(tensor, got[name.removeprefix("transformer.")]) for name, tensor in expected.items())
    load(tmp_path / "out_short")
    assert verify(tmp_path / "out_short", Checkpoint(short)).ok


def test_what_blocks_share_stays_dense(tmp_path):
    """Zamba uses one attention block twice; what is shared stays dense, from a folder as in memory."""
    for name in ("zamba", "zamba2"):
        source = tiny.save(name, tmp_path / name)
        skeleton = open_model(source).skeleton
        shared = [tensor for tensor, reason in skeleton.left_out.items() if reason == "shared between blocks"]
        assert len(shared) >= 7
        in_memory = open_model(AutoModelForCausalLM.from_pretrained(source)).skeleton

        def plain(matrices: list[Matrix]) -> list[tuple[Any, ...]]:
            return [(matrix.name, matrix.shape, matrix.block, matrix.parameter) for matrix in matrices]

        assert plain(skeleton.matrices) == plain(in_memory.matrices)
        assert not {matrix.tensor for matrix in skeleton.matrices} & set(shared)


@pytest.mark.parametrize("entries", [["sparsity_config"], ["sparsity_config", "compression_config"]])
def test_stale_packing_entries_leave_the_configuration(entries, tmp_path):
    source, out = tiny.save("llama", tmp_path / "source"), tmp_path / "out"
    file = source / "config.json"
    config = json.loads(file.read_text())
    stale = {
        "sparsity_config": {"format": "sparse-24-bitmask"},
        "compression_config": {"format": "dense", "quant_method": "compressed-tensors"},
    }
    file.write_text(json.dumps(config | {"mine": 1} | {entry: stale[entry] for entry in entries}))
    before = file.read_bytes()
    prune(source, method=wanda(), calibration=calibration(), output=out)
    assert json.loads((out / "config.json").read_text()) == config | {"mine": 1}
    assert file.read_bytes() == before
    load(out)
    assert verify(out, Checkpoint(source)).ok


def multimodal(kind: str) -> PreTrainedModel:
    """A tiny model whose vision tower is larger than its text decoder."""
    import transformers as t

    text = {
        "vocab_size": tiny.VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    tower = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4}
    tower |= {"image_size": 28, "patch_size": 14}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "gemma3":
            layers = [tiny.SLIDING, tiny.SLIDING, tiny.FULL]
            config = t.Gemma3Config(
                text_config=text | {"head_dim": 8, "sliding_window": 6, "layer_types": layers},
                vision_config=tower,
                mm_tokens_per_image=4,
                image_token_index=2,
            )
            return t.Gemma3ForConditionalGeneration(config)
        if kind == "llava":
            vision = t.CLIPVisionConfig(**tower, projection_dim=32)
            config = t.LlavaConfig(vision_config=vision, text_config=t.LlamaConfig(**text), image_token_index=2)
            return t.LlavaForConditionalGeneration(config)
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
        config = t.Qwen2VLConfig(
            text_config=text | {"rope_parameters": rope},
            vision_config={"depth": 6, "embed_dim": 64, "hidden_size": 32, "num_heads": 4},
            image_token_id=2,
            video_token_id=1,
        )
        return t.Qwen2VLForConditionalGeneration(config)


@pytest.mark.parametrize("kind", ["gemma3", "llava", "qwen2_vl"])
def test_multimodal_models_are_pruned_in_their_text_decoder(kind, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    model = multimodal(kind).eval()
    model.save_pretrained(source)
    taken: dict[str, tuple[Tensor, int, int]] = {}
    manifest = prune(
        source, method=recording(taken), calibration=calibration(), output=out, propagate="dense", batch_size=3
    )
    assert len(manifest.matrices) == 21
    assert not any("vision" in name or "visual" in name or "projector" in name for name in manifest.matrices)
    dense, sparse = read_tensors(source), read_tensors(out)
    planned = {entry["tensor"] for entry in manifest.matrices.values()}
    assert {name for name, tensor in dense.items() if not same_bytes(tensor, sparse[name])} == planned
    assert manifest.totals["sparsity"] == 0.5
    assert verify(out, Checkpoint(source)).ok
    _, told = type(model).from_pretrained(out, output_loading_info=True)
    assert not any(told.values())
    last = model.get_submodule("model.language_model.layers.2.mlp.up_proj")
    name = next(name for name in taken if name.endswith("layers.2.mlp.up_proj.weight"))
    assert torch.allclose(taken[name][0], squares(moe_inputs(model, last, calibration())), rtol=1e-4)

    in_memory = prune(model, method=wanda(), calibration=calibration(), propagate="dense", batch_size=3)
    assert list(in_memory.matrices) == list(manifest.matrices)
    again, _ = type(model).from_pretrained(out, output_loading_info=True)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


# What goes wrong


class MiddleError(Exception):
    pass


def failing(error: type[BaseException], block: int = 1) -> Method:
    inner = wanda()

    def solve(problem: Problem) -> Solution:
        if problem.name.startswith(f"model.layers.{block}."):
            raise error("in the middle")
        return inner.solve(problem)

    return Method("failing", solve, inner.needs)


@pytest.mark.parametrize("error", [MiddleError, KeyboardInterrupt, NumericalError])
def test_a_failure_in_the_middle_leaves_nothing(error, tmp_path):
    source, out = tiny.save("llama", tmp_path / "source"), tmp_path / "out"
    before = file_hashes(source)
    arguments = {"calibration": calibration(), "output": out, "offload_states": str(tmp_path / "fast")}
    with pytest.raises(MethodError if error is MiddleError else error, match="in the middle"):
        prune(source, method=failing(error), **arguments)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["fast", "source"]
    assert not list((tmp_path / "fast").iterdir())
    assert file_hashes(source) == before
    prune(source, method=wanda(), **arguments)
    assert verify(out, Checkpoint(source)).ok


@pytest.mark.parametrize("stage", ["calibrate", "record", "read", "statistics", "forward", "write"])
def test_an_interrupt_at_any_stage_leaves_nothing(stage, tmp_path):
    source, out = tiny.save("llama", tmp_path / "source"), tmp_path / "out"

    def interrupt(event: Event) -> None:
        if event.stage == stage and (event.block == 1 or stage in ("calibrate", "record")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(
            source,
            method=wanda(),
            calibration=calibration(),
            output=out,
            offload_states=str(tmp_path / "fast"),
            on_event=interrupt,
        )
    assert not out.exists()
    assert {file.name for file in tmp_path.iterdir()} <= {"fast", "source"}
    assert not list((tmp_path / "fast").rglob("*"))


def test_a_failure_leaves_the_output_that_was_there(tmp_path):
    source, out = tiny.save("llama", tmp_path / "source"), tmp_path / "out"
    prune(source, method=magnitude(), output=out)
    before = file_hashes(out)
    with pytest.raises(MethodError):
        prune(source, method=failing(MiddleError), calibration=calibration(), output=out, overwrite=True)
    assert file_hashes(out) == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "source"]


def test_a_failure_leaves_a_module_usable():
    model = tiny.build("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MethodError) as caught:
        prune(model, method=failing(MiddleError), calibration=calibration())
    assert isinstance(caught.value.__cause__, MiddleError)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("model.layers.0.") for name in changed)
    with torch.no_grad():
        assert model(tiny.tokens()).logits.isfinite().all()


def test_output_that_exists(tmp_path):
    source, out = tiny.save("llama", tmp_path / "source"), tmp_path / "out"
    first = prune(source, method=magnitude(), pattern=Unstructured(0.25), output=out)
    before = file_hashes(out)
    with pytest.raises(CheckpointError, match="exists already"):
        prune(source, method=magnitude(), output=out)
    assert file_hashes(out) == before
    second = prune(source, method=magnitude(), pattern=Unstructured(0.75), output=out, overwrite=True)
    assert first.totals["sparsity"] == 0.25
    assert second.totals["sparsity"] == verify(out, Checkpoint(source)).sparsity == 0.75
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "source"]


def test_overwriting_spares_what_secateur_did_not_write(tmp_path):
    source, out = tiny.save("llama", tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"holds no secateur\.json"):
        prune(source, method=magnitude(), output=out, overwrite=True)
    assert (out / "thesis.tex").read_text() == "years of work"
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(CheckpointError):
        prune(source, method=magnitude(), output=file, overwrite=True)
    assert file.read_text() == "mine"
    empty = tmp_path / "empty"
    empty.mkdir()
    prune(source, method=magnitude(), output=empty, overwrite=True)
    assert verify(empty, Checkpoint(source)).ok


def test_the_source_is_never_the_output(tmp_path):
    source = tiny.save("llama", tmp_path / "source")
    prune(source, method=magnitude(), output=tmp_path / "pruned")
    before = file_hashes(tmp_path)
    link = tmp_path / "link"
    link.symlink_to(source)
    for target in (source, source / "deeper" / "out", link, tmp_path / "pruned" / ".." / "source"):
        with pytest.raises(CheckpointError, match="is the source, or lies inside it"):
            prune(source, method=magnitude(), output=target, overwrite=True)
    link.unlink()
    # A pruned model is a source like any other, and its folder as precious.
    with pytest.raises(CheckpointError, match="is the source"):
        prune(tmp_path / "pruned", method=magnitude(), output=tmp_path / "pruned", overwrite=True)
    assert file_hashes(tmp_path) == before


def test_a_source_inside_the_output_survives(tmp_path):
    outer = tmp_path / "outer"
    prune(tiny.save("llama", tmp_path / "first"), method=magnitude(), output=outer)
    inner = tiny.save("llama", outer / "inner")
    before = file_hashes(outer)
    with pytest.raises(CheckpointError, match="the output holds the source"):
        prune(inner, method=magnitude(), output=outer, overwrite=True)
    assert file_hashes(outer) == before


def test_a_folder_needs_an_output(tmp_path):
    source = tiny.save("llama", tmp_path / "source")
    with pytest.raises(CheckpointError, match="no output folder given"):
        prune(source, method=magnitude())


def test_the_output_folder_may_be_relative_and_deep(tmp_path, monkeypatch):
    source = tiny.save("llama", tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    prune(source.name, method=magnitude(), output=Path("a") / "b" / "out.v1")
    assert verify(tmp_path / "a" / "b" / "out.v1", Checkpoint(source)).ok
    assert sorted(os.listdir(tmp_path / "a" / "b")) == ["out.v1"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"propagate": "both"}, PatternError, "--propagate: got"),
        ({"only": ["*.nothing"]}, PatternError, "matches none of 21 matrices"),
        ({"skip": ["*"]}, PatternError, "nothing is left to prune"),
        ({"pattern": NM(2, 5)}, PatternError, r"needs in_features divisible by 5, got (32|48)"),
        ({"calibration": torch.full((2, 8), tiny.VOCABULARY)}, CalibrationError, "outside the vocabulary"),
        ({"calibration": tiny.tokens(length=65)}, CalibrationError, "64 positions"),
        ({"dtype": "int8"}, CheckpointError, "dtype must be"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(arguments, error, message, tmp_path):
    source = tiny.save("llama", tmp_path / "source")
    with pytest.raises(error, match=message):
        prune(source, **{"method": wanda(), "calibration": calibration(), "output": tmp_path / "out"} | arguments)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_a_matrix_that_sees_no_token_is_an_error(tmp_path):
    source = tiny.save("longcat_flash", tmp_path / "source")
    with pytest.raises(ModelStructureError, match=r"experts\.4.* saw no token of the 8 calibration samples.*--skip"):
        prune(source, method=wanda(), calibration=calibration(), output=tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_weights_that_are_not_finite_are_an_error(tmp_path):
    source = tiny.save("llama", tmp_path / "source")
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(NumericalError, match=rf"{name}: 1 of 1536 weights are NaN or infinite"):
        prune(source, method=wanda(), calibration=calibration(), output=tmp_path / "out")
    with pytest.raises(NumericalError, match=name):
        prune(source, method=magnitude(), output=tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def solved(change: Callable[[Problem, Solution], Solution]) -> Method:
    inner = wanda()
    return Method("wrong", lambda problem: change(problem, inner.solve(problem)), inner.needs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda p, s: Solution(s.weight, torch.ones_like(s.mask)), PatternError, "breaks 0.5 unstructured per row"),
        (lambda p, s: Solution(p.weight, s.mask), PatternError, "768 non-zero weights .* its own mask"),
        (lambda p, s: Solution(s.weight.double(), s.mask), PatternError, "float64"),
        (lambda p, s: Solution(s.weight.t(), s.mask.t()), PatternError, "of shape"),
        (lambda p, s: Solution(s.weight / 0, s.mask), NumericalError, "1536 of 1536 weights"),
    ],
)
def test_a_method_cannot_break_the_plan(change, error, message, tmp_path):
    source = tiny.save("llama", tmp_path / "source")
    arguments = {"calibration": calibration(), "output": tmp_path / "out", "only": ["*.up_proj"]}
    with pytest.raises(error, match=message):
        prune(source, method=solved(change), **arguments)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_a_module_in_memory_is_set_back_into_its_mode():
    model = tiny.build("mixtral").train()
    model.model.layers[1].eval()
    model.set_experts_implementation("grouped_mm")
    before = {name: module.training for name, module in model.named_modules()}
    prune(model, method=wanda(), pattern=Unstructured(0.5), calibration=tiny.tokens(8, 32))
    assert {name: module.training for name, module in model.named_modules()} == before
    assert model.config._experts_implementation == "grouped_mm"


def test_the_manifest_says_what_was_left_out_and_why(tmp_path):
    out = tmp_path / "out"
    source = tiny.save("mixtral", tmp_path / "source")
    manifest = prune(source, method=magnitude(), pattern=Unstructured(0.5), output=out)
    rows = {row["reason"]: row for row in manifest.left_out}
    assert set(rows) == {"router", "embedding or lm_head", "bias or norm"}
    assert rows["router"]["tensors"] == 3
    planned = sum(entry["shape"][0] * entry["shape"][1] for entry in manifest.matrices.values())
    checkpoint = Checkpoint(source)
    total = sum(torch.Size(checkpoint.shape(name)).numel() for name in checkpoint.names)
    assert planned + sum(row["weights"] for row in rows.values()) == total


def test_a_file_of_token_ids_needs_no_tokenizer(tmp_path):
    source = tiny.save("llama", tmp_path / "source")
    assert not (source / "tokenizer.json").exists()
    ids = tiny.tokens()
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    one = prune(source, method=wanda(), calibration=str(tmp_path / "ids.safetensors"), output=tmp_path / "one")
    other = prune(source, method=wanda(), calibration=ids, output=tmp_path / "other")
    assert one.tensors == other.tensors
