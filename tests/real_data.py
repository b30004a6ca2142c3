"""A trained model and its text, which lie beside the repository on some machines, and a learnt tokenizer."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from secateur.calibration.corpora import load_corpus

DATA = Path(__file__).parents[2] / "shared" / "data"
STORIES = DATA / "models" / "stories260K"
STORIES_TEXT = DATA / "lm" / "tinystories_sample.txt"


def byte_pair_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE learnt from the calibration part of python-docs; no text is unknown to it. Puts no <s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(load_corpus("python-docs", "calibration").documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
