"""Training windows: documents tokenised one by one, laid end to end and cut, with a part held out."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from secateur.calibration.corpora import load_corpus
from secateur.calibration.documents import Corpus
from secateur.calibration.windows import Source, Windows, given_windows, one_spec, require_positive
from secateur.errors import CalibrationError

DEFAULT_LENGTH = 1024  # as in the published script; the papers' calibration and evaluation take 2048
DOCUMENTS_AT_ONCE = 256


def training_windows(
    source: Source,
    tokenizer: Any,
    *,
    samples: int,
    length: int | None,
    held_out: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Windows, Windows]:
    """Return at most `samples` windows to train on and `held_out` others, both of `length` (1024) tokens.

    The documents of the corpus's calibration part are tokenised one by one with the default special tokens, laid end
    to end and cut into windows that do not overlap. The first windows are held out, so that they do not depend on
    `samples`; the next ones are for training, fewer than `samples` where the text is short. Token ids (a tensor,
    `Windows`, or a `.safetensors` file) are taken as they are, and their first rows are held out.

    Errors: CalibrationError, also for a text that leaves nothing to train on.
    Reference: Wanda, `lora_ft/finetune_lm.py`, where validation windows are those of C4's validation part instead.
    Blank documents are left out here.
    """
    require_positive(samples=samples, length=length, held_out=held_out)
    given = given_windows(source, None, length)
    if given is not None:
        return _parted(given, samples, held_out, "the rows given")
    corpus = load_corpus(one_spec(source, tokenizer, "training"), "calibration")
    length = length or DEFAULT_LENGTH
    needed = (samples + held_out) * length
    parts: list[torch.Tensor] = []
    found = documents = 0
    for ids in _tokenised(corpus, tokenizer):
        parts.append(ids)
        documents, found = documents + 1, found + len(ids)
        progress(min(found, needed) // length, needed // length)
        if found >= needed:
            break
    count = min(found, needed) // length
    name = {"class": type(tokenizer).__name__, "name": str(getattr(tokenizer, "name_or_path", ""))}
    facts = {"documents": len(corpus.documents), "documents_used": documents, "tokens": found}
    provenance = {"source": "text", "sampling": "packed", "tokenizer": name, **corpus.provenance, **facts}
    ids = torch.cat([torch.empty(0, dtype=torch.int64), *parts])[: count * length]
    packed = Windows(ids.reshape(count, length).clone(), provenance)
    return _parted(packed, samples, held_out, f"{corpus.name}, {found} tokens in windows of {length}")


def _parted(windows: Windows, samples: int, held_out: int, where: str) -> tuple[Windows, Windows]:
    if windows.samples <= held_out:
        raise CalibrationError(
            f"{where}: {windows.samples} windows, of which {held_out} are held out, and training needs one at least. "
            "Give more, use a shorter --length for text, or hold out fewer with --held-out."
        )
    result = []
    for role, first, last in (("training", held_out, held_out + samples), ("held out", 0, held_out)):
        part = windows.part(first, last)
        facts = {"role": role, **part.shape, "first_window": first}
        result.append(replace(part, provenance={**windows.provenance, **facts}))
    return result[0], result[1]


def _tokenised(corpus: Corpus, tokenizer: Any) -> Iterator[torch.Tensor]:
    """The token ids of each document that is not blank."""
    texts = (text for text in corpus.documents if text.strip())
    while some := list(islice(texts, DOCUMENTS_AT_ONCE)):
        # `verbose=False` silences the warning about documents longer than the model's context.
        for ids in tokenizer(some, return_attention_mask=False, verbose=False)["input_ids"]:
            yield torch.tensor(ids, dtype=torch.int64)
