"""Samples of several inputs by name, such as the features of a recording and the tokens of what is said in it."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch

from secateur.calibration.labels import Label
from secateur.core.batch import LABELS, Named
from secateur.errors import CalibrationError

NO_LABEL = -100  # what labels are where nothing is to be predicted


@dataclass(frozen=True, eq=False)
class NamedSamples:
    """The inputs of each sample by name, without a dimension for samples, on the CPU, and where they came from.

    `length` is the number of hidden states that a model makes of one sample, in all of its stacks. Nothing is padded:
    samples of one shape go through the model together. `labels` are what the samples are said to be.
    """

    each: Sequence[Mapping[str, torch.Tensor]]
    provenance: Mapping[str, Any]
    length: int = 1
    labels: Sequence[Label] | None = None

    @property
    def samples(self) -> int:
        """Their number."""
        return len(self.each)

    @property
    def tokens(self) -> int:
        """The number of hidden states of all samples, were they all like the first."""
        return self.samples * self.length

    @property
    def shape(self) -> dict[str, int]:
        """Samples and length, as provenance records them."""
        return {"samples": self.samples, "length": self.length}

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of the name, the type, the shape and the values of each input of each sample."""
        digest = hashlib.sha256()
        for own in self.each:
            for name, value in sorted(own.items()):
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
                digest.update(value.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def part(self, first: int, last: int | None) -> "NamedSamples":
        """The samples from `first` up to, not with, `last`."""
        labels = None if self.labels is None else self.labels[first:last]
        return replace(self, each=self.each[first:last], labels=labels)

    def for_a_decoder(self) -> "NamedSamples":
        """The same samples for a decoder that reads what it is to predict: labels end with the last one that counts."""
        return replace(self, each=[_without_end(own) for own in self.each])

    def batches(self, batch_size: int) -> list[Named]:
        """All samples in their order: at most `batch_size` at a time, of the same shapes."""
        found: list[Named] = []
        for _, group in groupby(self.each, key=_shapes):
            alike = list(group)
            for first in range(0, len(alike), batch_size):
                own = alike[first : first + batch_size]
                found.append(Named({name: torch.stack([sample[name] for sample in own]) for name in own[0]}))
        return found


def _without_end(sample: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    labels = sample.get(LABELS)
    # Exact: a decoder would read padding in the place of what is no label, and padding is in no statistic.
    if labels is None or labels.ndim != 1 or "decoder_input_ids" in sample or not bool((labels != NO_LABEL).any()):
        return sample
    return {**sample, LABELS: labels[: int((labels != NO_LABEL).nonzero()[-1]) + 1]}


def are_labelled(source: Any) -> bool:
    """Whether a source of samples says by name what the model is to make of each of them."""
    if isinstance(source, NamedSamples):
        return all(LABELS in own for own in source.each)
    return isinstance(source, Mapping) and LABELS in source


def _shapes(sample: Mapping[str, torch.Tensor]) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(value.shape)) for name, value in sorted(sample.items())]


def named_samples(source: Any, samples: int | None) -> NamedSamples | None:
    """The first samples of a mapping from names of inputs to tensors, or None for any other source.

    What an `attention_mask` (and a `decoder_attention_mask`) says is padding is cut off. Raises `CalibrationError` for
    tensors with different numbers of samples, and for a mask with a gap.
    """
    if isinstance(source, NamedSamples):
        return source.part(0, samples)
    if not isinstance(source, Mapping):
        return None
    tensors = {str(name): value for name, value in source.items() if isinstance(value, torch.Tensor)}
    counts = {name: len(value) if value.ndim else 0 for name, value in tensors.items()}
    if len(tensors) < len(source) or not tensors or len(set(counts.values())) > 1 or not min(counts.values()):
        raise CalibrationError(
            f"named inputs: got {counts or 'no tensors'}, expected tensors that all have the same number of samples."
        )
    each = []
    for number in range(min(counts.values()))[:samples]:
        sample: Mapping[str, torch.Tensor] = {name: value[number].detach().to("cpu") for name, value in tensors.items()}
        for side in ("", "decoder_"):
            sample = _unpadded(sample, side, number)
        each.append({name: value.clone() for name, value in sample.items()})
    return NamedSamples(each, {"source": "named inputs", "inputs": sorted(tensors)})


def _unpadded(sample: Mapping[str, torch.Tensor], side: str, number: int) -> Mapping[str, torch.Tensor]:
    """A sample without what its mask says is padding, in all inputs of that side that are as long as the mask.

    Labels that are as long as the inputs belong to these where no label lies in the padding.
    """
    # Exact: cut off, padding is in no statistic, and in no patch of a convolution.
    mask = sample.get(f"{side}attention_mask")
    if mask is None or mask.ndim != 1 or bool(mask.all()):
        return sample
    long = [name for name, value in sample.items() if value.ndim in (1, 2) and len(value) == len(mask)]
    own = [name for name in long if name != LABELS and name.startswith("decoder_") == bool(side)]
    if len(own) < 2:  # of a mask alone nobody knows what it is about
        return sample
    first, last = (int(end) for end in mask.nonzero().flatten()[[0, -1]]) if bool(mask.any()) else (0, -1)
    if not bool(mask[first : last + 1].all()) or last < first:
        raise CalibrationError(
            f"named inputs: {side}attention_mask of sample {number} has "
            + ("padding between its tokens" if last >= first else "padding alone")
            + ", expected tokens with padding before or behind them."
        )
    if LABELS in long:
        outside = torch.ones_like(mask, dtype=torch.bool)
        outside[first : last + 1] = False
        own += [LABELS] if bool((sample[LABELS][outside] == NO_LABEL).all()) else []
    return {name: value[first : last + 1] if name in own else value for name, value in sample.items()}
