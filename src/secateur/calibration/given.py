"""What Python code has in memory, as texts that windows are drawn from, or as windows of token ids."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice, repeat
from typing import Any

import numpy
import torch

from secateur.calibration.corpora import names_corpus
from secateur.calibration.documents import DEFAULT_FIELD, Corpus, spooled, table_rows, wrong_field
from secateur.calibration.named import NO_LABEL, NamedSamples
from secateur.calibration.windows import MASK_KEY, TOKEN_KEY, Windows
from secateur.core.batch import LABELS
from secateur.errors import CalibrationError

STREAM_CHARACTERS = 64 * 2**20  # of texts from a stream, which may have no end
_NOTHING = object()
_OF_TOKENIZERS = {TOKEN_KEY, MASK_KEY, "token_type_ids", "position_ids", "special_tokens_mask", "labels", "length"}
_FORMS = (
    "the name of a corpus, a list of texts, token ids (a tensor, rows, Windows), a datasets.Dataset with a column text "
    "or input_ids, or a DataLoader"
)


def taken(source: Any, most: int | None, argument: str) -> Any:
    """Return a source of windows as a spec, several specs, a tensor, `Windows` or a `Corpus`.

    The inputs of a forward by name, such as pixel_values or decoder_input_ids, are left as they are. Besides those it
    may be: a list of texts; a mapping with the key `text` or `input_ids` (and `attention_mask`), such
    as a tokenizer returns; rows of token ids; a `datasets.Dataset`, an `IterableDataset`, or one column of it; a
    `DataLoader`, and whatever else can be iterated over. Its items are texts, rows or batches of token ids, or mappings
    with these keys. Of token ids that are read item by item the first `most` rows are taken; of texts without a known
    number as many as have 64 million characters.

    Errors: CalibrationError that names the `argument` for anything else.
    """
    known = isinstance(source, str | os.PathLike | torch.Tensor | Windows | Corpus | NamedSamples) or _is_inputs(source)
    if source is None or known or (isinstance(source, tuple) and all(isinstance(one, str) for one in source)):
        return source
    name, facts, there = _name(source), _facts(source), _length(source)
    if isinstance(source, numpy.ndarray):
        return torch.from_numpy(source)
    if isinstance(source, list | tuple) and (not source or _are_specs(source, argument)):
        return source
    if isinstance(source, Mapping):
        if any(hasattr(split, "column_names") for split in source.values()):
            raise CalibrationError(
                f"{argument}: got {name} with {', '.join(map(str, source))}. Give one of them, such as "
                f"[{next(iter(source))!r}]."
            )
        return _of_items(iter([source]), name, None, argument, facts, 1)
    columns = getattr(source, "column_names", None) or list(getattr(source, "columns", ()))
    if columns and DEFAULT_FIELD not in columns and TOKEN_KEY not in columns:
        raise wrong_field(f"{argument}: {name}", DEFAULT_FIELD, columns, "dataset['FIELD']")
    if hasattr(source, "columns"):  # a frame of pandas or polars, which has no rows to iterate over
        return taken(source[TOKEN_KEY if TOKEN_KEY in columns else DEFAULT_FIELD], most, argument)
    if columns and TOKEN_KEY not in columns and there:
        return _corpus(table_rows(lambda at: source[at][DEFAULT_FIELD], there, f"{argument}: {name}"), name, facts)
    if isinstance(source, Sequence) and there and isinstance(source[0], str):
        return _corpus(table_rows(lambda at: source[at], there, f"{argument}: {name}"), name, facts)
    if isinstance(source, Iterable) or (there and hasattr(source, "__getitem__")):
        items = iter(source) if isinstance(source, Iterable) else (source[at] for at in range(there or 0))
        whole = isinstance(source, list | tuple)
        return _of_items(items, name, None if whole else most, argument, facts, there)
    raise CalibrationError(f"{argument}: got {name}, expected {_FORMS}.")


def _is_inputs(source: Any) -> bool:
    """Whether it is the inputs of a forward by name, with some that no tokenizer makes, such as pixel_values.

    Labels are such inputs where they say something else than the token ids: a class, or what is masked.
    """
    if not isinstance(source, Mapping) or DEFAULT_FIELD in source:
        return False
    others = {name: value for name, value in source.items() if name not in _OF_TOKENIZERS}
    if any(isinstance(value, torch.Tensor) for value in others.values()):
        return True
    ids, labels = source.get(TOKEN_KEY), source.get(LABELS)
    if not isinstance(ids, torch.Tensor) or not isinstance(labels, torch.Tensor):
        return False
    return labels.shape != ids.shape or bool(((labels != ids) & (labels != NO_LABEL)).any())


def _are_specs(listed: Sequence[Any], argument: str) -> bool:
    """Whether all are strings that name corpora, and no texts: of several words that are no name."""
    if not all(isinstance(one, str | os.PathLike) for one in listed):
        # A mixture with something else in it: the mistake is told where it is read.
        return any(isinstance(one, str) and names_corpus(one) for one in listed)
    named = {one: None for one in listed if isinstance(one, os.PathLike) or names_corpus(one)}
    texts = [one for one in listed if isinstance(one, str) and one not in named and len(one.split()) != 1]
    if named and texts:
        raise CalibrationError(
            f'{argument}: "{next(iter(named))}" names a corpus, and "{texts[0][:40]}" is a text. If all of them are '
            f"texts, give {argument}={{{DEFAULT_FIELD!r}: texts}}."
        )
    return not texts


def _of_items(
    items: Iterator[Any], name: str, most: int | None, argument: str, facts: Mapping[str, Any], there: int | None
) -> Corpus | Windows:
    """Return the texts or the token ids of the items, of whichever the first one has."""
    first = next(items, _NOTHING)
    if first is _NOTHING:
        raise CalibrationError(f"{argument}: the {name} is empty, expected at least one text or row of token ids.")
    items, where = chain([first], items), f"{argument}: {name}"
    if isinstance(first, str) or (isinstance(first, Mapping) and TOKEN_KEY not in first):
        documents = spooled(_texts(items, where) if there is not None else _some(_texts(items, where)))
        return _corpus(documents, name, facts if there is not None else {**facts, "first_documents": len(documents)})
    rows = list(islice(_rows(items, where), most))
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return Windows(ids, {"source": "rows", "rows_of": name, **facts}, torch.arange(ids.shape[1]) < lengths.unsqueeze(1))


def _texts(items: Iterable[Any], where: str) -> Iterator[str]:
    """The texts of items that are one, or mappings that hold one, or several as batches do."""
    for number, item in enumerate(items):
        value = item
        if isinstance(item, Mapping):
            if DEFAULT_FIELD not in item:
                raise wrong_field(f"{where}, item {number}", DEFAULT_FIELD, list(map(str, item)), "dataset['FIELD']")
            value = item[DEFAULT_FIELD]
        for text in [value] if isinstance(value, str) else value:
            if not isinstance(text, str):
                raise CalibrationError(f"{where}, item {number}: got {type(text).__name__}, expected text.")
            yield text


def _some(texts: Iterator[str]) -> Iterator[str]:
    left = STREAM_CHARACTERS
    for text in texts:
        yield text
        left -= len(text)
        if left <= 0:
            return


def _rows(items: Iterable[Any], where: str) -> Iterator[torch.Tensor]:
    """The token ids of each sample, without padding, of items that are one or several samples."""
    for number, item in enumerate(items):
        place = f"{where}, item {number}"
        for ids, mask in _samples(*_ids_of(item, place), place):
            found = _tensor(ids, place).unsqueeze(0)
            if found.numel() == 0:
                raise CalibrationError(f"{place}: has no tokens. Leave it out.")
            if found.ndim != 2 or found.is_floating_point() or found.dtype == torch.bool:
                raise CalibrationError(
                    f"{place}: got token ids of shape {tuple(found.shape[1:])} and {found.dtype}, expected (length,) "
                    "or (samples, length) in an integer type."
                )
            kept = None if mask is None else _tensor(mask, place).unsqueeze(0)
            try:
                yield Windows(found.detach().to("cpu", torch.int64), {}, kept).input_ids[0]
            except CalibrationError as error:
                raise CalibrationError(f"{place}: {error}") from None


def _ids_of(item: Any, place: str) -> tuple[Any, Any]:
    """The token ids of an item and its attention mask, None where it has none."""
    if isinstance(item, Mapping):
        if TOKEN_KEY not in item:
            raise CalibrationError(f"{place}: no {TOKEN_KEY!r}; found: {', '.join(map(str, item)) or 'nothing'}.")
        return item[TOKEN_KEY], item.get(MASK_KEY)
    if isinstance(item, list | tuple) and item and isinstance(item[0], torch.Tensor) and item[0].ndim:
        # What a DataLoader makes of a TensorDataset; the published loaders give pairs of token ids and labels.
        others = [one for one in item[1:] if not (isinstance(one, torch.Tensor) and bool((one == NO_LABEL).any()))]
        if others:
            raise CalibrationError(
                f"{place}: got {len(item)} tensors, and only token ids have no name. Give mappings with {TOKEN_KEY!r} "
                f"and {MASK_KEY!r}."
            )
        return item[0], None
    return item, None


def _samples(ids: Any, mask: Any, place: str) -> Iterator[tuple[Any, Any]]:
    """The samples of a batch, or the one sample, each with its mask."""
    kinds = (Sequence, torch.Tensor, numpy.ndarray)
    several = (
        ids.ndim == 2 if hasattr(ids, "ndim") else isinstance(ids, kinds) and isinstance(next(iter(ids), 0), kinds)
    )
    if several and mask is not None and len(mask) != len(ids):
        raise CalibrationError(f"{place}: {MASK_KEY} has {len(mask)} rows, expected {len(ids)} as in {TOKEN_KEY}.")
    yield from zip(ids, repeat(None) if mask is None else mask, strict=False) if several else [(ids, mask)]


def _tensor(values: Any, place: str) -> torch.Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        raise CalibrationError(f"{place}: got {_name(values)}, expected a text or token ids.") from None


def _corpus(documents: Sequence[str], name: str, facts: Mapping[str, Any]) -> Corpus:
    told = f"texts of a {name}"
    return Corpus(told, documents, {"corpus": told, **facts})


def _facts(source: Any) -> dict[str, Any]:
    """What a data set says of itself."""
    found = {"dataset": getattr(getattr(source, "info", None), "dataset_name", None)}
    found |= {"config": getattr(source, "config_name", None), "split": getattr(source, "split", None)}
    return {key: str(value) for key, value in found.items() if value is not None and not callable(value)}


def _name(source: Any) -> str:
    kind = type(source)
    return f"{'datasets.' if kind.__module__.startswith('datasets.') else ''}{kind.__qualname__}"


def _length(source: Any) -> int | None:
    try:
        return len(source)
    except TypeError:
        return None
