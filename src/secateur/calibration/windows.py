"""Token windows: what calibration and evaluation feed a model, with their provenance and digest."""

import hashlib
import os
import random
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from secateur.calibration.corpora import Corpus, Role, existing_file, file_provenance, is_token_file, load_corpus
from secateur.calibration.text import Text, check_bos
from secateur.core.choices import Bos, Sampling
from secateur.errors import CalibrationError

Progress = Callable[[int, int], None]

DEFAULT_SAMPLES = 128
DEFAULT_LENGTH = 2048
DRAWS_PER_SAMPLE = 1000
CHARACTERS_PER_TOKEN = 64
FEWEST_CHARACTERS = 16 * 2**20
C4_EVALUATION_WINDOWS = 256
TOKEN_KEY = "input_ids"
MASK_KEY = "attention_mask"

_WEIGHTED = re.compile(r"\s*(?P<weight>[-+]?(?:\d+\.?\d*|\.\d+))\s*\*\s*(?P<spec>.+)")


@dataclass(frozen=True, eq=False)
class Windows:
    """Token ids of shape (samples, length), int64 on the CPU, and where they came from as plain JSON values.

    Samples of different lengths are padded: `attention_mask`, of the same shape, is 1 at the tokens of a sample and 0
    at the padding before or behind them. Whatever the padding was, here it is zeros behind the tokens, as few as the
    longest sample asks for, and the mask is bool; it is None where nothing is padded. Padding is never run through a
    model. Raises `CalibrationError` for a mask of another shape, with other values, or with zeros between tokens.
    """

    input_ids: torch.Tensor
    provenance: Mapping[str, Any]
    attention_mask: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.input_ids.ndim != 2 or self.input_ids.dtype != torch.int64:
            raise CalibrationError(
                f"windows: got input_ids of shape {tuple(self.input_ids.shape)} and {self.input_ids.dtype}, "
                "expected (samples, length) in torch.int64."
            )
        if self.attention_mask is not None:
            ids, mask = _padded_behind(self.input_ids, self.attention_mask)
            object.__setattr__(self, "input_ids", ids)
            object.__setattr__(self, "attention_mask", mask)

    @property
    def samples(self) -> int:
        """The number of windows."""
        return self.input_ids.shape[0]

    @property
    def length(self) -> int:
        """The number of tokens in each window; where they differ, in the longest."""
        return self.input_ids.shape[1]

    @property
    def lengths(self) -> list[int]:
        """The number of tokens in each window."""
        if self.attention_mask is None:
            return [self.length] * self.samples
        lengths: list[int] = self.attention_mask.sum(dim=1).tolist()
        return lengths

    @property
    def tokens(self) -> int:
        """The number of tokens in all windows, without padding."""
        return sum(self.lengths)

    @property
    def shape(self) -> dict[str, Any]:
        """Samples and length, and where samples differ in length also their tokens, as provenance records them."""
        shape = {"samples": self.samples, "length": self.length}
        return shape if self.attention_mask is None else {**shape, "shortest": min(self.lengths), "tokens": self.tokens}

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of the shape and then the ids in rows, all as little-endian int64.

        Where samples differ in length, these lengths follow.
        """
        digest = hashlib.sha256(struct.pack("<2q", self.samples, self.length))
        digest.update(self.input_ids.cpu().contiguous().numpy().astype("<i8", copy=False).tobytes())
        if self.attention_mask is not None:
            digest.update(struct.pack(f"<{self.samples}q", *self.lengths))
        return digest.hexdigest()

    def part(self, first: int, last: int | None) -> "Windows":
        """The samples from `first` up to, not with, `last`."""
        mask = None if self.attention_mask is None else self.attention_mask[first:last]
        return replace(self, input_ids=self.input_ids[first:last], attention_mask=mask)

    def batches(self, batch_size: int) -> list[torch.Tensor]:
        """All samples in their order, without padding: at most `batch_size` of the same length at a time."""
        if self.attention_mask is None:
            return list(torch.split(self.input_ids, batch_size))
        batches: list[torch.Tensor] = []
        first = 0
        for length, group in groupby(self.lengths):
            last = first + len(list(group))
            batches += torch.split(self.input_ids[first:last, :length], batch_size)
            first = last
        return batches


def _padded_behind(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return (ids, mask) with the padding behind the tokens, or (ids, None) when all samples have the same length."""
    mask = _checked_mask(ids, mask)
    lengths = mask.sum(dim=1)
    longest = int(lengths.max())
    kept = torch.arange(longest) < lengths.unsqueeze(1)
    moved = torch.zeros(len(ids), longest, dtype=torch.int64)
    moved[kept] = ids[mask]  # both go row by row
    return moved, None if bool(kept.all()) else kept


