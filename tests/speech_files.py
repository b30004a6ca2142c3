"""Tiny models of speech, and recordings of noise."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)


def save_whisper(folder: Path) -> Path:
    """A Whisper that hears a second of sound, with six words."""
    sizes = {"encoder_layers": 3, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_model": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    room = {"vocab_size": 64, "num_mel_bins": 16, "max_source_positions": 50, "max_target_positions": 24}
    ids: dict[str, Any] = {"decoder_start_token_id": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = WhisperConfig(**sizes, **heads, **room, **ids, begin_suppress_tokens=None, init_std=0.3)
        WhisperForConditionalGeneration(config).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=16, chunk_length=1).save_pretrained(folder)
    words = ["[pad]", "<s>", "</s>", "[unk]", *["a", "bed", "sat", "at", "the", "desk"]]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>").save_pretrained(folder)
    return folder


def record(file: Path, values: int, seed: int, *, channels: int = 1, rate: int = 16000) -> numpy.ndarray[Any, Any]:
    """Write noise as a .wav file of whole numbers of 16 bits, and return it as numbers between -1 and 1."""
    noise = numpy.random.default_rng(seed).normal(scale=3000, size=(values, channels)).astype("<i2")
    with wave.open(str(file), "wb") as opened:
        opened.setnchannels(channels)
        opened.setsampwidth(2)
        opened.setframerate(rate)
        opened.writeframes(noise.tobytes())
    return (noise.astype(numpy.float32) / 32768).mean(axis=1)
