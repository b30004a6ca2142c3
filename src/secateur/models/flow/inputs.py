"""What a model's forward is given for a batch."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.models.shape.structure import embeddings_of, is_encoder_decoder


def reads_tokens(model: nn.Module) -> bool:
    """Whether a forward takes token ids."""
    return isinstance(embeddings_of(model, "get_input_embeddings"), nn.Embedding) or not hasattr(model, "config")


def input_name(model: Any) -> str:
    """The name under which a forward takes a batch."""
    return "input_ids" if reads_tokens(model) else str(getattr(model, "main_input_name", "input_ids"))


def named(model: Any, batch: Tensor) -> dict[str, Tensor]:
    """What a forward is given for a batch, by name.

    Of a window, an encoder reads the first half, and the decoder after it the rest.
    """
    if is_encoder_decoder(model):
        return {"input_ids": batch[:, : batch.shape[1] // 2], "decoder_input_ids": predicting(model, batch)[0]}
    return {input_name(model): batch.to(model.dtype) if batch.is_floating_point() else batch}


def predicting(model: Any, batch: Tensor) -> tuple[Tensor, Tensor]:
    """(the tokens that the last stack reads of a window, those that it is to predict, each from the one before).

    Of the last token nothing is predicted; a decoder after an encoder reads in its place, first of all, the token with
    which it starts.
    """
    if not is_encoder_decoder(model):
        return batch, batch[:, 1:]
    rest = batch[:, batch.shape[1] // 2 :]
    return torch.cat([torch.full_like(rest[:, :1], _start_token(model)), rest[:, :-1]], dim=1), rest


def reading(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """What a forward is given whose last stack is to read these tokens, whatever the stacks before it read."""
    if is_encoder_decoder(model):
        return {"input_ids": tokens[:, :1], "decoder_input_ids": tokens}
    return named(model, tokens)


def _start_token(model: Any) -> int:
    """The token with which a decoder after an encoder starts."""
    names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    configs = (model.config, getattr(model, "generation_config", None))
    found = (getattr(config, name, None) for name in names for config in configs)
    return next((value for value in found if isinstance(value, int)), 0)


def forward(model: Any, given: Mapping[str, Tensor]) -> Any:
    """What a model returns for what it is given, without a key-value cache."""
    return model(**given, **({"use_cache": False} if takes_cache(model) else {}))


def takes_cache(model: Any) -> bool:
    """Whether a forward knows of a key-value cache, itself or through what it hands on."""
    parameters = inspect.signature(model.forward).parameters
    handed_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return "use_cache" in parameters or (handed_on and reads_tokens(model))


def shortest(model: nn.Module, batch: Tensor) -> Tensor:
    """A sample that shows how a model calls its blocks: two tokens for each stack, or one image."""
    return batch[:1, : 4 if is_encoder_decoder(model) else 2] if reads_tokens(model) else batch[:1]


def tokens_in(batches: Sequence[Tensor], length: int) -> int:
    """The number of hidden states of all batches, where an image makes `length` of them."""
    return sum(batch.numel() if batch.ndim == 2 else len(batch) * length for batch in batches)
