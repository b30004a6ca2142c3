"""A module in memory, seen as a checkpoint."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from secateur.files.checkpoint import Layout, shard_names
from secateur.models.weights.conversion import Conversion


class LoadedModel:
    """A module in memory seen as a checkpoint, with the names, shapes and dtypes that save_pretrained would write."""

    MAX_SHARD_BYTES = 5 * 10**9

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        state = model.state_dict()
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        pointers = {name: value.data_ptr() for name, value in state.items()}
        self._state = {
            name: value
            for name, value in state.items()
            if not (name in tied and tied[name] in pointers and pointers[tied[name]] == pointers[name])
        }
        meta = self._revert({name: torch.empty_like(value, device="meta") for name, value in self._state.items()})
        self._tensors = {name: (tuple(value.shape), value.dtype) for name, value in meta.items()}
        self._conversion = Conversion(model, {name: shape for name, (shape, _) in self._tensors.items()})

    def _revert(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from transformers import PreTrainedModel

        if not isinstance(self.model, PreTrainedModel):
            return dict(state)
        from transformers.core_model_loading import revert_weight_conversion

        return dict(revert_weight_conversion(self.model, dict(state)))

    @property
    def names(self) -> list[str]:
        """Tensor names, as save_pretrained would write them."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._tensors[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self._tensors[name][1]

    def read(self, names: Sequence[str], *, pin: bool = False) -> dict[str, Tensor]:
        """The named tensors: views of the module's own where nothing is converted, else copies."""
        parameters = [name for group in self._conversion.of(names) for name in group.parameters]
        tensors = self._revert({name: self._state[name].detach() for name in parameters if name in self._state})
        return {name: tensors[name] for name in names}

    def parts(self, name: str) -> Iterator[Tensor]:
        """All entries of a tensor: it is in memory as a whole."""
        yield self.read([name])[name].reshape(-1)

    def layout(self) -> Layout:
        """Shards of at most 5 GB, in the order of the module."""
        shards: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = [[]]
        size = 0
        for name, (shape, dtype) in self._tensors.items():
            bytes_ = dtype.itemsize * int(torch.Size(shape).numel())
            if shards[-1] and size + bytes_ > self.MAX_SHARD_BYTES:
                shards.append([])
                size = 0
            shards[-1].append((name, dtype, shape))
            size += bytes_
        return list(zip(shard_names(len(shards)), shards, strict=True))
