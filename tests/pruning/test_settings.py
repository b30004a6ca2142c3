"""What settings of `prune` change, and what they must not: batches, shards, dtypes, globs, plans, events."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import tiny
from mapped_files import mapped_files
from pruned_checkpoints import (
    assert_same_tensors,
    bits,
    calibration,
    load,
    masks,
    read_tensors,
    recording,
    same_bytes,
    stored,
)
from secateur.core.patterns import NM, Unstructured
from secateur.core.problem import Method, Problem, Solution
from secateur.errors import PatternError
from secateur.files.checkpoint import Checkpoint
from secateur.methods.magnitude import magnitude
from secateur.methods.wanda import wanda
from secateur.models.opening.opened import open_model
from secateur.plans.plan import Plan
from secateur.pruning.engine import prune
from secateur.record.manifest import read_manifest
from secateur.record.verify import verify
from secateur.runs.events import Event

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


@pytest.mark.parametrize("propagate", ["pruned", "dense"])
def test_states_on_disk_change_nothing(propagate, tmp_path):
    source = tiny.save("gemma2", tmp_path / "source")
    folder = tmp_path / "fast"
    seen: list[int] = []

    def watch(event: Event) -> None:
        if event.stage == "solve":
            seen.append(len(mapped_files(folder)))

    settings = {"method": wanda(), "calibration": calibration(), "batch_size": 3, "propagate": propagate}
    memory = prune(source, output=tmp_path / "memory", offload_states="never", **settings)
    disk = prune(source, output=tmp_path / "disk", offload_states=str(folder), on_event=watch, **settings)
    assert memory.blocks == disk.blocks  # among others how far each block's output moved
    assert_same_tensors(tmp_path / "memory", tmp_path / "disk")
    assert set(seen) == {3}
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


# What goes wrong


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
