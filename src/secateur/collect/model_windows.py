"""Windows for a certain model: drawn or cut, with BOS where the model wants it, and checked to be what it can read."""

import functools
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict, TypeVar, get_args

import torch
from torch import Tensor

from secateur.calibration.corpora import is_token_file
from secateur.calibration.documents import Corpus
from secateur.calibration.drawing import (
    DEFAULT_LENGTH,
    DEFAULT_SAMPLES,
    calibration_windows,
    evaluation_windows,
    own_texts,
)
from secateur.calibration.hub import default_text
from secateur.calibration.images import Images, images_of
from secateur.calibration.labels import texts_of
from secateur.calibration.named import NamedSamples, named_samples
from secateur.calibration.own_text import OwnText, Written
from secateur.calibration.quick import quick_windows
from secateur.calibration.text import bos_text
from secateur.calibration.windows import Progress, Windows, check_fits, check_predictions
from secateur.collect.author import Author
from secateur.collect.model_audio import model_recordings
from secateur.collect.model_images import hidden_states_of, model_images
from secateur.collect.model_pairs import model_pairs
from secateur.collect.model_texts import model_texts
from secateur.collect.settings import AUTO, CalibrationSettings
from secateur.core.choices import Bos
from secateur.errors import CalibrationError, ModelStructureError
from secateur.files.reading import read_json
from secateur.models.flow.inputs import input_name, reads_tokens
from secateur.models.opening.opened import OpenedModel
from secateur.models.shape.causality import check_predicts
from secateur.models.shape.structure import has_two_towers, is_encoder_decoder
from secateur.runs.forward import after_the_last_block

S = TypeVar("S", bound=CalibrationSettings)
Samples = Windows | Images | NamedSamples
BOS_MARGIN = 0.1  # nats per token that a window must read better with BOS in front

_log = logging.getLogger("secateur")


def model_windows(
    opened: OpenedModel,
    asked: CalibrationSettings,
    *,
    progress: Progress,
    placing: Progress = lambda done, total: None,
    known: Mapping[str, Any] | None = None,
    dense: Callable[[], OpenedModel] | None = None,
) -> Windows:
    """The windows that are asked for, with the model's own tokenizer where there is text and none is given.

    BOS is where they ask for it. "auto" means as in the papers, unless the first window reads more than 0.1 nats better
    with BOS in front, which means "always". The model itself decides, or the one that `dense` opens; `known` is what
    was decided and recorded before. That, and fewer samples than asked for, are said in a line each. `placing` is
    called with the blocks that the model has run to decide.

    Raises `CalibrationError` for token ids outside its vocabulary, and for windows longer than its positions.
    """
    asked = with_default_text(asked)
    check_reads_tokens(opened, asked.calibration)
    text = is_text(asked.calibration)
    tokenizer = opened.load_tokenizer() if asked.tokenizer is None and text else asked.tokenizer

    @functools.cache  # windows are drawn twice where the model wants BOS in front of them
    def write(own: OwnText) -> Written:
        return Author((dense or (lambda: opened))(), tokenizer, progress)(own)

    def draw(where: str) -> Windows:
        windows = calibration_windows(
            asked.calibration,  # type: ignore[arg-type]  # checked there
            tokenizer,
            samples=asked.samples,
            length=asked.length,
            seed=asked.seed,
            sampling=asked.sampling,
            bos=where,  # type: ignore[arg-type]
            write=write,
            progress=progress,
        )
        _check_fits(windows, opened)
        return windows

    windows = _placed(draw, asked.bos, known, "calibration", dense or (lambda: opened), text, placing)
    _say_fewer(windows, "samples", asked.samples)
    return windows


def with_default_text(asked: S) -> S:
    """The settings with a text in the place of `auto`; python-docs is packed, since few of its documents are long."""
    if isinstance(asked.calibration, Tensor | Windows) or asked.calibration not in (AUTO, (AUTO,), [AUTO]):
        return asked
    text = default_text("calibration")
    return replace(asked, calibration=text, sampling=asked.sampling or ("concat" if text == "python-docs" else None))


