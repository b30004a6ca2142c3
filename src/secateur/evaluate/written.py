"""Texts that models write, of speech or in another language, and how far they are from what should stand there."""

import importlib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from secateur.calibration.labels import Label
from secateur.collect.model_audio import loaded_whole
from secateur.core.batch import LABELS, Named
from secateur.errors import CalibrationError, CheckpointError
from secateur.evaluate.measured import Measured
from secateur.models.flow.inputs import DECODED, named
from secateur.models.opening.classes import Task
from secateur.models.opening.opened import OpenedModel
from secateur.runs.events import Progress

GROUPS = 50  # of samples that are left out in turn, for errors
NEW_TOKENS = 256  # where neither generation_config.json nor the model names a limit
_NO_WORD = re.compile(r"[^\w\s']|_")


@dataclass(frozen=True)
class Judged:
    """What one kind of text is judged by: the figure's name, the package that computes it, whether case counts."""

    figure: str
    package: str
    plain: bool


JUDGED: dict[Task, Judged] = {
    "CTC": Judged("wer", "jiwer", plain=True),
    "SPEECH_SEQ_2_SEQ": Judged("wer", "jiwer", plain=True),
    "SEQ_TO_SEQ_CAUSAL_LM": Judged("chrf", "sacrebleu", plain=False),
}


def check_package(task: Task) -> None:
    """Raise `CalibrationError` where the package is not installed that figures of such texts are computed by."""
    package = JUDGED[task].package
    try:
        importlib.import_module(package)
    except ImportError:
        raise CalibrationError(
            f'{JUDGED[task].figure} is computed by the package {package}: pip install "secateur[metrics]"'
        ) from None


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of tokens, without those that are no text; of CTC, repeated ones once."""
    found: str = tokenizer.decode(list(ids), skip_special_tokens=True)
    return found.strip()


@torch.no_grad()
def write(opened: OpenedModel, tokenizer: Any, batches: Sequence[Named], progress: Progress) -> list[str]:
    """What a model writes by `generate` for each sample, without chance, else as its generation_config.json says.

    The whole model is in memory for it. Raises `CheckpointError` where it cannot generate.
    """
    found: list[str] = []
    with loaded_whole(opened) as module:
        limit = _limit(module)
        for number, batch in enumerate(batches):
            inputs = named(module, batch.to(opened.skeleton.device))
            given = {name: value for name, value in inputs.items() if name not in (DECODED, LABELS)}
            try:
                output = module.generate(**given, do_sample=False, **limit)
            except (ValueError, TypeError, LookupError, RuntimeError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                said = str(error).strip().splitlines() or [type(error).__name__]
                raise CheckpointError(f"{type(module).__name__}: generate fails on it: {said[0]}") from None
            found += [text_of(tokenizer, ids) for ids in output.tolist()]
            progress("writing", number + 1, len(batches))
    return found


def _limit(module: Any) -> dict[str, int]:
    """How much may be written where nothing says so: transformers would stop after 20 tokens."""
    config = module.generation_config
    if config.max_new_tokens is not None or config.max_length not in (None, 20):
        return {}
    positions = getattr(module.config, "max_target_positions", None) or NEW_TOKENS
    return {"max_length": min(positions, NEW_TOKENS)}


def normaliser(model: Any, tokenizer: Any) -> tuple[str, Callable[[str], str]]:
    """(its name, what texts go through before they are compared): the tokenizer's own where it has one, as Whisper's.

    English is normalised as the authors of Whisper do it, where the model or the tokenizer is set to English; other
    languages by their simpler rules. Any other text becomes lower case, without punctuation but apostrophes.
    """
    if not hasattr(tokenizer, "basic_normalize"):
        return "lower case, no punctuation", lambda text: " ".join(_NO_WORD.sub(" ", text.casefold()).split())
    alone = getattr(getattr(model, "generation_config", None), "is_multilingual", None) is False
    language = str(getattr(tokenizer, "language", None) or "").casefold()
    if language in ("en", "english") or (alone and not language):
        if getattr(tokenizer, "english_spelling_normalizer", None) is not None:
            return "Whisper's for English", tokenizer.normalize
        from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

        return "Whisper's for English, spellings as they are (no normalizer.json)", EnglishTextNormalizer({})  # type: ignore[no-untyped-call]
    return "Whisper's for any language", tokenizer.basic_normalize


def text_figures(
    task: Task, dense: Sequence[str], pruned: Sequence[str], labels: Sequence[Label] | None, plain: Callable[[str], str]
) -> dict[str, Any]:
    """The figures of a `Labelled` for what two models have written for the same samples; texts as they are compared."""
    if not JUDGED[task].plain:
        plain = str.strip
    texts, texts_dense = [plain(text) for text in pruned], [plain(text) for text in dense]
    same = torch.tensor([one == other for one, other in zip(texts, texts_dense, strict=True)], dtype=torch.float64)
    wanted = None if labels is None else [plain(label.value) for label in labels]
    figures = {}
    if wanted is not None:
        make = _word_errors if JUDGED[task].figure == "wer" else _chrf
        figures = {JUDGED[task].figure: jackknifed(len(wanted), make(texts_dense, wanted), make(texts, wanted))}
    return {"same": same, "figures": figures, "answers": texts, "answers_dense": texts_dense, "labels": wanted}


def judged_by(task: Task, name: str) -> dict[str, str]:
    """What the record of such figures says: the package's version, and how texts were normalised."""
    own = JUDGED[task]
    return {"package": f"{own.package} {version(own.package)}", **({"normaliser": name} if own.plain else {})}


