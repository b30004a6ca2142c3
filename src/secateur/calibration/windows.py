"""Token windows: what calibration and evaluation feed a model, with their provenance, digest and checks."""

import hashlib
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from secateur.calibration.corpora import Spec, is_token_file, weighted
from secateur.calibration.documents import Corpus, existing_file, file_provenance
from secateur.errors import CalibrationError

Progress = Callable[[int, int], None]

TOKEN_KEY = "input_ids"
MASK_KEY = "attention_mask"


@dataclass(frozen=True, eq=False)
class Windows:
    """Token ids of shape (samples, length), int64 on the CPU, and where they came from as plain JSON values.

    Samples of different lengths are padded: `attention_mask`, of the same shape, is 1 at the tokens of a sample and 0
    at the padding before or after them. However a sample was padded, here zeros follow its tokens up to the length of
    the longest sample, and the mask is bool; it is None where nothing is padded. No model ever runs on padding. Raises
    `CalibrationError` for a mask of another shape, with other values, or with zeros between tokens.
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
            ids, mask = _padded_at_the_end(self.input_ids, self.attention_mask)
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


def _padded_at_the_end(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return (ids, mask) with the padding after the tokens, or (ids, None) when all samples have the same length.

    Raises CalibrationError for a mask whose ones are not in one piece in every row.
    """
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
    # A token after padding that itself follows a token.
    hole = mask[:, 1:] & ~mask[:, :-1] & (mask.cumsum(dim=1)[:, :-1] > 0)
    if hole.any():
        sample, position = hole.nonzero()[0].tolist()
        raise CalibrationError(
            f"{MASK_KEY}: row {sample}, position {position}: padding lies between tokens, expected it before the first "
            "or after the last one."
        )
    lengths = mask.sum(dim=1)
    longest = int(lengths.max())
    kept = torch.arange(longest) < lengths.unsqueeze(1)
    moved = torch.zeros(len(ids), longest, dtype=torch.int64)
    moved[kept] = ids[mask]  # both go row by row
    return moved, None if bool(kept.all()) else kept


Source = str | os.PathLike[str] | torch.Tensor | Windows | Corpus


def check_fits(windows: Windows, vocabulary_size: int, positions: int | None, option: str = "--length") -> None:
    """Raise CalibrationError for a token id outside [0, vocabulary_size), and for windows longer than `positions`."""
    outside = (windows.input_ids < 0) | (windows.input_ids >= vocabulary_size)
    if outside.any():
        sample, position = outside.nonzero()[0].tolist()
        raise CalibrationError(
            f"sample {sample}, position {position}: token id {int(windows.input_ids[sample, position])} is outside the "
            f"vocabulary of {vocabulary_size} ids ({int(outside.sum())} such ids in all); "
            "does the tokenizer belong to this model?"
        )
    if positions is not None and windows.length > positions:
        raise CalibrationError(
            f"windows of {windows.length} tokens, and the model has {positions} positions. "
            f"Use {option} {positions} or less."
        )


def check_predictions(windows: Windows, option: str = "--length") -> None:
    """Raise CalibrationError for a window of fewer than 2 tokens, in which there is nothing to predict."""
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
    """Return the windows of a source that already is token ids, or None when it is text; `what` names the samples."""
    if isinstance(source, Sequence) and not isinstance(source, str) and len(source) == 1:
        source = source[0]
    if isinstance(source, Windows):
        return _first(source, samples, length, "windows", what)
    if isinstance(source, torch.Tensor):
        return _first(Windows(_checked_ids(source, "tensor"), {"source": "tensor"}), samples, length, "tensor", what)
    if isinstance(source, str | os.PathLike) and is_token_file(os.fspath(source)):
        spec, _ = weighted(os.fspath(source))
        return token_file(str(spec), samples, length, what)
    return None


def _first(
    windows: Windows, samples: int | None, length: int | None, where: str, what: str, stored: int | None = None
) -> Windows:
    """Return the first samples; `stored` is the length of a file's rows, padding included."""
    if length not in (None, found := stored or windows.length):
        raise CalibrationError(
            f"{where}: windows of {found} tokens, expected --length {length}. Leave --length out, or make new windows."
        )
    kept = windows.part(0, samples)
    return replace(kept, provenance={**windows.provenance, **kept.shape, **fewer(what, samples, kept.samples)})


def token_file(spec: str, samples: int | None, length: int | None, what: str = "samples") -> Windows:
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
    try:
        windows = Windows(ids, {"source": "file", **file_provenance(path)}, mask)
    except CalibrationError as error:
        raise CalibrationError(f"{path}: {error}") from None
    return _first(windows, samples, length, spec, what, ids.shape[1])


def _checked_ids(ids: torch.Tensor, where: str) -> torch.Tensor:
    """Return a copy of token ids as int64 on the CPU."""
    integral = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if ids.ndim != 2 or ids.numel() == 0 or not integral:
        raise CalibrationError(
            f"{where}: got token ids of shape {tuple(ids.shape)} and {ids.dtype}, "
            "expected (samples, length), not empty, in an integer type."
        )
    return ids.detach().to("cpu", torch.int64, copy=True)


def fewer(what: str, asked: int | None, found: int) -> dict[str, int]:
    """What is recorded where there are fewer windows or samples than asked for."""
    return {f"{what}_asked": asked} if asked is not None and asked > found else {}


def require_positive(**counts: int | None) -> None:
    """Raise CalibrationError that names the option for a count below 1 (None: not set)."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise CalibrationError(f"--{name}: got {count}, expected at least 1.")


def one_spec(source: Any, tokenizer: Any, purpose: str) -> Spec:
    """Return the spec of the one text that a purpose takes. Raises CalibrationError for several, or no tokenizer."""
    if not isinstance(source, str | os.PathLike | Corpus):
        raise CalibrationError(f"{purpose}: got {type(source).__name__}, expected one corpus, a tensor or Windows.")
    spec = source if isinstance(source, Corpus) else os.fspath(source)
    require_tokenizer(tokenizer, [spec])
    return spec


def require_tokenizer(tokenizer: Any, specs: Sequence[Spec]) -> None:
    """Raise CalibrationError for text without a tokenizer."""
    if tokenizer is None and not all(map(is_token_file, specs)):
        raise CalibrationError(
            f"{', '.join(map(str, specs))}: text needs a tokenizer, got None. Pass the model's tokenizer, or token "
            f"ids: a (samples, length) tensor or a .safetensors file with the key {TOKEN_KEY!r}."
        )