def model_samples(opened: OpenedModel, asked: CalibrationSettings, *, progress: Progress, placing: Progress) -> Samples:
    """The windows that are asked for, or for a model that reads something else the images, recordings or inputs."""
    if _cut_into_windows(opened, asked.calibration):
        return model_windows(opened, asked, progress=progress, placing=placing)
    how: dict[str, Any] = {name: getattr(asked, name) for name in ("samples", "length", "seed")}
    return _other_samples(opened, asked.calibration, asked.tokenizer, **how, what="samples")


def _cut_into_windows(opened: OpenedModel, source: Any) -> bool:
    """Whether a model reads a source as windows of tokens."""
    alone = isinstance(source, Mapping | NamedSamples) or texts_of(source) is not None
    return reads_tokens(opened.skeleton.model) and not alone


def _other_samples(
    opened: OpenedModel, source: Any, tokenizer: Any = None, *, write: bool = True, **how: Any
) -> Images | NamedSamples:
    """Images, recordings, texts of a table, or inputs that are given by name."""
    model = opened.skeleton.model
    spec = texts_of(source)
    if spec is not None and reads_tokens(model):
        if _predicts(opened):
            raise CalibrationError(
                f"{source}: labelled texts are for encoders and what stands on them, and {type(model).__name__} "
                "predicts the next token. Give it a text, or tasks."
            )
        texts = model_texts(opened, spec, tokenizer, **how)
        _say_fewer(texts, how["what"], how["samples"])
        return _measured(opened, texts.for_a_decoder() if is_encoder_decoder(model) else texts)
    if input_name(opened.skeleton.model) == "pixel_values" and not isinstance(source, Mapping | NamedSamples):
        images = model_images(opened, source, **how)
        _say_fewer(images, how["what"], how["samples"])
        return images
    found = named_samples(source, how["samples"])
    if found is None and has_two_towers(opened.skeleton.model):
        found = model_pairs(opened, source, **how)
    if found is None:
        found = model_recordings(opened, source, **how, write=write)
    if is_encoder_decoder(opened.skeleton.model):
        found = found.for_a_decoder()
    _say_fewer(found, how["what"], how["samples"])
    return _measured(opened, found)


def _predicts(opened: OpenedModel) -> bool:
    """Whether a model predicts the next token, with no encoder before it."""
    try:
        check_predicts(opened.skeleton.model, opened.skeleton.blocks, "a perplexity")
    except ModelStructureError:
        return False
    return True


def _measured(opened: OpenedModel, found: NamedSamples) -> NamedSamples:
    """The samples with the number of hidden states that the model makes of the first."""
    length = sum(hidden_states_of(opened, found.batches(1)[0]))
    provenance = {**found.provenance, "samples": found.samples, "length": length}
    return replace(found, provenance=provenance, length=length)


def check_reads_tokens(opened: OpenedModel, source: Any) -> None:
    """Raise `CalibrationError` for a model that reads no tokens, or for images where it does."""
    model = opened.skeleton.model
    if not reads_tokens(model):
        raise CalibrationError(
            f"{type(model).__name__} reads {input_name(model)}, and this is for models that read tokens. Models of "
            "images and speech are for plan, prune and compare."
        )
    if images_of(source) is not None:
        raise CalibrationError(f"{type(model).__name__} reads tokens, and no images. Give it a text, such as c4.")


@dataclass(frozen=True)
class Foreseen:
    """Calibration windows that are drawn, or only how many of which length there will be.

    `unchecked` are sentences on what only drawing them shows. `to_write` is what the model would first have to write,
    `at_once` texts side by side.
    """

    windows: Samples | None
    samples: int
    length: int
    unchecked: Sequence[str]
    to_write: Sequence[OwnText] = ()
    at_once: int = 1


