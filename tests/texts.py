"""Texts, files and tokenizers to calibrate with, and the sampling of the published code."""

import json
import random
from pydoc_data.topics import topics

import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from real_data import DATA

NAMES = sorted(topics)
WORDS = ["the", "pruning", "of", "trees", "is", "an", "old", "art", "and", "a", "patient", "one"]


def shared(path):
    if not (DATA / path).exists():
        pytest.skip(f"{DATA / path} is not on this machine")
    return DATA / path


@pytest.fixture(scope="module")
def tokenizer():
    """A real byte-level BPE whose texts start with <s>, and whose stated limit every long text exceeds."""
    from tokenizers.processors import TemplateProcessing

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(topics.values(), vocab_size=600, special_tokens=["<s>"], show_progress=False)
    trained._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, bos_token="<s>", model_max_length=16)


@pytest.fixture(scope="module")
def stories_tokenizer():
    return AutoTokenizer.from_pretrained(shared("models/stories260K"))


def sentences(count, seed):
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(1, 120))) for _ in range(count)]


def write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({"url": "u", field: text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def write_parquet(path, texts, field="text"):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({"url": ["u"] * len(texts), field: texts}), path)
    return str(path)