def _checked_mask(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return an attention mask as bool: ones in one piece in every row."""
    if mask.shape != ids.shape:
        raise CalibrationError(
            f"{MASK_KEY}: got the shape {tuple(mask.shape)}, expected that of {TOKEN_KEY}, {tuple(ids.shape)}."
        )
    other = (mask != 0) & (mask != 1)
    if other.any():
        sample, position = other.nonzero()[0].tolist()
        raise CalibrationError(
            f"{MASK_KEY}: row {sample}, position {position}: got {mask[sample, position].item()}, expected 1 at a "
            "token or 0 at padding."
        )
    mask = mask.to("cpu", torch.bool)
    empty = ~mask.any(dim=1)
    if empty.any():
        raise CalibrationError(f"{MASK_KEY}: row {int(empty.nonzero()[0])} is all padding. Leave it out.")
    # A token behind padding that is itself behind a token.
    hole = mask[:, 1:] & ~mask[:, :-1] & (mask.cumsum(dim=1)[:, :-1] > 0)
    if hole.any():
        sample, position = hole.nonzero()[0].tolist()
        raise CalibrationError(
            f"{MASK_KEY}: row {sample}, position {position}: padding lies between tokens, expected it before the first "
            "or behind the last one."
        )
    return mask


Source = str | os.PathLike[str] | torch.Tensor | Windows


def calibration_windows(
    source: Source | Sequence[str | os.PathLike[str]],
    tokenizer: Any,
    *,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    sampling: Sampling | None = None,
    bos: Bos = "papers",
    progress: Progress | None = None,
) -> Windows:
    """Return calibration windows of shape (samples, length), by default 128 of 2048 tokens from text.

    `source` is a corpus spec (see `load_corpus`), several of them to be mixed, each optionally weighted as `0.7*c4`,
    or token ids: a tensor, `Windows`, or a `.safetensors` file with the key `input_ids`, and `attention_mask` where
    rows are padded. Token ids are taken as they are: `samples` keeps the first ones, and a `length` that differs is an
    error.

    `sampling="document"` draws a document uniformly with replacement until one is longer than `length` tokens, and a
    window in it; `"concat"` draws windows from one long token sequence; None is what the papers do: "concat" for
    wikitext2, "document" for everything else. Both give the windows that the published loops give after
    `random.seed(seed)`. In a mixture the source at position k draws with `seed + k`, and the windows are shuffled
    with `seed`. `bos` is that of `evaluation_windows`: "papers" leaves BOS where a window happens to begin with its
    document. `progress` is called with (windows done, windows in all).

    Errors: CalibrationError, also when no document is long enough after about 1000 draws for each window.
    Reference: Wanda and SparseGPT, semantics of `get_c4` (document) and `get_wikitext2` (concat) in their loaders.
    """
    _check_drawing(samples, length, sampling)
    if (given := given_windows(source, samples, length)) is not None:
        return _as_given(given, bos)
    shares = _shares(source, DEFAULT_SAMPLES if samples is None else samples)
    require_tokenizer(tokenizer, [spec for spec, _, _ in shares])
    text = Text(tokenizer, bos)
    total = sum(count for _, _, count in shares)
    parts: list[Windows] = []
    for position, (spec, weight, count) in enumerate(shares):
        done = sum(part.samples for part in parts)
        report = _shifted(progress, done, total)
        part = _sampled(spec, text, count, length or DEFAULT_LENGTH, seed + position, sampling, report)
        parts.append(replace(part, provenance={"weight": float(weight), **part.provenance}))
    return _mixed(parts, seed, text)


def text_corpora(source: Any, tokenizer: Any, samples: int | None, length: int | None, sampling: Any) -> list[str]:
    """Return the specs of the text that calibration windows are drawn from: none where token ids are given alone.

    Errors: CalibrationError for what `calibration_windows` refuses without looking at the text.
    """
    _check_drawing(samples, length, sampling)
    if given_windows(source, samples, length) is not None:
        return []
    specs = [spec for spec, _, _ in _shares(source, DEFAULT_SAMPLES if samples is None else samples)]
    require_tokenizer(tokenizer, specs)
    return [spec for spec in specs if not is_token_file(spec)]


def _check_drawing(samples: int | None, length: int | None, sampling: Any) -> None:
    require_positive(samples=samples, length=length)
    if sampling not in ("document", "concat", None):
        raise CalibrationError(f"--sampling: got {sampling!r}, expected document or concat.")


def evaluation_windows(
    source: Source, tokenizer: Any, *, length: int | None = None, windows: int | None = None, bos: Bos = "papers"
) -> Windows:
    """Return the windows of the papers' perplexity, shape (windows, length), by default of 2048 tokens.

    The evaluation part of the corpus is joined, tokenised in one call with the default special tokens and cut into
    windows that do not overlap; the remainder is dropped. `windows` keeps the first ones. C4 gives 256 unless asked
    otherwise. Token ids are taken as they are, as in `calibration_windows`.

    `bos` says where BOS, the token that begins a text, stands. "papers": where the tokenizer puts it, before the first
    window alone. "always": before every window, each of length - 1 tokens of the text, all of which are then predicted.
    "never": nowhere.

    Errors: CalibrationError, also when the text is shorter than one window, and for `bos` that cannot be had.
    Reference: Wanda, `lib/eval.py`, and SparseGPT, `datautils.py` (`get_wikitext2`, `get_c4`).
    """
    require_positive(windows=windows, length=length)
    if (given := given_windows(source, windows, length, "windows")) is not None:
        return _as_given(given, bos)
    if not isinstance(source, str | os.PathLike):
        raise CalibrationError(f"evaluation: got {type(source).__name__}, expected one corpus, a tensor or Windows.")
    require_tokenizer(tokenizer, [os.fspath(source)])
    text = Text(tokenizer, bos)
    corpus = load_corpus(os.fspath(source), "evaluation")
    length = length or DEFAULT_LENGTH
    own = text.room(length)
    limit = C4_EVALUATION_WINDOWS if windows is None and corpus.name == "c4" else windows
    ids, characters = _leading_tokens(corpus, text, None if limit is None else limit * own)
    count = min(len(ids) // own, limit or len(ids))
    if count == 0:
        raise _too_short(corpus, len(ids), f"one window needs {own}")
    provenance = {
        **_provenance("evaluation", text, count, length),
        "sources": [{**corpus.provenance, "characters": characters, "tokens": len(ids)}],
        "tokens_dropped": len(ids) - count * own,
        **_fewer("windows", windows, count),
    }
    return Windows(text.begun(ids[: count * own].reshape(count, own)), provenance)


def _as_given(windows: Windows, bos: Bos) -> Windows:
    check_bos(bos)
    if bos != "papers":
        raise CalibrationError(f"--bos {bos}: token ids are taken as they are. Leave --bos out.")
    return windows


def _fewer(what: str, asked: int | None, found: int) -> dict[str, int]:
    """What is recorded where there are fewer windows or samples than asked for."""
    return {f"{what}_asked": asked} if asked is not None and asked > found else {}


def check_vocabulary(windows: Windows, vocabulary_size: int) -> None:
    """Return nothing when every token id lies in [0, vocabulary_size); otherwise CalibrationError with the first."""
    outside = (windows.input_ids < 0) | (windows.input_ids >= vocabulary_size)
    if outside.any():
        sample, position = outside.nonzero()[0].tolist()
        raise CalibrationError(
            f"sample {sample}, position {position}: token id {int(windows.input_ids[sample, position])} is outside the "
            f"vocabulary of {vocabulary_size} ids ({int(outside.sum())} such ids in all); "
            "does the tokenizer belong to this model?"
        )


def check_length(windows: Windows, positions: int | None, option: str = "--length") -> None:
    """Return nothing when a window fits a model with that many positions (None: any number); else CalibrationError."""
    if positions is not None and windows.length > positions:
        raise CalibrationError(
            f"windows of {windows.length} tokens, and the model has {positions} positions. "
            f"Use {option} {positions} or less."
        )


def check_predictions(windows: Windows, option: str = "--length") -> None:
    """Return nothing when every window has at least 2 tokens, one to predict; otherwise CalibrationError."""
    if windows.length < 2:
        raise CalibrationError(f"{option}: got 1, expected at least 2: the loss is that of predicting the next token.")
    short = min(windows.lengths)
    if short < 2:
        raise CalibrationError(
            f"sample {windows.lengths.index(short)}: has {short} token beside its padding, expected at least 2: the "
            "loss is that of predicting the next token. Leave it out."
        )


# Token ids as they are


def given_windows(source: Any, samples: int | None, length: int | None, what: str = "samples") -> Windows | None:
    """Return the windows of a source that already is token ids, or None when it is text; `what` is asked for."""
    if isinstance(source, Sequence) and not isinstance(source, str) and len(source) == 1:
        source = source[0]
    if isinstance(source, Windows):
        return _first(source, samples, length, "windows", what)
    if isinstance(source, torch.Tensor):
        return _first(Windows(_checked_ids(source, "tensor"), {"source": "tensor"}), samples, length, "tensor", what)
    if isinstance(source, str | os.PathLike) and is_token_file(os.fspath(source)):
        spec, _ = _weighted(os.fspath(source))
        return _token_file(spec, samples, length, what)
    return None


def _first(windows: Windows, samples: int | None, length: int | None, where: str, what: str = "samples") -> Windows:
    _check_given_length(windows.length, length, where)
    kept = windows.part(0, samples)
    return replace(kept, provenance={**windows.provenance, **kept.shape, **_fewer(what, samples, kept.samples)})


def _check_given_length(found: int, length: int | None, where: str) -> None:
    if length is not None and length != found:
        raise CalibrationError(
            f"{where}: windows of {found} tokens, expected --length {length}. "
            "Leave --length out, or make the windows anew."
        )


def _token_file(spec: str, samples: int | None, length: int | None, what: str = "samples") -> Windows:
    """Return the first windows of a file; `length` is that of its rows, padding included."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = existing_file(Path(spec.strip()))
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CalibrationError(f"{path}: cannot be read as safetensors: {error}. Is the file complete?") from error
    if TOKEN_KEY not in tensors:
        found = ", ".join(sorted(tensors)) or "none"
        raise CalibrationError(f"{path}: no tensor {TOKEN_KEY!r}; found: {found}. Save the ids under {TOKEN_KEY!r}.")
    ids, mask = _checked_ids(tensors[TOKEN_KEY], str(path)), tensors.get(MASK_KEY)
    _check_given_length(ids.shape[1], length, spec)
    try:
        windows = Windows(ids, {"source": "file", **file_provenance(path)}, mask)
    except CalibrationError as error:
        raise CalibrationError(f"{path}: {error}") from None
    return _first(windows, samples, None, spec, what)


def _checked_ids(ids: torch.Tensor, where: str) -> torch.Tensor:
    """Return a copy of token ids as int64 on the CPU."""
    integral = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if ids.ndim != 2 or ids.numel() == 0 or not integral:
        raise CalibrationError(
            f"{where}: got token ids of shape {tuple(ids.shape)} and {ids.dtype}, "
            "expected (samples, length), not empty, in an integer type."
        )
    return ids.detach().to("cpu", torch.int64, copy=True)


# Text


def require_positive(**counts: int | None) -> None:
    """Return nothing when every count that is given is at least 1; otherwise CalibrationError that names the option."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise CalibrationError(f"--{name}: got {count}, expected at least 1.")


def require_tokenizer(tokenizer: Any, specs: Sequence[str]) -> None:
    """Return nothing when there is a tokenizer or no spec is text; otherwise CalibrationError."""
    if tokenizer is None and not all(map(is_token_file, specs)):
        raise CalibrationError(
            f"{', '.join(specs)}: text needs a tokenizer, got None. Pass the model's tokenizer, or token ids: "
            f"a (samples, length) tensor or a .safetensors file with the key {TOKEN_KEY!r}."
        )


def _shares(source: Any, samples: int) -> list[tuple[str, Fraction, int]]:
    """Return (spec, weight, samples) of each source: weights sum to one, samples by largest remainder."""
    parsed = [_weighted(spec) for spec in _specs(source)]
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


def _specs(source: Any) -> list[str]:
    listed = source if isinstance(source, Sequence) and not isinstance(source, str) else [source]
    for spec in listed:
        if not isinstance(spec, str | os.PathLike):
            raise CalibrationError(
                f"calibration: got {type(spec).__name__}, expected corpus specs, or alone a tensor or Windows."
            )
    if not listed:
        raise CalibrationError("calibration: got no corpus, expected at least one. Pass --calibration c4, for example.")
    return [os.fspath(spec) for spec in listed]


def _weighted(spec: str) -> tuple[str, Fraction]:
    match = _WEIGHTED.fullmatch(spec)
    if not match:
        return spec.strip(), Fraction(1)
    weight = Fraction(match["weight"])
    if weight <= 0:
        raise CalibrationError(f"{spec}: got the weight {match['weight']}, expected a positive number, as in 0.7*c4.")
    return match["spec"].strip(), weight


def _sampled(
    spec: str, text: Text, samples: int, length: int, seed: int, sampling: Sampling | None, report: Progress
) -> Windows:
    """Return the windows of one source of a mixture."""
    if is_token_file(spec):
        given = _token_file(spec, samples, length)
        if given.samples < samples:
            raise CalibrationError(
                f"{spec}: {given.samples} windows, expected {samples} for its share of the mixture. "
                "Lower its weight or ask for fewer --samples."
            )
        report(samples, samples)
        return given
    corpus = load_corpus(spec, "calibration")
    sampling = sampling or ("concat" if corpus.name == "wikitext2" else "document")
    sample = _document_windows if sampling == "document" else _concat_windows
    ids, facts = sample(corpus, text, samples, text.room(length), seed, report)
    shape = {"samples": samples, "length": length}
    return Windows(text.begun(ids), {**corpus.provenance, **shape, "seed": seed, "sampling": sampling, **facts})


def _mixed(parts: Sequence[Windows], seed: int, text: Text) -> Windows:
    """Return the parts as one; those of several sources in a seeded order."""
    rows = [row for part in parts for batch in part.batches(part.samples) for row in batch]
    if len(parts) > 1:
        random.Random(seed).shuffle(rows)
    mixed = _of_rows(rows)
    provenance = {**_provenance("calibration", text, mixed.samples, mixed.length), **mixed.shape}
    return replace(mixed, provenance={**provenance, "seed": seed, "sources": [dict(part.provenance) for part in parts]})


def _of_rows(rows: Sequence[torch.Tensor]) -> Windows:
    """Return samples of token ids, of any lengths, as windows without provenance."""
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return Windows(padded, {}, torch.arange(padded.shape[1]) < lengths.unsqueeze(1))


def _provenance(role: Role, text: Text, samples: int, length: int) -> dict[str, Any]:
    """Return what the windows of both roles record."""
    name = {"class": type(text.tokenizer).__name__, "name": str(getattr(text.tokenizer, "name_or_path", ""))}
    own = {"source": "text", "role": role, "samples": samples, "length": length, "tokenizer": name}
    return own if text.tokenizer is None else {**own, "bos": text.provenance}


def _shifted(progress: Progress | None, done: int, total: int) -> Progress:
    def report(windows: int, _: int) -> None:
        if progress is not None:
            progress(done + windows, total)

    return report


# Sampling by document


class _LongDocuments:
    """Draws documents of more than `length` tokens; keeps every length seen, and the ids of the long documents."""

    def __init__(self, corpus: Corpus, text: Text, length: int) -> None:
        self.corpus, self.text, self.length = corpus, text, length
        self.lengths: dict[int, int] = {}
        self.long: dict[int, torch.Tensor] = {}
        self.draws = 0

    def draw(self, generator: random.Random, done: int) -> torch.Tensor | None:
        """Return the ids of the next drawn document that is long enough, or None when there is little hope of one."""
        count = len(self.corpus.documents)
        while self.draws < DRAWS_PER_SAMPLE * (done + 1) and (self.long or len(self.lengths) < count):
            self.draws += 1
            # Exact: rejected draws consume randomness too, as in the published loop.
            index = generator.randint(0, count - 1)
            if index not in self.lengths:
                self._tokenise(index)
            if index in self.long:
                return self.long[index]
        return None

    def _tokenise(self, index: int) -> None:
        ids = self.text.ids(self.corpus.documents[index])
        self.lengths[index] = len(ids)
        if len(ids) > self.length:
            self.long[index] = ids


def _document_windows(
    corpus: Corpus, text: Text, samples: int, length: int, seed: int, report: Progress
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return windows and facts; the random numbers are used in the order of the published loop."""
    generator = random.Random(seed)
    documents = _LongDocuments(corpus, text, length)
    rows: list[torch.Tensor] = []
    while len(rows) < samples:
        ids = documents.draw(generator, len(rows))
        if ids is None:
            raise _no_long_document(documents, len(rows), samples)
        # Exact: both ends are included, so the last token of a document is never used; as published.
        start = generator.randint(0, len(ids) - length - 1)
        rows.append(ids[start : start + length])
        report(len(rows), samples)
    facts = {"documents": len(corpus.documents), "documents_used": len(documents.long), "draws": documents.draws}
    return torch.stack(rows), facts


def _no_long_document(documents: _LongDocuments, done: int, samples: int) -> CalibrationError:
    tried, count, longest = len(documents.lengths), len(documents.corpus.documents), max(documents.lengths.values())
    shorter = f"a --length below {longest}" if longest > 1 else "another corpus"
    return CalibrationError(
        f"{documents.corpus.name}: expected documents of more than {documents.length} tokens, gave up after "
        f"{documents.draws} draws with {done} of {samples} windows; {tried} of {count} documents tried, the longest "
        f"has {longest} tokens. Use --sampling concat or {shorter}."
    )


# Sampling from one long sequence


def _concat_windows(
    corpus: Corpus, tokenised: Text, samples: int, length: int, seed: int, report: Progress
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
    report(samples, samples)
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
    """Return `bound` characters of documents in a seeded order; a document too long for the rest gives a stretch."""
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


def _leading_tokens(corpus: Corpus, tokenised: Text, needed: int | None) -> tuple[torch.Tensor, int]:
    """Return the ids of the joined text and its characters; when only `needed` ids count, of a part that holds them."""
    text, whole = _leading_text(corpus, None if needed is None else _character_bound(needed))
    ids = tokenised.ids(text)
    # Exact: where a text is cut shows in its last tokens only, so the needed ones must lie far from the cut.
    if not whole and needed is not None and len(ids) < 2 * needed:
        text, _ = _leading_text(corpus, None)
        ids = tokenised.ids(text)
    return ids, len(text)


def _too_short(corpus: Corpus, found: int, expected: str) -> CalibrationError:
    return CalibrationError(
        f"{corpus.name}: the whole text has {found} tokens, {expected}. Use a shorter --length or a longer text."
    )
