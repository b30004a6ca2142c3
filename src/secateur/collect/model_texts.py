"""Labelled texts for a certain model, one by one or in pairs, through its own tokenizer."""

import inspect
import logging
import random
from typing import Any

import torch

from secateur.calibration.images import chosen_count
from secateur.calibration.labels import PREFIX, read_texts
from secateur.calibration.named import NamedSamples
from secateur.calibration.windows import fewer, require_positive
from secateur.core.batch import LABELS
from secateur.errors import CalibrationError
from secateur.models.opening.opened import OpenedModel
from secateur.models.shape.structure import embeddings_of, is_encoder_decoder

_log = logging.getLogger("secateur")


def model_texts(
    opened: OpenedModel,
    spec: str,
    tokenizer: Any,
    *,
    samples: int | None,
    length: int | None,
    seed: int | None,
    what: str,
) -> NamedSamples:
    """The texts of a table as its tokenizer has them, the longest first: those of one length run together.

    Of more than `samples` as many are drawn with the seed; without a seed the first ones are taken, or all. They are
    cut at `length` tokens, or where the model has no more positions. Where a decoder writes, their labels are the
    tokens that it is to predict. Raises `CalibrationError` for a model without a tokenizer.
    """
    model: Any = opened.skeleton.model
    require_positive(samples=samples, length=length)
    tokenizer = tokenizer or opened.load_tokenizer()
    if tokenizer is None:
        raise CalibrationError(
            f"{PREFIX}{spec}: texts need the tokenizer of the model, and {type(model).__name__} has none. Copy it to "
            "the checkpoint."
        )
    table = read_texts(spec)
    there = range(len(table.texts))
    count = chosen_count(len(there), samples, seed)
    chosen = there[:count] if seed is None else random.Random(seed).sample(there, count)
    texts = [table.texts[number] for number in chosen]
    labels = None if table.labels is None else [table.labels[number] for number in chosen]
    positions, both = opened.skeleton.positions, is_encoder_decoder(model)
    # Of an encoder-decoder the encoder has half of the positions.
    limits = (length, positions // 2 if positions and both else positions, getattr(tokenizer, "model_max_length", None))
    most = min((limit for limit in limits if limit is not None), default=None)
    writes = both and embeddings_of(model, "get_output_embeddings") is not None
    taken = inspect.signature(model.forward).parameters
    each: list[dict[str, torch.Tensor]] = []
    cut = 0
    for text in texts:
        made = tokenizer(*text, truncation=most is not None and most < 1 << 30, max_length=most)
        cut += most is not None and len(made["input_ids"]) >= most and len(tokenizer(*text)["input_ids"]) > most
        own = {name: torch.tensor(value) for name, value in made.items() if name in taken}
        if writes and labels is not None:
            target = tokenizer(text_target=labels[len(each)].value, truncation=True, max_length=most)["input_ids"]
            own[LABELS] = torch.tensor(target)
        each.append(own)
    if cut:
        _log.warning(
            "%s of the %s texts of %s are longer than %s tokens, and are cut.", cut, len(each), table.file, most
        )
    # Memory: how many run at once is chosen by the first.
    order = sorted(range(len(each)), key=lambda number: -len(each[number]["input_ids"]))
    facts = {
        "source": "labelled texts",
        "sources": [{"corpus": table.file.name, "file": str(table.file)}],
        "cut": cut,
        **fewer(what, samples, len(each)),
    }
    ordered = None if labels is None else [labels[number] for number in order]
    return NamedSamples([each[number] for number in order], facts, labels=ordered)
