"""Token windows: what calibration and evaluation feed a model, with their provenance and digest."""

import hashlib
import os
import random
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import torch

from secateur.calibration.corpora import Corpus, Role, existing_file, file_provenance, is_token_file, load_corpus
from secateur.errors import CalibrationError

Sampling = Literal["document", "concat"]
Progress = Callable[[int, int], None]

DEFAULT_SAMPLES = 128
DEFAULT_LENGTH = 2048
DRAWS_PER_SAMPLE = 1000
CHARACTERS_PER_TOKEN = 64
FEWEST_CHARACTERS = 16 * 2**20
C4_EVALUATION_WINDOWS = 256
TOKEN_KEY = "input_ids"

_WEIGHTED = re.compile(r"\s*(?P<weight>[-+]?(?:\d+\.?\d*|\.\d+))\s*\*\s*(?P<spec>.+)")


@dataclass(frozen=True, eq=False)
class Windows:
    """Token ids of shape (samples, length), int64 on the CPU, and where they came from as plain JSON values."""

    input_ids: torch.Tensor
    provenance: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.input_ids.ndim != 2 or self.input_ids.dtype != torch.int64:
            raise CalibrationError(
                f"windows: got input_ids of shape {tuple(self.input_ids.shape)} and {self.input_ids.dtype}, "
                "expected (samples, length) in torch.int64."
            )

    @property
    def samples(self) -> int:
        """The number of windows."""
        return self.input_ids.shape[0]

    @property
    def length(self) -> int:
        """The number of tokens in each window."""
        return self.input_ids.shape[1]

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of the shape and then the ids in rows, all as little-endian int64."""
        digest = hashlib.sha256(struct.pack("<2q", self.samples, self.length))
        digest.update(self.input_ids.cpu().contiguous().numpy().astype("<i8", copy=False).tobytes())
        return digest.hexdigest()


Source = str | os.PathLike[str] | torch.Tensor | Windows


def calibration_windows(
    source: Source | Sequence[str | os.PathLike[str]],
    tokenizer: Any,
    *,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    sampling: Sampling | None = None,
    progress: Progress | None = None,
) -> Windows:
    """Return calibration windows of shape (samples, length), by default 128 of 2048 tokens from text.

    `source` is a corpus spec (see `load_corpus`), several of them to be mixed, each optionally weighted as `0.7*c4`,
    or token ids: a tensor, `Windows`, or a `.safetensors` file with the key `input_ids`. Token ids are taken as they
    are: `samples` keeps the first ones, and a `length` that differs is an error.

    `sampling="document"` draws a document uniformly with replacement until one is longer than `length` tokens, and a
    window in it; `"concat"` draws windows from one long token sequence; None is what the papers do: "concat" for
    wikitext2, "document" for everything else. Both give the windows that the published loops give after
    `random.seed(seed)`. In a mixture the source at position k draws with `seed + k`, and the windows are shuffled
    with `seed`. `progress` is called with (windows done, windows in all).

    Errors: CalibrationError, also when no document is long enough after about 1000 draws for each window.
    Reference: Wanda and SparseGPT, semantics of `get_c4` (document) and `get_wikitext2` (concat) in their loaders.
    """
    _check_drawing(samples, length, sampling)
    if (given := given_windows(source, samples, length)) is not None:
        return given
    shares = _shares(source, DEFAULT_SAMPLES if samples is None else samples)
    require_tokenizer(tokenizer, [spec for spec, _, _ in shares])
    total = sum(count for _, _, count in shares)
    parts: list[Windows] = []
    for position, (spec, weight, count) in enumerate(shares):
        done = sum(part.samples for part in parts)
        report = _shifted(progress, done, total)
        part = _sampled(spec, tokenizer, count, length or DEFAULT_LENGTH, seed + position, sampling, report)
        parts.append(replace(part, provenance={"weight": float(weight), **part.provenance}))
    return _mixed(parts, seed, tokenizer)


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
    source: Source, tokenizer: Any, *, length: int | None = None, windows: int | None = None
) -> Windows:
    """Return the windows of the papers' perplexity, shape (windows, length), by default of 2048 tokens.

    The evaluation part of the corpus is joined, tokenised in one call with the default special tokens and cut into
    windows that do not overlap; the remainder is dropped. `windows` keeps the first ones. C4 gives 256 unless asked
    otherwise. Token ids are taken as they are, as in `calibration_windows`.

    Errors: CalibrationError, also when the text is shorter than one window.
    Reference: Wanda, `lib/eval.py`, and SparseGPT, `datautils.py` (`get_wikitext2`, `get_c4`).
    """
    require_positive(windows=windows, length=length)
    if (given := given_windows(source, windows, length)) is not None:
        return given
    if not isinstance(source, str | os.PathLike):
        raise CalibrationError(f"evaluation: got {type(source).__name__}, expected one corpus, a tensor or Windows.")
    require_tokenizer(tokenizer, [os.fspath(source)])
    corpus = load_corpus(os.fspath(source), "evaluation")
    length = length or DEFAULT_LENGTH
    limit = C4_EVALUATION_WINDOWS if windows is None and corpus.name == "c4" else windows
    ids, characters = _leading_tokens(corpus, tokenizer, None if limit is None else limit * length)
    count = min(len(ids) // length, limit or len(ids))
    if count == 0:
        raise _too_short(corpus, len(ids), f"one window needs {length}")
    provenance = {
        **_provenance("evaluation", tokenizer, count, length),
        "sources": [{**corpus.provenance, "characters": characters, "tokens": len(ids)}],
        "tokens_dropped": len(ids) - count * length,
    }
    return Windows(ids[: count * length].reshape(count, length).clone(), provenance)


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


# Token ids as they are


def given_windows(source: Any, samples: int | None, length: int | None) -> Windows | None:
    """Return the windows of a source that already is token ids, or None when it is text."""
    if isinstance(source, Sequence) and not isinstance(source, str) and len(source) == 1:
        source = source[0]
    if isinstance(source, Windows):
        return _first(source, samples, length, "windows")
    if isinstance(source, torch.Tensor):
        return _first(Windows(_checked_ids(source, "tensor"), {"source": "tensor"}), samples, length, "tensor")
    if isinstance(source, str | os.PathLike) and is_token_file(os.fspath(source)):
        spec, _ = _weighted(os.fspath(source))
        return _first(_token_file(spec), samples, length, spec)
    return None


def _first(windows: Windows, samples: int | None, length: int | None, where: str) -> Windows:
    if length is not None and length != windows.length:
        raise CalibrationError(
            f"{where}: windows of {windows.length} tokens, expected --length {length}. "
            "Leave --length out, or make the windows anew."
        )
    kept = windows.input_ids[:samples]
    shape = {"samples": kept.shape[0], "length": kept.shape[1]}
    return Windows(kept, {**windows.provenance, **shape})


def _token_file(spec: str) -> Windows:
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
    return Windows(_checked_ids(tensors[TOKEN_KEY], str(path)), {"source": "file", **file_provenance(path)})


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
    spec: str, tokenizer: Any, samples: int, length: int, seed: int, sampling: Sampling | None, report: Progress
) -> Windows:
    """Return the windows of one source of a mixture."""
    if is_token_file(spec):
        given = _first(_token_file(spec), samples, length, spec)
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
    ids, facts = sample(corpus, tokenizer, samples, length, seed, report)
    shape = {"samples": samples, "length": length}
    return Windows(ids, {**corpus.provenance, **shape, "seed": seed, "sampling": sampling, **facts})


def _mixed(parts: Sequence[Windows], seed: int, tokenizer: Any) -> Windows:
    """Return the parts as one; those of several sources in a seeded order."""
    ids = torch.cat([part.input_ids for part in parts])
    if len(parts) > 1:
        order = list(range(len(ids)))
        random.Random(seed).shuffle(order)
        ids = ids[order]
    provenance = _provenance("calibration", tokenizer, ids.shape[0], ids.shape[1])
    return Windows(ids, {**provenance, "seed": seed, "sources": [dict(part.provenance) for part in parts]})


def _provenance(role: Role, tokenizer: Any, samples: int, length: int) -> dict[str, Any]:
    """Return what the windows of both roles record."""
    name = {"class": type(tokenizer).__name__, "name": str(getattr(tokenizer, "name_or_path", ""))}
    return {"source": "text", "role": role, "samples": samples, "length": length, "tokenizer": name}


def _shifted(progress: Progress | None, done: int, total: int) -> Progress:
    def report(windows: int, _: int) -> None:
        if progress is not None:
            progress(done + windows, total)

    return report


def _tokenised(tokenizer: Any, text: str) -> torch.Tensor:
    # `verbose=False` silences "Token indices sequence length is longer than ...": long texts are the purpose here.
    return torch.tensor(tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"], dtype=torch.int64)


# Sampling by document


class _LongDocuments:
    """Draws documents of more than `length` tokens; keeps every length seen, and the ids of the long documents."""

    def __init__(self, corpus: Corpus, tokenizer: Any, length: int) -> None:
        self.corpus, self.tokenizer, self.length = corpus, tokenizer, length
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
        ids = _tokenised(self.tokenizer, self.corpus.documents[index])
        self.lengths[index] = len(ids)
        if len(ids) > self.length:
            self.long[index] = ids


def _document_windows(
    corpus: Corpus, tokenizer: Any, samples: int, length: int, seed: int, report: Progress
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return windows and facts; the random numbers are used in the order of the published loop."""
    generator = random.Random(seed)
    documents = _LongDocuments(corpus, tokenizer, length)
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
    corpus: Corpus, tokenizer: Any, samples: int, length: int, seed: int, report: Progress
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return windows and facts; a corpus beyond `_character_bound` is represented by seeded random documents."""
    bound = _character_bound(samples * length)
    text, whole = _leading_text(corpus, bound)
    if not whole:
        text = _random_text(corpus, bound, seed)
    ids = _tokenised(tokenizer, text)
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


def _leading_tokens(corpus: Corpus, tokenizer: Any, needed: int | None) -> tuple[torch.Tensor, int]:
    """Return the ids of the joined text and its characters; when only `needed` ids count, of a part that holds them."""
    text, whole = _leading_text(corpus, None if needed is None else _character_bound(needed))
    ids = _tokenised(tokenizer, text)
    # Exact: where a text is cut shows in its last tokens only, so the needed ones must lie far from the cut.
    if not whole and needed is not None and len(ids) < 2 * needed:
        text, _ = _leading_text(corpus, None)
        ids = _tokenised(tokenizer, text)
    return ids, len(text)


def _too_short(corpus: Corpus, found: int, expected: str) -> CalibrationError:
    return CalibrationError(
        f"{corpus.name}: the whole text has {found} tokens, {expected}. Use a shorter --length or a longer text."
    )
