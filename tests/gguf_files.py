"""GGUF files, written by the library of the format."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

gguf: Any = pytest.importorskip("gguf", reason="the gguf package is not installed")

HEADS, KEY_HEADS = 4, 2
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def gguf_name(name: str) -> str:
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, _, block, *path, _ = name.split(".")
    return f"blk.{block}.{NAMES['.'.join(path)]}.weight"


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of q or k as llama.cpp orders them: the two halves of each head's rotation take turns."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(folder: Path, file: Path, dtype: torch.dtype) -> None:
    """Write a LLaMA checkpoint with its tokenizer as llama.cpp's converter would, not quantised."""
    model: Any = LlamaForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    assert [index for _, index in vocabulary] == list(range(config.vocab_size))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types(
        [gguf.TokenType.CONTROL if token == "<s>" else gguf.TokenType.NORMAL for token, _ in vocabulary]
    )
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        if name.endswith("q_proj.weight"):
            value = interleaved(value, HEADS)
        elif name.endswith("k_proj.weight"):
            value = interleaved(value, KEY_HEADS)
        writer.add_tensor(gguf_name(name), value.to(torch.float32 if value.dim() == 1 else dtype).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
