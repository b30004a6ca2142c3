"""Token windows drawn from text for calibration, and cut from it for evaluation, as the published loops do."""

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, get_args

import torch

from secateur.arguments import calling
from secateur.calibration.corpora import Spec, is_token_file, load_corpus, weighted
from secateur.calibration.documents import Corpus
from secateur.calibration.given import taken
from secateur.calibration.hub import Role
from secateur.calibration.own_text import OwnText, Write, is_own_text, own_text, own_windows
from secateur.calibration.text import Text, check_bos
from secateur.calibration.windows import (
    Progress,
    Source,
    Windows,
    fewer,
    given_windows,
    one_spec,
    require_positive,
    require_tokenizer,
    token_file,
)
from secateur.core.choices import Bos, Sampling
from secateur.errors import CalibrationError

Report = Callable[[int], None]  # called with the number of windows so far

DEFAULT_SAMPLES = 128
DEFAULT_LENGTH = 2048
DRAWS_PER_SAMPLE = 1000
CHARACTERS_PER_TOKEN = 64
FEWEST_CHARACTERS = 16 * 2**20
C4_EVALUATION_WINDOWS = 256


@calling
def calibration_windows(
    source: Source | Sequence[str | os.PathLike[str]],
    tokenizer: Any,
    *,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    sampling: Sampling | None = None,
    bos: Bos = "papers",
    write: Write | None = None,
    progress: Progress = lambda done, total: None,
) -> Windows:
    """Return calibration windows of shape (samples, length), by default 128 of 2048 tokens from text.

    `source` is a corpus spec (see `load_corpus`), several of them to be mixed, each optionally weighted as `0.7*c4`,
    or token ids: a tensor, `Windows`, or a `.safetensors` file with the key `input_ids`, and `attention_mask` where
    rows are padded; or texts or token ids in memory, see `secateur.calibration.given`. Token ids are taken as they are:
    `samples` keeps the first ones, and a `length` that differs is an error.

    `sampling="document"` draws a document uniformly with replacement until one is longer than `length` tokens, and a
    window in it; `"concat"` draws windows from one long token sequence; None is what the papers do: "concat" for
    wikitext2, "document" for everything else. Both draw the windows that the published loops draw after
    `random.seed(seed)`. In a mixture the source at position k draws with `seed + k`, and the windows are shuffled
    with `seed`. `bos` is that of `evaluation_windows`: "papers" leaves BOS where a window happens to begin with its
    document. `write` has a model write the texts of `self`. `progress` is called with (windows done, windows in all).

    Errors: CalibrationError, also when no document is long enough after about 1000 draws for each window.
    Reference: Wanda and SparseGPT, semantics of `get_c4` (document) and `get_wikitext2` (concat) in their loaders.
    """
    source = taken(source, samples or DEFAULT_SAMPLES, "source")
    given, shares = _asked(source, tokenizer, samples, length, sampling)
    if given is not None:
        return _as_given(given, bos)
    text = Text(tokenizer, bos)
    total = sum(count for _, _, count in shares)
    parts: list[Windows] = []
    for position, (spec, weight, count) in enumerate(shares):
        done = sum(part.samples for part in parts)

        def report(windows: int, done: int = done) -> None:
            progress(done + windows, total)

        size = length or DEFAULT_LENGTH
        if is_own_text(spec):
            part = _written(own_text(spec, tokenizer, count, size, seed + position, sampling), text, write)
        else:
            part = _sampled(spec, text, count, size, seed + position, sampling, report)
        parts.append(replace(part, provenance={"weight": float(weight), **part.provenance}))
    return _mixed(parts, seed, text)


def text_corpora(source: Any, tokenizer: Any, samples: int | None, length: int | None, sampling: Any) -> list[Spec]:
    """Return the specs of the text that calibration windows are drawn from: none where the source is token ids.

    Errors: CalibrationError for what `calibration_windows` refuses without looking at the text.
    """
    _, shares = _asked(source, tokenizer, samples, length, sampling)
    return [spec for spec, _, _ in shares if not is_token_file(spec)]