Figure = Callable[[Iterable[int]], float]


def _word_errors(texts: Sequence[str], wanted: Sequence[str]) -> Figure:
    """The word error rate of some of the samples: errors of all words together, over all words that were said."""
    import jiwer

    errors, words = [], []
    for text, reference in zip(texts, wanted, strict=True):
        own = jiwer.process_words([reference], [text])
        errors.append(own.substitutions + own.deletions + own.insertions)
        words.append(own.substitutions + own.deletions + own.hits)
    if not sum(words):
        raise CalibrationError("The transcripts have no word in them, so that there is no word error rate.")

    def rate(samples: Iterable[int]) -> float:
        chosen = list(samples)
        said = sum(words[sample] for sample in chosen)
        return sum(errors[sample] for sample in chosen) / said if said else math.nan

    return rate


def _chrf(texts: Sequence[str], wanted: Sequence[str]) -> Figure:
    """The chrF of some of the samples together, as sacrebleu has it: from 0 to 100."""
    from sacrebleu.metrics.chrf import CHRF

    def score(samples: Iterable[int]) -> float:
        chosen = list(samples)
        own = CHRF().corpus_score([texts[sample] for sample in chosen], [[wanted[sample] for sample in chosen]])
        return float(own.score)

    return score


def jackknifed(samples: int, dense: Figure, pruned: Figure) -> Measured:
    """A figure of both models over all samples, with errors by the jackknife over groups of samples.

    There are as many groups as samples, at most 50: sample i belongs to group i modulo 50.
    """
    groups = min(samples, GROUPS)
    without = [[sample for sample in range(samples) if sample % groups != group] for group in range(groups)]
    every = range(samples)
    values = [(dense(every), pruned(every))]
    values += [(dense(own), pruned(own)) for own in without] if groups > 1 else []
    each = torch.tensor([(one, other, other - one) for one, other in values], dtype=torch.float64)
    spread = each[1:] - each[1:].mean(0)
    errors = ((groups - 1) / groups * spread.square().sum(0)).sqrt().tolist() if groups > 1 else [math.nan] * 3
    found = each[0].tolist()
    return Measured(found[0], errors[0], found[1], errors[1], found[2], errors[2])
