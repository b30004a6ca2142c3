"""How far pruned models agree with the dense one on the same tokens: divergence, first choices, perplexity."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.collect.model_windows import evaluation_samples
from secateur.errors import CheckpointError
from secateur.evaluate.beside_dense import beside_dense
from secateur.evaluate.perplexity import (
    check_finite,
    exponential,
    paired_difference,
    standard_error,
    without_nan,
)
from secateur.evaluate.settings import AgreementSettings, TextSettings
from secateur.evaluate.verdict import Change, Verdict, verdict
from secateur.models.flow.stream import Stream
from secateur.models.opening.opened import OpenedModel
from secateur.runs.events import Progress
from secateur.runs.options import shared, taking
from secateur.runs.processes import Processes
from secateur.shown import Shown, ShownList


@dataclass(frozen=True, repr=False)
class Agreement(Shown):
    """A pruned model beside the dense one, over the predictions of tokens 2 to length of every window.

    After an encoder, which reads the first half of a window, these are all tokens of the rest.

    `kl` is the mean over tokens of ``KL(dense || pruned)`` in nats, `kl_error` its standard error over windows, `kl_99`
    the 99th percentile over tokens. `top1` is the share of tokens for which both models rank the same next token
    first. `window_kl`, `window_top1`, `window_nats` (the pruned model's loss) and `window_nats_dense` are means of
    windows, for paired comparisons; perplexities are those of the mean over windows, which count alike whatever their
    length. `digest` is that of the tokens.
    """

    model: str
    data: str
    windows: int
    length: int
    tokens: int
    kl: float
    kl_error: float
    kl_99: float
    top1: float
    top1_error: float
    window_kl: list[float]
    window_top1: list[float]
    window_nats: list[float]
    window_nats_dense: list[float]
    digest: str
    seconds: float
    provenance: Mapping[str, Any]

    @property
    def perplexity(self) -> float:
        """The pruned model's perplexity."""
        return exponential(math.fsum(self.window_nats) / len(self.window_nats))

    @property
    def perplexity_dense(self) -> float:
        """The dense model's."""
        return exponential(math.fsum(self.window_nats_dense) / len(self.window_nats_dense))

    @property
    def difference(self) -> float:
        """The pruned model's mean loss minus the dense one's, in nats."""
        return paired_difference(self.window_nats, self.window_nats_dense)[0]

    @property
    def difference_error(self) -> float:
        """The standard error of `difference`, from the differences of windows; NaN for one window."""
        return paired_difference(self.window_nats, self.window_nats_dense)[1]

    @property
    def change(self) -> Change:
        """What a verdict is made of."""
        return Change(self.data, self.difference, self.difference_error, self.top1, self.top1_error)

    def verdict(self, *, max_nats: float | None = None, min_agreement: float | None = None) -> Verdict:
        """Whether the pruned model can take the dense one's place, judged on this text."""
        return verdict(self.model, [self.change], max_nats=max_nats, min_agreement=min_agreement)

    def to_json(self) -> dict[str, Any]:
        """All fields, both perplexities and their difference; errors are None for a single window."""
        computed = ("perplexity", "perplexity_dense", "difference", "difference_error")
        return without_nan({name: getattr(self, name) for name in computed} | vars(self))


@taking(AgreementSettings)
@torch.no_grad()
def agreement(settings: AgreementSettings) -> list[Agreement]:
    """The agreement of each pruned model with the dense one, on the same windows of a text.

    The models run one after the other, each in the memory of one block; between them only the dense model's last
    hidden states are kept. The text is cut as for `perplexity`; with ``bos="auto"`` the dense model decides.

    Raises `CheckpointError` for models with different vocabularies, `NumericalError` for outputs that are not finite,
    and what `perplexity` raises.
    """
    text = shared(settings, TextSettings)
    found = beside_dense(
        settings,
        lambda dense: evaluation_samples(dense, settings.data, settings.tokenizer, **text, predicting=True),
        _compare,
        check=_check_vocabulary,
    )
    return ShownList(Agreement(**figures) for figures in found)


def _check_vocabulary(dense: OpenedModel, pruned: OpenedModel) -> None:
    own, held = pruned.skeleton.vocabulary_size, dense.skeleton.vocabulary_size
    if own != held:
        raise CheckpointError(
            f"{pruned.origin.get('path')}: has a vocabulary of {own} tokens, the dense model has {held}. "
            "They cannot be compared."
        )


def _compare(dense: Stream, pruned: Stream, progress: Progress, processes: Processes) -> dict[str, Any]:
    """The figures of an `Agreement`, from the two models' last hidden states, a few tokens' logits at a time."""
    batches: list[Tensor] = []  # (divergence, first choices equal, pruned loss, dense loss) of each token
    for batch in range(len(dense.batches)):
        chunk = dense.chunk(batch)
        parts = []
        pairs = zip(dense.logits(batch, chunk), pruned.logits(batch, chunk), strict=True)
        for (targets, expected), (_, found) in pairs:
            p, q = (logits.float().log_softmax(-1) for logits in (expected, found))
            # A divergence is never negative; rounding in float32 can make it so by a little.
            divergence = (p.exp() * (p - q)).sum(-1).clamp(min=0)
            same = (p.argmax(-1) == q.argmax(-1)).float()
            losses = [-logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) for logits in (q, p)]
            parts.append(torch.stack([divergence, same, *losses]))
        batches.append(torch.cat(parts, dim=-1).cpu())
        progress("head", batch + 1, len(dense.batches))
    batches = [own for part in processes.gather(batches) for own in part]
    kl, top1 = (torch.cat([batch[row].flatten() for batch in batches]).double() for row in range(2))
    window_kl, window_top1, own_nats, dense_nats = (
        torch.cat([batch[row].double().mean(dim=1) for batch in batches]) for row in range(4)
    )
    for who, nats in (("dense", dense_nats), ("pruned", own_nats)):
        check_finite(nats, f" in the {who} model")
    return {
        "tokens": kl.numel(),
        "kl": float(kl.mean()),
        "kl_error": standard_error(window_kl),
        "kl_99": float(kl.kthvalue(math.ceil(0.99 * kl.numel())).values),
        "top1": float(top1.mean()),
        "top1_error": standard_error(window_top1),
        "window_kl": window_kl.tolist(),
        "window_top1": window_top1.tolist(),
        "window_nats": own_nats.tolist(),
        "window_nats_dense": dense_nats.tolist(),
    }