def own_texts(
    source: Any, tokenizer: Any, samples: int | None, length: int | None, seed: int, sampling: Any
) -> list[OwnText]:
    """Return what `calibration_windows` would ask the model to write. Errors: those of `text_corpora`."""
    _, shares = _asked(source, tokenizer, samples, length, sampling)
    return [
        own_text(spec, tokenizer, count, length or DEFAULT_LENGTH, seed + position, sampling)
        for position, (spec, _, count) in enumerate(shares)
        if is_own_text(spec)
    ]


def _asked(
    source: Any, tokenizer: Any, samples: int | None, length: int | None, sampling: Any
) -> tuple[Windows | None, list[tuple[Spec, Fraction, int]]]:
    """Return the windows where the source is token ids, else None and the shares of the texts in the mixture."""
    require_positive(samples=samples, length=length)
    if sampling not in (*get_args(Sampling), None):
        raise CalibrationError(f"--sampling: got {sampling!r}, expected document or concat.")
    given = given_windows(source, samples, length)
    shares = [] if given is not None else _shares(source, samples or DEFAULT_SAMPLES)
    require_tokenizer(tokenizer, [spec for spec, _, _ in shares])
    return given, shares


@calling
def evaluation_windows(
    source: Source, tokenizer: Any, *, length: int | None = None, windows: int | None = None, bos: Bos = "papers"
) -> Windows:
    """Return the windows of the papers' perplexity, shape (windows, length), by default of 2048 tokens.

    The evaluation part of the corpus is joined, tokenised in one call with the default special tokens and cut into
    windows that do not overlap; the remainder is dropped. `windows` keeps the first ones. For C4 that is 256 by
    default. Token ids are taken as they are, as in `calibration_windows`.

    `bos` says where BOS, the token that begins a text, stands. "papers": where the tokenizer puts it, before the first
    window alone. "always": before every window, each of length - 1 tokens of the text, all of which are then predicted.
    "never": nowhere.

    Errors: CalibrationError, also when the text is shorter than one window, and for `bos` that cannot be had.
    Reference: Wanda, `lib/eval.py`, and SparseGPT, `datautils.py` (`get_wikitext2`, `get_c4`).
    """
    require_positive(windows=windows, length=length)
    source = taken(source, windows, "source")
    if (given := given_windows(source, windows, length, "windows")) is not None:
        return _as_given(given, bos)
    spec = one_spec(source, tokenizer, "evaluation")
    text = Text(tokenizer, bos)
    corpus = load_corpus(spec, "evaluation")
    length = length or DEFAULT_LENGTH
    own = text.room(length)
    limit = C4_EVALUATION_WINDOWS if windows is None and corpus.name == "c4" else windows
    needed = None if limit is None else limit * own
    joined, whole = _leading_text(corpus, None if needed is None else _character_bound(needed))
    ids = text.ids(joined)
    # Exact: where a text is cut shows in its last tokens only, so the needed ones must lie far from the cut.
    if not whole and needed is not None and len(ids) < 2 * needed:
        joined, _ = _leading_text(corpus, None)
        ids = text.ids(joined)
    count = min(len(ids) // own, limit or len(ids))
    if count == 0:
        raise _too_short(corpus, len(ids), f"one window needs {own}")
    provenance = {
        **_provenance("evaluation", text, count, length),
        "sources": [{**corpus.provenance, "characters": len(joined), "tokens": len(ids)}],
        "tokens_dropped": len(ids) - count * own,
        **fewer("windows", windows, count),
    }
    return Windows(text.begun(ids[: count * own].reshape(count, own)), provenance)


def _as_given(windows: Windows, bos: Bos) -> Windows:
    check_bos(bos)
    if bos != "papers":
        raise CalibrationError(f"--bos {bos}: token ids are taken as they are. Leave --bos out.")
    return windows


def _shares(source: Any, samples: int) -> list[tuple[Spec, Fraction, int]]:
    """Return (spec, weight, samples) of each source: weights sum to one, samples by largest remainder."""
    listed = source if isinstance(source, Sequence) and not isinstance(source, str) else [source]
    for spec in listed:
        if not isinstance(spec, str | os.PathLike | Corpus):
            raise CalibrationError(
                f"calibration: got {type(spec).__name__}, expected corpus specs, or alone a tensor or Windows."
            )
    if not listed:
        raise CalibrationError("calibration: got no corpus, expected at least one. Pass --calibration c4, for example.")
    parsed = [weighted(os.fspath(spec) if isinstance(spec, os.PathLike) else spec) for spec in listed]
    total = sum(weight for _, weight in parsed)
    quotas = [samples * weight / total for _, weight in parsed]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda position: counts[position] - quotas[position])
    for position in by_remainder[: samples - sum(counts)]:
        counts[position] += 1
    for (spec, weight), count in zip(parsed, counts, strict=True):
        if count == 0:
            raise CalibrationError(
                f"{spec}: its weight {float(weight / total):.3g} of {samples} samples is less than one window. "
                "Raise the weight, ask for more --samples, or leave it out."
            )
    return [(spec, weight / total, count) for (spec, weight), count in zip(parsed, counts, strict=True)]