def foreseen_windows(opened: OpenedModel, asked: CalibrationSettings) -> Foreseen:
    """What `model_windows` would draw, as far as it is quick to find out; raises the same where that shows an error.

    Without a calibration text only the length is checked.
    """
    asked = with_default_text(asked)
    given: Any = asked.calibration
    if given is not None and not _cut_into_windows(opened, given):
        how: dict[str, Any] = {name: getattr(asked, name) for name in ("samples", "length", "seed")}
        other = _other_samples(opened, given, asked.tokenizer, **how, what="samples", write=False)
        written = other.provenance.get("transcripts_written")
        heard = [f"what the model hears in {written:,} recordings without a transcript"] if written else []
        return Foreseen(other, other.samples, other.length, heard)
    check_reads_tokens(opened, asked.calibration)
    unchecked: Sequence[str] = ()
    to_write: list[OwnText] = []
    windows, at_once = None, 1
    if asked.calibration is not None:
        text = is_text(asked.calibration)
        tokenizer = opened.load_tokenizer() if asked.tokenizer is None and text else asked.tokenizer
        author = Author(opened, tokenizer)
        kept, at_once = functools.cache(author.kept), author.at_once
        how = {name: getattr(asked, name) for name in ("samples", "length", "seed", "sampling")}
        to_write = [own for own in own_texts(asked.calibration, tokenizer, **how) if kept(own) is None]
        bos = "papers" if asked.bos == "auto" else asked.bos
        windows, unchecked = quick_windows(asked.calibration, tokenizer, bos=bos, kept=kept, **how)
    if windows is None:
        samples, length = asked.samples or DEFAULT_SAMPLES, asked.length or DEFAULT_LENGTH
    else:
        samples, length = windows.samples, windows.length
    checked = windows or Windows(torch.zeros(1, length, dtype=torch.int64), {})
    _check_fits(checked, opened)
    return Foreseen(windows, samples, length, unchecked, to_write, at_once)


def model_evaluation_windows(
    opened: OpenedModel,
    data: Any,
    tokenizer: Any,
    *,
    length: int | None = None,
    windows: int | None = None,
    bos: str = "auto",
    known: Mapping[str, Any] | None = None,
    option: str = "--length",
    predicting: bool = True,
    alone: bool = True,
) -> Windows:
    """`evaluation_windows` of `data` for an opened model; `bos` and `known` are those of `model_windows`.

    With "auto", a checkpoint of ours follows what its dense model chose for the calibration samples: pruning can move a
    window's loss by more than the margin, and both models are to read the same tokens.

    Raises what `evaluation_windows` raises. Where the model is to be `predicting` the next token (`alone`: without an
    encoder), also `ModelStructureError` for one that does not, and `CalibrationError` for windows of less than two
    tokens.
    """
    if predicting:
        check_predicts(opened.skeleton.model, opened.skeleton.blocks, "a perplexity", alone=alone)
    check_reads_tokens(opened, data)
    text = is_text(data)
    tokenizer = opened.load_tokenizer() if tokenizer is None and text else tokenizer
    if text and bos == "auto" and known is None:
        known = _choice_of_the_dense_model(opened)

    def cut(where: str) -> Windows:
        found = evaluation_windows(data, tokenizer, length=length, windows=windows, bos=where)  # type: ignore[arg-type]
        _check_fits(found, opened, option)
        if predicting:
            check_predictions(found, option)
        return found

    found = _placed(cut, bos, known, str(data) if text else "token ids", lambda: opened, text)
    _say_fewer(found, "windows", windows)
    return found


def evaluation_samples(
    opened: OpenedModel,
    data: Any,
    tokenizer: Any,
    *,
    length: int | None,
    windows: int | None,
    bos: str,
    predicting: bool = False,
) -> Samples:
    """The windows of `model_evaluation_windows`, also for encoder-decoders; where it reads them, other samples."""
    if _cut_into_windows(opened, data):
        return model_evaluation_windows(
            opened, data, tokenizer, length=length, windows=windows, bos=bos, predicting=predicting, alone=False
        )
    if predicting and texts_of(data) is None:
        check_predicts(opened.skeleton.model, opened.skeleton.blocks, "a perplexity", alone=False)
    return _other_samples(opened, data, tokenizer, samples=windows, length=length, seed=None, what="windows")


class _Calibration(TypedDict):
    bos: NotRequired[dict[str, Any]]


class _Pruned(TypedDict):
    """What is read of the manifest beside a checkpoint."""

    calibration: NotRequired[_Calibration | None]


