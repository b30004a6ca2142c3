"""How close the last hidden states of pruned models are to the dense one's, for models that predict no next token."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.collect.model_windows import evaluation_samples
from secateur.collect.settings import DtypeSettings
from secateur.errors import CheckpointError, NumericalError
from secateur.evaluate.beside_dense import beside_dense
from secateur.evaluate.perplexity import standard_error, without_nan
from secateur.evaluate.settings import AgreementSettings, TextSettings
from secateur.models.flow.stream import Stream
from secateur.models.opening.opened import open_model
from secateur.models.shape.causality import predicts
from secateur.runs.events import Progress
from secateur.runs.options import shared, taking
from secateur.runs.processes import Processes
from secateur.shown import Shown, ShownList


@dataclass(frozen=True, repr=False)
class Similarity(Shown):
    """A pruned model's last hidden states beside the dense one's, on the same samples.

    Hidden states are those that the model itself returns as the last, after the final norm where it has one: of an
    encoder-decoder those of the decoder, which reads the rest of a window of which the encoder reads the half. `cosine`
    is the mean over tokens of their cosine, `pooled_cosine` that of the mean of each window's states, as sentence
    encoders pool them. `relative_error` is ``||pruned - dense|| / ||dense||`` over all tokens. Errors are standard
    errors over windows, whose own means are `window_cosine`, `window_pooled_cosine`. `digest` is that of the tokens.
    """

    model: str
    data: str
    windows: int
    length: int
    tokens: int
    cosine: float
    cosine_error: float
    pooled_cosine: float
    pooled_cosine_error: float
    relative_error: float
    window_cosine: list[float]
    window_pooled_cosine: list[float]
    digest: str
    seconds: float
    provenance: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """All fields; errors are None for a single window."""
        return without_nan(vars(self))


@taking(AgreementSettings)
@torch.no_grad()
def similarity(settings: AgreementSettings) -> list[Similarity]:
    """The similarity of each pruned model with the dense one, on the same windows of a text.

    For encoders and other models that predict no next token; `agreement` is for those that do. The models run one
    after the other, each in the memory of one block. The text is cut as for `perplexity`.

    Raises `CheckpointError` for models whose hidden states have different widths, `NumericalError` for hidden states
    that are not finite, and `CalibrationError` for a text that is too short or does not fit the model.
    """
    text = shared(settings, TextSettings)
    found = beside_dense(
        settings,
        lambda dense: evaluation_samples(dense, settings.data, settings.tokenizer, **text),
        compare_states,
        predicting=False,
    )
    return ShownList(Similarity(**figures) for figures in found)


def compare_states(dense: Stream, pruned: Stream, progress: Progress, processes: Processes) -> dict[str, Any]:
    """The figures of a `Similarity`, from both models' last hidden states."""
    # (cosine of tokens, cosine of means, squares of the difference, of the dense one, number of tokens) of each window
    batches: list[Tensor] = []
    for batch in range(len(dense.batches)):
        expected, found = (stream.last_hidden_states(batch).double() for stream in (dense, pruned))
        if expected.shape[-1] != found.shape[-1]:
            raise CheckpointError(
                f"the pruned model's hidden states have a width of {found.shape[-1]}, the dense model's of "
                f"{expected.shape[-1]}. They cannot be compared."
            )
        for who, states in (("dense", expected), ("pruned", found)):
            if not states.isfinite().all():
                raise NumericalError(f"The last hidden states of the {who} model are not finite; try --dtype float32.")
        cosine = torch.nn.functional.cosine_similarity
        squares = [value.square().flatten(1).sum(1) for value in (found - expected, expected)]
        own = [cosine(expected, found, dim=-1).mean(1), cosine(expected.mean(1), found.mean(1), dim=-1), *squares]
        batches.append(torch.stack([*own, torch.full_like(own[0], expected[0, ..., 0].numel())]).cpu())
        progress("head", batch + 1, len(dense.batches))
    tokens, pooled, error, norm, counts = torch.cat([own for part in processes.gather(batches) for own in part], dim=1)
    if not norm.any():
        raise NumericalError(
            f"The dense model's last hidden states of all {len(norm)} samples are zero: nothing can be compared "
            "with them. Is the model damaged, or are its weights those of another class?"
        )
    return {
        "tokens": int(counts.sum()),
        "cosine": float(tokens.mean()),
        "cosine_error": standard_error(tokens),
        "pooled_cosine": float(pooled.mean()),
        "pooled_cosine_error": standard_error(pooled),
        "relative_error": math.sqrt(float(error.sum()) / float(norm.sum())),
        "window_cosine": tokens.tolist(),
        "window_pooled_cosine": pooled.tolist(),
    }


def predicts_tokens(settings: AgreementSettings) -> bool:
    """Whether the dense model predicts the next token, so that `agreement` is for it; no weights are read for it."""
    if str(settings.dense).endswith(".gguf"):  # which are decoders, and are read as a whole when they are opened
        return True
    opened = open_model(settings.dense, **shared(settings, DtypeSettings))
    try:
        return predicts(opened.skeleton.model, opened.skeleton.blocks)
    finally:
        opened.restore()
