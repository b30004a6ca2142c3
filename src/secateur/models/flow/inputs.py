"""What a model's forward is given for a batch."""

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from secateur.models.shape.structure import embeddings_of


def reads_tokens(model: nn.Module) -> bool:
    """Whether a forward takes token ids."""
    return isinstance(embeddings_of(model, "get_input_embeddings"), nn.Embedding) or not hasattr(model, "config")


def input_name(model: Any) -> str:
    """The name under which a forward takes a batch."""
    return "input_ids" if reads_tokens(model) else str(getattr(model, "main_input_name", "input_ids"))


def forward(model: Any, batch: Tensor) -> Any:
    """What a model returns for a batch, without a key-value cache."""
    value = batch.to(model.dtype) if batch.is_floating_point() else batch
    given: dict[str, Any] = {input_name(model): value}
    if takes_cache(model):
        given["use_cache"] = False
    return model(**given)


def takes_cache(model: Any) -> bool:
    """Whether a forward knows of a key-value cache, itself or through what it hands on."""
    parameters = inspect.signature(model.forward).parameters
    handed_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return "use_cache" in parameters or (handed_on and reads_tokens(model))


def shortest(model: nn.Module, batch: Tensor) -> Tensor:
    """A sample that shows how a model calls its blocks: two tokens, or one image."""
    return batch[:1, :2] if reads_tokens(model) else batch[:1]


def tokens_in(batches: Sequence[Tensor], length: int) -> int:
    """The number of hidden states of all batches, where an image makes `length` of them."""
    return sum(batch.numel() if batch.ndim == 2 else len(batch) * length for batch in batches)
