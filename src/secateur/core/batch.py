"""What a forward is given at once: token ids or images as one tensor, or several inputs by name."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

LABELS = "labels"  # the input that says what a model is to make of a sample


@dataclass(frozen=True, eq=False)
class Named:
    """Samples of several inputs of a forward, by name; the first dimension of each counts the samples."""

    inputs: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def __getitem__(self, part: slice) -> "Named":
        return Named({name: value[part] for name, value in self.inputs.items()})

    def to(self, device: torch.device) -> "Named":
        """The same on a device."""
        return Named({name: value.to(device) for name, value in self.inputs.items()})


Batch = Tensor | Named