def _choice_of_the_dense_model(opened: OpenedModel) -> Mapping[str, Any] | None:
    """Where the dense model wanted BOS, as the manifest of a pruned checkpoint has it; None where nobody asked it."""
    file = Path(getattr(opened.skeleton.source, "folder", "")) / "secateur.json"
    if opened.origin["kind"] != "checkpoint" or not file.is_file():
        return None
    manifest: _Pruned = read_json(file, _Pruned)
    choice = (manifest.get("calibration") or {}).get("bos", {})
    return choice if choice.get("asked") == "auto" and choice.get("used") in get_args(Bos) else None


def _placed(
    cut: Callable[[str], Windows],
    bos: str,
    known: Mapping[str, Any] | None,
    name: str,
    model: Callable[[], OpenedModel],
    text: bool,
    progress: Progress = lambda done, total: None,
) -> Windows:
    """Windows with BOS where that word wants it, or where the model reads them better; recorded as `bos`."""
    if not text:
        return cut("papers" if bos == "auto" else bos)
    if known is not None:
        windows = cut(known["used"])
        return replace(windows, provenance={**windows.provenance, "bos": dict(known)})
    windows, nats = cut("papers" if bos == "auto" else bos), None
    if bos == "auto":
        nats = bos_nats(model(), windows, progress)
    if nats is not None and nats[1] - nats[0] > BOS_MARGIN:
        windows = cut("always")
    known_nats = [value if math.isfinite(value) else None for value in nats or ()]
    figures = dict(zip(("nats_with", "nats_without"), known_nats, strict=False))
    record = {"asked": bos, **windows.provenance["bos"], **figures}
    windows = replace(windows, provenance={**windows.provenance, "bos": record})
    if nats is not None and record["used"] == "always":
        _log.warning("%s: %s. --bos papers is the published way.", name, bos_text(windows.provenance))
    return windows


def bos_nats(
    opened: OpenedModel, windows: Windows, progress: Progress = lambda done, total: None
) -> tuple[float, float] | None:
    """The loss of the first window of text with BOS in front and without, in nats for each of the same tokens.

    These are the window's tokens after the first; BOS takes the place of its own first token, or of its last. None
    where the tokenizer has no BOS, where every window begins with it anyway, where nothing is left to compare, or where
    the model predicts no next token. Takes one pass over the weights.
    """
    bos = windows.provenance["bos"]["token"]
    skeleton = opened.skeleton
    if bos is None or bos >= skeleton.vocabulary_size or bool((windows.input_ids[:, 0] == bos).all()):
        return None
    row = next(batch[0] for batch in windows.batches(1))
    own = row[1:] if int(row[0]) == bos else row[:-1]
    if len(own) < 2:
        return None
    batches = [torch.cat([torch.tensor([bos]), own]).unsqueeze(0), own.unsqueeze(0)]
    try:
        check_predicts(skeleton.model, skeleton.blocks, "a perplexity")
        streamed = after_the_last_block(
            skeleton,
            batches,
            offload_states="never",
            progress=lambda stage, done, total: progress(done, total) if stage == "blocks" else None,
        )
        with torch.no_grad(), streamed as stream:
            losses = [torch.cat(list(stream.losses(batch)), dim=1)[0].double() for batch in range(2)]
    except ModelStructureError:  # what speaks against pruning it, the run itself will say
        return None
    return float(losses[0][1:].mean()), float(losses[1].mean())


def _check_fits(windows: Windows, opened: OpenedModel, option: str = "--length") -> None:
    skeleton = opened.skeleton
    check_fits(windows, skeleton.vocabulary_size, skeleton.positions, option)
    short = min(windows.lengths)
    if is_encoder_decoder(skeleton.model) and short < 2:
        raise CalibrationError(
            f"sample {windows.lengths.index(short)}: has {short} token, expected at least 2: the encoder reads the "
            f"first half of a window, and the decoder the rest. Use {option} 2 or more."
        )


def _say_fewer(samples: Samples, what: str, asked: int | None) -> None:
    if asked is not None and samples.samples < asked:
        _log.warning("%s of the %s %s asked for: there are no more.", f"{samples.samples:,}", f"{asked:,}", what)


def is_text(source: Any) -> bool:
    """Whether some of it has to be tokenised."""
    if isinstance(source, Tensor | Windows):
        return False
    specs = [source] if isinstance(source, str | os.PathLike | Corpus) else source
    return not all(isinstance(spec, str | os.PathLike) and is_token_file(os.fspath(spec)) for spec in specs)
