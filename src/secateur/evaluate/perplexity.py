"""Perplexity in the convention of the pruning papers, streamed block by block."""

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from secateur.calibration.documents import Corpus
from secateur.calibration.images import Images
from secateur.calibration.windows import Windows
from secateur.collect.model_windows import Samples, model_evaluation_windows
from secateur.collect.settings import ModelSettings
from secateur.errors import NumericalError
from secateur.evaluate.settings import PerplexitySettings, TextSettings
from secateur.models.flow.stream import default_batch_size
from secateur.models.opening.opened import open_model
from secateur.runs.forward import after_the_last_block
from secateur.runs.journal import common_facts
from secateur.runs.options import shared, taking
from secateur.runs.processes import Processes, shared_run
from secateur.shown import Shown


@dataclass(frozen=True, repr=False)
class Perplexity(Shown):
    """The result of an evaluation.

    `nats` is the mean over windows of the mean cross-entropy of a window's length - 1 predictions (windows of different
    lengths count alike), `standard_error` that mean's standard error over windows, and `perplexity` is exp(nats).
    `window_nats` are the windows' own means: two models on the same tokens (same `digest`) are best compared by their
    differences, window by window.
    """

    data: str
    windows: int
    length: int
    tokens: int
    nats: float
    standard_error: float
    window_nats: list[float]
    digest: str
    seconds: float
    provenance: Mapping[str, Any]

    @property
    def perplexity(self) -> float:
        """The exponential of the mean cross-entropy."""
        return exponential(self.nats)

    @property
    def perplexity_error(self) -> float:
        """Standard error of the perplexity, to first order: perplexity times the error in nats."""
        return self.perplexity * self.standard_error

    def to_json(self) -> dict[str, Any]:
        """All fields, with the perplexity and its error; errors are None for a single window."""
        value = {"perplexity": self.perplexity, "perplexity_error": self.perplexity_error, **asdict(self)}
        return without_nan(value)


def exponential(nats: float) -> float:
    """exp(nats), infinite where that overflows."""
    return math.exp(nats) if nats < 700 else math.inf


def without_nan(value: Mapping[str, Any]) -> dict[str, Any]:
    """The same with None for what is not a number, which JSON does not know."""
    return {key: None if isinstance(item, float) and math.isnan(item) else item for key, item in value.items()}


def standard_error(values: Tensor) -> float:
    """The standard error of the mean of values; NaN for a single one."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def plus_minus(error: float, form: str) -> str:
    """An error after its figure, nothing where it is NaN: that of a single window."""
    return "" if math.isnan(error) else f" ± {error:{form}}"


def paired_difference(window_nats: Sequence[float], window_nats_dense: Sequence[float]) -> tuple[float, float]:
    """(mean, its standard error) of the differences between two models' losses on the same windows, in nats."""
    own, dense = (torch.tensor(nats, dtype=torch.float64) for nats in (window_nats, window_nats_dense))
    return float((own - dense).mean()), standard_error(own - dense)


@taking(PerplexitySettings)
@torch.no_grad()
def perplexity(settings: PerplexitySettings) -> Perplexity:
    """The perplexity of a model on a text, in the memory of one block.

    The text is tokenised once, cut into windows of `length` (2048) tokens without overlap, and the remainder dropped.
    Each window predicts its tokens 2 to length; the mean cross-entropy of the windows, in float32 whatever the dtype
    of the logits, is averaged and exponentiated. `bos` says where BOS stands: as published, before the first window
    alone ("papers"), before every window ("always"), nowhere ("never"), or as published unless the first window reads
    more than 0.1 nats better with BOS in front, then before every window ("auto").

    Source: the evaluation of SparseGPT, Wanda and GBLM-Pruner. Raises `CalibrationError` for a text that is too short
    or does not fit the model, and `NumericalError` when the model's outputs are not finite.
    """
    with shared_run() as processes:
        return _perplexity(settings, processes)


def _perplexity(settings: PerplexitySettings, processes: Processes) -> Perplexity:
    started = time.perf_counter()
    opened = open_model(**shared(settings, ModelSettings))
    try:
        cut = model_evaluation_windows(opened, settings.data, settings.tokenizer, **shared(settings, TextSettings))
        whole = cut.batches(settings.batch_size or default_batch_size(cut.length, opened.skeleton.device))
        processes.agree({**common_facts(opened), "dtype": str(opened.skeleton.dtype), "tokens": cut.digest})
        batches = processes.share(whole).batches
        forward = partial(after_the_last_block, offload_states=settings.offload_states, progress=settings.tell)
        means = []  # the cross-entropy of each window in nats, in float64
        with forward(opened.skeleton, batches) as stream:
            for batch in range(len(batches)):
                means.append(stream.window_losses(batch))
                settings.tell("head", batch + 1, len(batches))
    finally:
        opened.restore()
    losses = torch.cat([own for part in processes.gather(means) for own in part])
    check_finite(losses)
    return Perplexity(
        **described(cut, settings.data),
        nats=float(losses.mean()),
        standard_error=standard_error(losses),
        window_nats=losses.tolist(),
        seconds=time.perf_counter() - started,
    )


def described(cut: Samples, data: object) -> dict[str, Any]:
    """What a result says of the windows, images or other samples that it was measured on."""
    given = "token ids" if isinstance(cut, Windows) else "pixel values" if isinstance(cut, Images) else "named inputs"
    return {
        "data": str(data) if isinstance(data, str | os.PathLike | Corpus) else given,
        "windows": cut.samples,
        "length": cut.length,
        "tokens": cut.tokens - cut.samples,
        "digest": cut.digest,
        "provenance": cut.provenance,
    }


def counted(windows: int, length: int, provenance: Mapping[str, Any]) -> str:
    """How many samples of which size: "5 windows of 12 tokens", "5 images of 10 places"; recordings have any size."""
    kinds = {
        "images": ("image", f" of {length:,} places"),
        "recordings": ("recording", ""),
        "labelled texts": ("text", ""),
        "named inputs": ("sample", ""),
    }
    name, size = kinds.get(str(provenance.get("source")), ("window", f" of {length:,} tokens"))
    if "with_text" in provenance:
        size = " with a text"
    return f"{windows:,} {name}{'' if windows == 1 else 's'}{size}"


def check_finite(losses: Tensor, where: str = "") -> None:
    """Raise `NumericalError` for windows whose loss is not finite."""
    bad = int((~losses.isfinite()).sum())
    if bad:
        raise NumericalError(
            f"{bad} of {len(losses)} windows have a loss that is not finite{where}. "
            "The model overflows or is damaged; try --dtype float32."
        )
