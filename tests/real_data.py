"""A trained model and its text, which lie beside the repository on some machines, and a learnt tokenizer."""

import functools
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from secateur.calibration.corpora import load_corpus

DATA = Path(__file__).parents[2] / "shared" / "data"
STORIES = DATA / "models" / "stories260K"
STORIES_TEXT = DATA / "lm" / "tinystories_sample.txt"


def some_stories(folder: Path) -> str:
    """A file in the folder with the first tenth of the stories: enough where all of them would mostly be tokenised."""
    file = folder / "stories.txt"
    file.write_text(STORIES_TEXT.read_text(encoding="utf-8")[:200_000], encoding="utf-8")
    return str(file)


_TEXTS = tempfile.TemporaryDirectory(prefix="texts-")


@functools.cache
def some_docs() -> str:
    """A file with the 20,000 characters of python-docs: enough for a few windows, and tokenised at once."""
    file = Path(_TEXTS.name) / "docs.txt"
    documents = load_corpus("python-docs", "calibration").documents
    file.write_text("\n\n".join(documents[:: len(documents) // 10])[:20_000], encoding="utf-8")
    return str(file)


def byte_pair_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE learnt from the calibration part of python-docs; no text is unknown to it. Puts no <s>."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_learnt(vocabulary)), bos_token="<s>")


@functools.cache
def _learnt(vocabulary: int) -> str:
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
    return str(tokenizer.to_str())