def _sampled(
    spec: Spec, text: Text, samples: int, length: int, seed: int, sampling: Sampling | None, report: Report
) -> Windows:
    """Return the windows of one source of a mixture."""
    if is_token_file(spec):
        given = token_file(str(spec), samples, length)
        if given.samples < samples:
            raise CalibrationError(
                f"{spec}: {given.samples} windows, expected {samples} for its share of the mixture. "
                "Lower its weight or ask for fewer --samples."
            )
        report(samples)
        return given
    corpus = load_corpus(spec, "calibration")
    sampling = sampling or ("concat" if corpus.name == "wikitext2" else "document")
    sample = _document_windows if sampling == "document" else _concat_windows
    ids, facts = sample(corpus, text, samples, text.room(length), seed, report)
    shape = {"samples": samples, "length": length}
    return Windows(text.begun(ids), {**corpus.provenance, **shape, "seed": seed, "sampling": sampling, **facts})


def _written(asked: OwnText, text: Text, write: Write | None) -> Windows:
    """Return the windows of text that the model writes itself."""
    if write is None:
        raise CalibrationError(
            f"{asked.spec}: is text that the model writes itself, and no model is known here. Give it as the "
            "calibration of prune, gradients, sweep or reconstruct."
        )
    written = write(asked)
    shape = {"samples": asked.samples, "length": asked.length}
    sampling = "document" if asked.whole else "concat"
    facts = {**asked.provenance, **shape, "seed": asked.seed, "sampling": sampling, **written.facts}
    return Windows(own_windows(asked, written, text), facts)


def _mixed(parts: Sequence[Windows], seed: int, text: Text) -> Windows:
    """Return the parts as one; those of several sources in a seeded order."""
    rows = [row for part in parts for batch in part.batches(part.samples) for row in batch]
    if len(parts) > 1:
        random.Random(seed).shuffle(rows)
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mixed = Windows(padded, {}, torch.arange(padded.shape[1]) < lengths.unsqueeze(1))
    provenance = {**_provenance("calibration", text, mixed.samples, mixed.length), **mixed.shape}
    return replace(mixed, provenance={**provenance, "seed": seed, "sources": [dict(part.provenance) for part in parts]})


def _provenance(role: Role, text: Text, samples: int, length: int) -> dict[str, Any]:
    """Return what the windows of both roles record."""
    name = {"class": type(text.tokenizer).__name__, "name": str(getattr(text.tokenizer, "name_or_path", ""))}
    own = {"source": "text", "role": role, "samples": samples, "length": length, "tokenizer": name}
    return own if text.tokenizer is None else {**own, "bos": text.provenance}


# Sampling by document


