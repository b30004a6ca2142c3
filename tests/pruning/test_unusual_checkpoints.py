"""Checkpoints as they come: tensors nobody reads, missing prefixes, shared blocks, stale entries, vision towers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import tiny
from pruned_checkpoints import calibration, load, moe_inputs, read_tensors, recording, same_bytes, squares
from secateur.files.checkpoint import Checkpoint
from secateur.methods.wanda import wanda
from secateur.models.opening.opened import open_model
from secateur.models.shape.matrices import Matrix
from secateur.pruning.engine import prune
from secateur.record.verify import verify


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
