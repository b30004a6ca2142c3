"""Tiny random-weight versions of the architectures of transformers: three blocks, 32 wide, 128 tokens.

`ARCHITECTURES` are decoders, `ENCODERS` attend in both directions, `ENCODER_DECODERS` have a stack of each kind,
`STAGED` one for each width.

Every weight is random, norms and biases included, so that two computations that agree on these models agree because
they are the same computation. Nothing here is downloaded. Entries are named after transformers' `model_type`, followed
by the variant where there is more than one.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from packaging.version import Version
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCABULARY = 128
HIDDEN = 32
BLOCKS = 3
RESERVED = 3  # ids of the padding, first and last token; `tokens` stays clear of them
NOISE = 0.05

# Applied wherever the architecture's configuration has a field or an alias of that name.
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "init_std": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    # mixtures of experts
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    # multi-head latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    # gated delta rule
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    # state-space models
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_dt_rank": 4,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 8,
    "state_size": 8,
    "chunk_size": 8,
    "time_step_rank": 4,
}

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"

# Left out: doge with is_moe=True, whose router mixes the logits of different tokens and samples (transformers says so
# in a comment of DogeCDMoE.forward), so that its output depends on the batching; blt, whose nested models these fields
# do not reach. On a CPU xlstm does not run in bfloat16, nor xglm in float64, nor in float64 the mixtures that use
# grouped_mm unless their experts are set to "eager".

# name -> fields that differ from COMMON; "model_type" where the name is not one.
TABLE: dict[str, dict[str, Any]] = {
    # dense, rotary
    "llama": {},
    "llama_tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama_bias": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 6},
    "ministral3": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {"attention_bias": True},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        "tie_word_embeddings": True,
        "sliding_window": 6,
        "query_pre_attn_scalar": 8,
        "layer_types": [SLIDING, SLIDING, FULL],
    },
    "gemma3n_text": {
        "tie_word_embeddings": True,
        "sliding_window": 6,
        "intermediate_size": [48, 48, 48],
        "layer_types": [SLIDING, FULL, FULL],
        "num_kv_shared_layers": 1,  # the third block reuses the second one's keys and values
        "activation_sparsity_pattern": [0.5, 0.0, 0.0],
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "altup_num_inputs": 2,
        "laurel_rank": 8,
    },
    "gemma4_text": {
        "tie_word_embeddings": True,
        "sliding_window": 6,
        "layer_types": [SLIDING, FULL, FULL],
        "num_kv_shared_layers": 1,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "per_layer_config": {"01": {"head_dim": 16}, "02": {"head_dim": 16}},
    },
    "phi": {},
    "phi3": {"sliding_window": 6, "original_max_position_embeddings": 64},
    "starcoder2": {"tie_word_embeddings": True, "sliding_window": 6},
    "stablelm": {"use_qkv_bias": True, "qk_layernorm": True},
    "stablelm_parallel": {"model_type": "stablelm", "use_parallel_residual": True},
    "cohere": {"tie_word_embeddings": True, "logit_scale": 1.0, "use_qk_norm": True},
    "cohere2": {
        "tie_word_embeddings": True,
        "logit_scale": 1.0,
        "sliding_window": 6,
        "layer_types": [SLIDING, SLIDING, FULL],
    },
    "olmo": {"clip_qkv": 1.0},
    "olmo2": {},
    "olmo3": {"sliding_window": 6, "layer_types": [SLIDING, SLIDING, FULL]},
    "granite": {
        "embedding_multiplier": 2.0,
        "logits_scaling": 0.5,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.3,
    },
    "nemotron": {"attention_bias": True},
    "persimmon": {},
    "glm": {},
    "glm4": {},
    "ernie4_5": {"use_bias": True, "tie_word_embeddings": True},
    "smollm3": {"tie_word_embeddings": True, "no_rope_layers": [1, 1, 0]},
    "helium": {},
    "hunyuan_v1_dense": {},
    "exaone4": {"sliding_window": 6, "layer_types": [SLIDING, SLIDING, FULL]},
    "apertus": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
    },
    "arcee": {},
    "seed_oss": {"residual_dropout": 0.0},
    "diffllama": {},
    "nanochat": {},
    "doge": {},
    "vaultgemma": {"tie_word_embeddings": True, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "jais2": {},
    "cwm": {"sliding_window": 6, "layer_types": [FULL, SLIDING, SLIDING]},
    "modernbert-decoder": {
        "tie_word_embeddings": True,
        "local_attention": 6,
        "layer_types": [FULL, SLIDING, SLIDING],
    },
    "bitnet": {},
    "minicpm3": {"num_key_value_heads": 4, "tie_word_embeddings": True, "dim_model_base": 16},
    # Its _init_weights zeroes the padding row of a loaded checkpoint too, hence no padding token.
    "youtu": {"num_key_value_heads": 4, "tie_word_embeddings": True, "pad_token_id": None},
    # older: learned positions, ALiBi, fused projections
    "gpt2": {"tie_word_embeddings": True},
    "gpt_neo": {"attention_types": [[["global", "local"], 1], [["global"], 1]], "window_size": 6},
    "gpt_neox": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "gpt_neox_sequential": {"model_type": "gpt_neox", "use_parallel_residual": False},
    "gptj": {"rotary_dim": 4},
    "gpt_bigcode": {"tie_word_embeddings": True},
    "codegen": {"n_ctx": 64, "rotary_dim": 4},
    "opt": {"tie_word_embeddings": True, "ffn_dim": 48, "word_embed_proj_dim": HIDDEN},
    "opt_postnorm": {  # the 350M layout: norms after, and a projection on either side
        "model_type": "opt",
        "tie_word_embeddings": True,
        "ffn_dim": 48,
        "word_embed_proj_dim": 16,
        "do_layer_norm_before": False,
    },
    "bloom": {"tie_word_embeddings": True},
    "falcon": {"num_kv_heads": 4, "ffn_hidden_size": 48},
    "falcon_new": {
        "model_type": "falcon",
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "ffn_hidden_size": 48,
    },
    "falcon_alibi": {
        "model_type": "falcon",
        "alibi": True,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
        "num_kv_heads": 4,
        "ffn_hidden_size": 48,
    },
    "mpt": {"max_seq_len": 64, "expansion_ratio": 2, "tie_word_embeddings": True},
    "xglm": {"tie_word_embeddings": True, "ffn_dim": 48},
    "biogpt": {"tie_word_embeddings": True},
    "openai-gpt": {"tie_word_embeddings": True},
    "gpt_neox_japanese": {},
    # mixtures of experts
    "mixtral": {},
    "qwen2_moe": {"mlp_only_layers": [0], "shared_expert_intermediate_size": 24},
    "qwen3_moe": {"mlp_only_layers": [0]},
    "phimoe": {"attention_bias": True},
    "olmoe": {},
    "flex_olmo": {},
    "granitemoe": {"tie_word_embeddings": True},
    "granitemoeshared": {"tie_word_embeddings": True, "shared_intermediate_size": 24},
    "deepseek_v2": {
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "topk_method": "group_limited_greedy",
        "n_group": 2,
        "topk_group": 1,
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
    },
    "gpt_oss": {"sliding_window": 6, "intermediate_size": 32},
    "llama4_text": {
        "intermediate_size_mlp": 64,
        "moe_layers": [1],
        "no_rope_layers": [1, 1, 0],
        "attention_chunk_size": 8,
    },
    "glm4_moe": {"n_shared_experts": 1, "use_qk_norm": True},
    "ernie4_5_moe": {
        "tie_word_embeddings": True,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_end_index": 2,
    },
    "minimax_m2": {},
    "afmoe": {"num_shared_experts": 1, "sliding_window": 6, "layer_types": [SLIDING, SLIDING, FULL]},
    "hunyuan_v1_moe": {},
    "exaone_moe": {"sliding_window": 6, "layer_types": [SLIDING, SLIDING, FULL]},
    "mimo_v2_flash": {"sliding_window": 6, "layer_types": [FULL, SLIDING, SLIDING]},
    "dbrx": {
        "d_model": HIDDEN,  # copied into the experts before the alias hidden_size is applied
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 4.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "jetmoe": {"tie_word_embeddings": True},
    "longcat_flash": {
        "num_key_value_heads": 4,
        "num_layers": BLOCKS,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 16,
        "zero_expert_num": 2,
        "moe_topk": 2,
    },
    # recurrent and hybrid
    "qwen3_next": {"shared_expert_intermediate_size": 24, "layer_types": [LINEAR, FULL, LINEAR]},
    "qwen3_5_text": {"layer_types": [LINEAR, FULL, LINEAR]},
    "olmo_hybrid": {"layer_types": [LINEAR, FULL, LINEAR]},
    "kimi_linear": {
        "num_key_value_heads": 4,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "layer_types": [LINEAR, FULL, LINEAR],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "mamba": {"tie_word_embeddings": True},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "falcon_mamba": {"tie_word_embeddings": True},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "granitemoehybrid": {"shared_intermediate_size": 24, "layer_types": [LINEAR, FULL, LINEAR]},
    "nemotron_h": {
        "layers_block_type": [LINEAR, FULL, "moe"],
        "ssm_state_size": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "moe_shared_expert_intermediate_size": 16,
    },
    "lfm2": {"tie_word_embeddings": True, "layer_types": ["conv", FULL, "conv"], "block_multiple_of": 16},
    "lfm2_moe": {"tie_word_embeddings": True, "layer_types": ["conv", FULL, "conv"], "num_dense_layers": 1},
    "minimax": {"layer_types": [LINEAR, FULL, LINEAR], "block_size": 8},
    "recurrent_gemma": {"tie_word_embeddings": True, "lru_width": HIDDEN, "attention_window_size": 6},
    "zamba": {
        "tie_word_embeddings": True,
        "layers_block_type": ["hybrid", LINEAR, "hybrid"],
    },
    "zamba2": {
        "tie_word_embeddings": True,
        "layers_block_type": ["hybrid", LINEAR, "hybrid"],
        "n_mamba_heads": 8,
        "mamba_ngroups": 2,
    },
    "hrm_text": {"H_cycles": 2, "L_cycles": 2, "embedding_scale": 4.0},
    "rwkv": {"attention_hidden_size": HIDDEN},
    "xlstm": {"num_heads": 4, "chunk_size": 16, "ffn_round_up_to_multiple_of": 8},
}

# Models that predict no next token, each with the automatic class that opens it. Their special tokens are there twice.
MASKED, PLAIN = "AutoModelForMaskedLM", "AutoModel"
SPECIAL = {"cls_token_id": 1, "sep_token_id": 2, "mask_token_id": 2}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": (MASKED, {}),
    "bert_embeddings": (PLAIN, {"model_type": "bert"}),
    "bert_classifier": ("AutoModelForSequenceClassification", {"model_type": "bert"}),
    "roberta": (MASKED, {}),
    "xlm-roberta": (PLAIN, {}),
    "roberta-prelayernorm": (MASKED, {}),
    "camembert": (MASKED, {}),
    "data2vec-text": (PLAIN, {}),
    "electra": (MASKED, {"embedding_size": 16}),
    "mpnet": (PLAIN, {}),
    "distilbert": (MASKED, {"hidden_dim": 48}),
    "modernbert": (MASKED, {**SPECIAL, "local_attention": 6}),
    "eurobert": (PLAIN, {"mask_token_id": 2}),
    "nomic_bert": (MASKED, {}),
    "deberta": (MASKED, {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "deberta-v2": (PLAIN, {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}),
    "ernie": (MASKED, {}),
    "rembert": (PLAIN, {"input_embedding_size": 16}),
    "convbert": (MASKED, {"embedding_size": HIDDEN}),
    "megatron-bert": (MASKED, {}),
    "fnet": (PLAIN, {}),
    "splinter": (PLAIN, {}),
}
PIXELS = {"image_size": 24, "patch_size": 8, "num_hidden_layers": BLOCKS, "vocab_size": VOCABULARY}
VISION: dict[str, tuple[str, dict[str, Any]]] = {
    name: (PLAIN, PIXELS | {"hidden_size": HIDDEN, "num_attention_heads": 4, "intermediate_size": 48})
    for name in (
        "vit",
        "deit",
        "beit",
        "dinov2",
        "dinov2_with_registers",
        "dinov3_vit",
        "vit_msn",
        "siglip_vision_model",
        "clip_vision_model",
        "ijepa",
        "data2vec-vision",
        "aimv2_vision_model",
    )
} | {
    "vit_classifier": ("AutoModelForImageClassification", PIXELS | {"model_type": "vit"}),
}
ENCODERS |= VISION

# An encoder of three blocks and a decoder of two.
TWO_STACKS = "AutoModelForSeq2SeqLM"
LIKE_BART = {
    "encoder_layers": BLOCKS,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "decoder_start_token_id": 2,
}
LIKE_T5 = {
    "num_decoder_layers": 2,
    "d_kv": 8,
    "d_ff": 48,
    "relative_attention_num_buckets": 8,
    "decoder_start_token_id": 0,
}
GEMMA_STACK = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 6,
    "query_pre_attn_scalar": 8,
}
ENCODER_DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": (TWO_STACKS, LIKE_T5),
    "t5_gated": (TWO_STACKS, LIKE_T5 | {"model_type": "t5", "feed_forward_proj": "gated-gelu"}),
    "t5_base": (PLAIN, LIKE_T5 | {"model_type": "t5"}),
    "mt5": (TWO_STACKS, LIKE_T5),
    "umt5": (TWO_STACKS, LIKE_T5),
    "longt5": (TWO_STACKS, LIKE_T5 | {"local_radius": 3}),
    "longt5_global": (
        TWO_STACKS,
        LIKE_T5
        | {
            "model_type": "longt5",
            "encoder_attention_type": "transient-global",
            "local_radius": 3,
            "global_block_size": 2,
        },
    ),
    "switch_transformers": (
        TWO_STACKS,
        LIKE_T5 | {"num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    ),
    "bart": (TWO_STACKS, LIKE_BART),
    "bart_base": (PLAIN, LIKE_BART | {"model_type": "bart"}),
    "mbart": (TWO_STACKS, LIKE_BART),
    "marian": (TWO_STACKS, LIKE_BART),
    "marian_apart": (
        TWO_STACKS,
        LIKE_BART
        | {"model_type": "marian", "share_encoder_decoder_embeddings": False, "decoder_vocab_size": VOCABULARY},
    ),
    "pegasus": (TWO_STACKS, LIKE_BART),
    "pegasus_x": (TWO_STACKS, LIKE_BART | {"block_size": 4, "num_global_tokens": 2}),
    "blenderbot": (TWO_STACKS, LIKE_BART),
    "blenderbot-small": (TWO_STACKS, LIKE_BART),
    "m2m_100": (TWO_STACKS, LIKE_BART),
    "nllb-moe": (TWO_STACKS, LIKE_BART | {"encoder_sparse_step": 2, "decoder_sparse_step": 2, "expert_capacity": 16}),
    "plbart": (TWO_STACKS, LIKE_BART),
    "mvp": (TWO_STACKS, LIKE_BART),
    "led": (
        TWO_STACKS,
        LIKE_BART
        | {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
    ),
    "bigbird_pegasus": (TWO_STACKS, LIKE_BART | {"attention_type": "original_full"}),
    "fsmt": (TWO_STACKS, LIKE_BART | {"src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY}),
    "prophetnet": (
        TWO_STACKS,
        {
            "num_encoder_layers": BLOCKS,
            "num_decoder_layers": 2,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
            "num_buckets": 8,
        },
    ),
    "t5gemma": (
        TWO_STACKS,
        {
            "encoder": GEMMA_STACK | {"num_hidden_layers": BLOCKS, "layer_types": [SLIDING, FULL, FULL]},
            "decoder": GEMMA_STACK | {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL]},
        },
    ),
}


# Blocks whose width changes from stage to stage, on images of 32 by 32.
WINDOWS = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [2, 3],
    "num_hidden_layers": 2,
    "num_attention_heads": [2, 4],
    "window_size": 4,
}
MAPS: dict[str, Any] = {"hidden_sizes": [8, 16, 24], "depths": [2, 3, 1]}
REDUCED = MAPS | {"image_size": 32, "num_encoder_blocks": 3, "num_attention_heads": [1, 2, 4], "mlp_ratios": [2, 2, 2]}
STAGED: dict[str, tuple[str, dict[str, Any]]] = {
    name: (PLAIN, fields)
    for name, fields in {
        "swin": WINDOWS,
        "swinv2": WINDOWS,
        "donut-swin": WINDOWS,
        "convnext": MAPS | {"num_stages": 3},
        "convnextv2": MAPS | {"num_stages": 3},
        "segformer": REDUCED | {"sr_ratios": [4, 2, 1], "patch_sizes": [3, 3, 3], "strides": [2, 2, 2]},
        "pvt": REDUCED | {"sequence_reduction_ratios": [4, 2, 1], "patch_sizes": [4, 2, 2], "strides": [4, 2, 2]},
        "pvt_v2": REDUCED | {"sr_ratios": [4, 2, 1], "patch_sizes": [3, 3, 3], "strides": [2, 2, 2]},
        "focalnet": {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 8,
            "hidden_sizes": [8, 16],
            "depths": [2, 3],
            "focal_levels": [1, 1],
            "focal_windows": [3, 3],
        },
        "hiera": {
            "image_size": [32, 32],
            "patch_size": [3, 3],
            "patch_stride": [2, 2],
            "patch_padding": [1, 1],
            "embed_dim": 8,
            "depths": [2, 3],
            "num_heads": [1, 2],
            "query_stride": [2, 2],
            "num_query_pool": 1,
            "masked_unit_size": [4, 4],
            "masked_unit_attention": [True, False],
        },
    }.items()
}

NO_DECODERS = ENCODERS | ENCODER_DECODERS | STAGED


def _config(name: str) -> PreTrainedConfig:
    fields = dict(TABLE[name] if name in TABLE else NO_DECODERS[name][1])
    kind = CONFIG_MAPPING[fields.pop("model_type", name)]
    known = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
    return kind(**{**{key: value for key, value in COMMON.items() if key in known}, **fields})


# What transformers itself gets wrong before these versions: a forward that fails, or one that looks ahead (doge).
MENDED_IN = {"deepseek_v2": Version("5.13"), "zamba": Version("5.16"), "doge": Version("5.17")}


def _known(name: str) -> bool:
    """Whether this version of transformers has the architecture, with blocks of these types, and can run it."""
    if name in MENDED_IN and Version(transformers.__version__) < MENDED_IN[name]:
        return False
    try:
        _config(name)
    except (KeyError, StrictDataclassError):
        return False
    return True


# A test says that the newest versions of transformers have them all.
NOT_HERE = [name for name in TABLE if not _known(name)]
ARCHITECTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    name: partial(_config, name) for name in TABLE if name not in NOT_HERE
}
ENCODERS = {name: entry for name, entry in ENCODERS.items() if _known(name)}
ENCODER_DECODERS = {name: entry for name, entry in ENCODER_DECODERS.items() if _known(name)}
STAGED = {name: entry for name, entry in STAGED.items() if _known(name)}


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The named architecture with random weights, in eval mode. Leaves torch's own random state alone.

    Skips the test where this version of transformers cannot run it.
    """
    if name in NOT_HERE:
        pytest.skip(f"transformers {transformers.__version__} cannot run {name}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        auto = getattr(transformers, NO_DECODERS[name][0]) if name in NO_DECODERS else AutoModelForCausalLM
        model = auto.from_config(_config(name), dtype=dtype)
        stored = set(model.state_dict())
        with torch.no_grad():
            for _, parameter in sorted(model.named_parameters()):
                parameter += (NOISE * torch.randn(parameter.shape)).to(parameter.dtype)
            for key, buffer in sorted(model.named_buffers()):
                if key in stored and buffer.is_floating_point():
                    noise = NOISE * torch.randn(buffer.shape)
                    # Relative where there is something: masks, decay rates and thresholds keep their zeros and signs.
                    buffer += (noise * buffer.float() if buffer.any() else noise).to(buffer.dtype)
    return model.eval()


# What was written once in this process is copied from then on.
_WRITTEN: dict[str, Path] = {}
_KEPT = tempfile.TemporaryDirectory(prefix="tiny-models-")


def save(name: str, folder: Path, **kwargs: Any) -> Path:
    """The named model as `build` makes it, written to `folder` as safetensors; `kwargs` go to `save_pretrained`."""
    key = repr((name, TABLE.get(name), sorted(kwargs.items())))
    if key not in _WRITTEN:
        first = Path(_KEPT.name, str(len(_WRITTEN)))
        build(name).save_pretrained(first, **kwargs)
        _WRITTEN[key] = first
    return Path(shutil.copytree(_WRITTEN[key], folder, copy_function=shutil.copyfile, dirs_exist_ok=True))


def by_turns(names: Iterable[str], turn: int, of: int = 3) -> Any:
    """A test of every name, of which every third one, from the one numbered `turn` on, is not slow."""
    marks = [[] if number % of == turn else pytest.mark.slow for number in range(of)]
    own = [pytest.param(name, marks=marks[number % of]) for number, name in enumerate(names)]
    return pytest.mark.parametrize("name", own)


def pairs_by_turns(names: str, first: Iterable[Any], second: Sequence[Any]) -> Any:
    """A test of all pairs, where tuples are several arguments; each of the first has one that is not slow, by turns."""

    def arguments(value: Any) -> tuple[Any, ...]:
        return value if isinstance(value, tuple) else (value,)

    own = [
        pytest.param(*arguments(one), *arguments(other), marks=[] if number % len(second) == turn else pytest.mark.slow)
        for number, one in enumerate(first)
        for turn, other in enumerate(second)
    ]
    return pytest.mark.parametrize(names, own, ids=str)


def pixels(samples: int = 4, seed: int = 0, size: int = 24) -> torch.Tensor:
    """Random pixel values for the models of images."""
    return torch.randn(samples, 3, size, size, generator=torch.Generator().manual_seed(seed))


def tokens(samples: int = 4, length: int = 16, seed: int = 0) -> torch.Tensor:
    """Random token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(RESERVED, VOCABULARY, (samples, length), generator=generator)