def _document_windows(
    corpus: Corpus, text: Text, samples: int, length: int, seed: int, report: Report
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return windows and facts; the random numbers are used in the order of the published loop."""
    generator, count = random.Random(seed), len(corpus.documents)
    lengths: dict[int, int] = {}  # of every document that was drawn, in tokens
    long: dict[int, torch.Tensor] = {}  # the ids of those that hold a window
    rows: list[torch.Tensor] = []
    draws = 0
    while len(rows) < samples:
        if draws >= DRAWS_PER_SAMPLE * (len(rows) + 1) or (not long and len(lengths) == count):
            longest = max(lengths.values())
            shorter = f"a --length below {longest}" if longest > 1 else "another corpus"
            raise CalibrationError(
                f"{corpus.name}: expected documents of more than {length} tokens, gave up after {draws} draws with "
                f"{len(rows)} of {samples} windows; {len(lengths)} of {count} documents tried, the longest has "
                f"{longest} tokens. Use --sampling concat or {shorter}."
            )
        draws += 1
        # Exact: rejected draws consume randomness too, as in the published loop.
        index = generator.randint(0, count - 1)
        if index not in lengths:
            ids = text.ids(corpus.documents[index])
            lengths[index] = len(ids)
            if len(ids) > length:
                long[index] = ids
        if index in long:
            # Exact: both ends are included, so the last token of a document is never used; as published.
            start = generator.randint(0, len(long[index]) - length - 1)
            rows.append(long[index][start : start + length])
            report(len(rows))
    return torch.stack(rows), {"documents": count, "documents_used": len(long), "draws": draws}


# Sampling from one long sequence


def _concat_windows(
    corpus: Corpus, tokenised: Text, samples: int, length: int, seed: int, report: Report
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return windows and facts; a corpus beyond `_character_bound` is represented by seeded random documents."""
    bound = _character_bound(samples * length)
    text, whole = _leading_text(corpus, bound)
    if not whole:
        text = _random_text(corpus, bound, seed)
    ids = tokenised.ids(text)
    if len(ids) <= length:
        raise _too_short(corpus, len(ids), f"a window of {length} needs at least {length + 1}")
    generator = random.Random(seed)
    starts = [generator.randint(0, len(ids) - length - 1) for _ in range(samples)]
    report(samples)
    facts = {"documents": len(corpus.documents), "characters": len(text), "tokens": len(ids), "whole_corpus": whole}
    return torch.stack([ids[start : start + length] for start in starts]), facts


def _character_bound(tokens: int) -> int:
    """Return how many characters are enough for so many tokens: 64 each, and at least 16 Mi.

    English has about four characters in a token. The floor keeps WikiText-2 (11 million) whole, as in the papers.
    """
    return max(CHARACTERS_PER_TOKEN * tokens, FEWEST_CHARACTERS)


def _leading_text(corpus: Corpus, bound: int | None) -> tuple[str, bool]:
    """Return the joined documents and True, or, where they exceed `bound` characters, the first `bound` and False."""
    taken: list[str] = []
    characters = 0
    for document in corpus.documents:
        taken.append(document)
        characters += len(document) + len(corpus.joiner)
        if bound is not None and characters > bound:
            return corpus.joiner.join(taken)[:bound], False
    return corpus.joiner.join(taken), True


def _random_text(corpus: Corpus, bound: int, seed: int) -> str:
    """Return `bound` characters of documents in a seeded order; of a document too long for the rest, a stretch."""
    generator = random.Random(seed)
    order = list(range(len(corpus.documents)))
    generator.shuffle(order)
    taken: list[str] = []
    missing = bound
    while missing > 0 and order:
        document = corpus.documents[order.pop()]
        start = generator.randint(0, max(len(document) - missing, 0))
        taken.append(document[start : start + missing])
        missing -= len(taken[-1]) + len(corpus.joiner)
    return corpus.joiner.join(taken)


def _too_short(corpus: Corpus, found: int, expected: str) -> CalibrationError:
    return CalibrationError(
        f"{corpus.name}: the whole text has {found} tokens, {expected}. Use a shorter --length or a longer text."
    )
