"""Recordings for a certain model of speech, through its feature extractor, and the tokens that its decoder reads."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.calibration.audio import PREFIX, Recording, audio_of, recordings
from secateur.calibration.labels import Label, file_labels
from secateur.calibration.named import NamedSamples
from secateur.calibration.windows import fewer, require_positive
from secateur.core.batch import LABELS
from secateur.errors import CalibrationError
from secateur.models.flow.inputs import input_name, start_token
from secateur.models.opening.classes import task_of
from secateur.models.opening.configuration import reason
from secateur.models.opening.opened import OpenedModel
from secateur.models.opening.whole import read_generation_config
from secateur.models.shape.structure import is_encoder_decoder

LONGEST = 448  # tokens that a decoder reads where its configuration names no limit
FORESEEN = 32  # tokens that a transcript is taken to have before the model has written it

_log = logging.getLogger("secateur")


def model_recordings(
    opened: OpenedModel,
    source: Any,
    *,
    samples: int | None,
    length: int | None,
    seed: int | None,
    what: str,
    write: bool = True,
) -> NamedSamples:
    """The recordings that are asked for.

    A decoder reads their transcripts: those beside them, or else what the model itself hears, for which it is loaded as
    a whole; without `write` some tokens stand for that. Raises `CalibrationError` for what is no folder of recordings.
    """
    model: Any = opened.skeleton.model
    kind, wanted = type(model).__name__, input_name(model)
    if wanted not in ("input_features", "input_values"):
        raise CalibrationError(f"{kind} reads {wanted}, which cannot be given. Only magnitude needs no samples.")
    folder = audio_of(source)
    if folder is None:
        raise CalibrationError(f"{kind} hears recordings. Give it some: {PREFIX}FOLDER of .wav and .flac files.")
    if length is not None:
        raise CalibrationError("--length: a recording is as long as it is. Leave --length out.")
    require_positive(samples=samples)
    found, facts = recordings(folder, samples, seed)
    each = [{wanted: _features(opened, recording)} for recording in found]
    said: Mapping[str, Any] = {}
    if is_encoder_decoder(model):
        tokens, said = _tokens(opened, found, [own[wanted] for own in each], write=write)
        each = [{**own, LABELS: ids} for own, ids in zip(each, tokens, strict=True)]
    shape = {"samples": len(each), **fewer(what, samples, len(each))}
    return NamedSamples(each, {**facts, **said, **shape}, labels=_labels(model, Path(folder).expanduser(), found))


def _labels(model: Any, folder: Path, found: Sequence[Recording]) -> list[Label] | None:
    """The classes of recordings for a model that chooses between some, else what is said where that is known of all."""
    if task_of(type(model).__name__) == "AUDIO_CLASSIFICATION":
        return file_labels(folder, [recording.file for recording in found])
    heard = [Label(own.transcript, str(own.file)) for own in found if own.transcript is not None]
    return heard if len(heard) == len(found) else None  # of some alone nobody can say how many are right


@contextmanager
def loaded_whole(opened: OpenedModel) -> Iterator[Any]:
    """The model with all of its weights in it."""
    skeleton = opened.skeleton
    if skeleton.resident:
        yield skeleton.model
        return
    try:
        read_generation_config(skeleton.model, Path(getattr(skeleton.source, "folder", "")))
        yield skeleton.load_all()
    finally:
        for block in skeleton.blocks:
            skeleton.unload(block)
        skeleton.unload_outside()


def _features(opened: OpenedModel, recording: Recording) -> Tensor:
    """What the model's feature extractor makes of a recording."""
    extractor = opened.load_feature_extractor()
    if extractor is None:
        raise CalibrationError(
            f"{recording.file.parent}: recordings need the model's feature extractor, and it has no "
            "preprocessor_config.json. Copy that of the model there."
        )
    rate = int(extractor.sampling_rate)
    try:
        made = extractor(recording.sound(rate), sampling_rate=rate, return_tensors="pt")
        value: Tensor = made[input_name(opened.skeleton.model)][0]
    except (ValueError, TypeError, LookupError, RuntimeError) as error:
        raise CalibrationError(f"{recording.file}: the feature extractor fails on it: {reason(error)}") from None
    return value.to(torch.float32)


def _tokens(
    opened: OpenedModel, found: Sequence[Recording], features: Sequence[Tensor], *, write: bool
) -> tuple[list[Tensor], Mapping[str, Any]]:
    """The tokens that the decoder is to predict for each recording, and for how many the model has written them."""
    model: Any = opened.skeleton.model
    start, limit = start_token(model), getattr(model.config, "max_target_positions", None) or LONGEST
    unheard = [number for number, recording in enumerate(found) if recording.transcript is None]
    texts: dict[int, list[int]] = {}
    if len(unheard) < len(found):
        tokenizer = opened.load_tokenizer()
        if tokenizer is None:
            raise CalibrationError(f"{found[0].file.parent}: transcripts need the model's tokenizer, and it has none.")
        known = {number: own.transcript for number, own in enumerate(found) if own.transcript is not None}
        texts = {number: list(tokenizer(text)["input_ids"]) for number, text in known.items()}
    if unheard and not write:
        texts |= {number: [start] * FORESEEN for number in unheard}
    elif unheard:
        _log.warning(
            "%s of %s recordings have no transcript (NAME.txt beside NAME.wav): the model writes it, whole in memory.",
            len(unheard),
            len(found),
        )
        with torch.no_grad(), loaded_whole(opened) as module:
            for number in unheard:
                value = features[number].unsqueeze(0).to(opened.skeleton.device, opened.skeleton.dtype)
                texts[number] = module.generate(**{input_name(model): value})[0].tolist()
    # The start is read in any case; where nothing is said, it stands for the end too.
    said = [texts[number][1:] if texts[number][:1] == [start] else texts[number] for number in range(len(found))]
    return [torch.tensor((ids or [start])[:limit]) for ids in said], {"transcripts_written": len(unheard)}
