"""What a model's forward is given for a batch."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from secateur.core.batch import LABELS, Batch, Named
from secateur.models.shape.sequences import timm_part
from secateur.models.shape.structure import embeddings_of, has_two_towers, is_encoder_decoder

DECODED, PIXELS = "decoder_input_ids", "pixel_values"


def reads_tokens(model: nn.Module) -> bool:
    """Whether a forward takes token ids and nothing else."""
    if is_encoder_decoder(model) and getattr(model, "main_input_name", "input_ids") != "input_ids":
        return False
    if has_two_towers(model) or timm_part(model) is not None:
        return False
    return isinstance(embeddings_of(model, "get_input_embeddings"), nn.Embedding) or not hasattr(model, "config")


def input_name(model: Any) -> str:
    """The name under which a forward takes a batch."""
    if reads_tokens(model):
        return "input_ids"
    return str(getattr(model, "main_input_name", "input_ids" if timm_part(model) is None else PIXELS))


def named(model: Any, batch: Batch) -> dict[str, Tensor]:
    """What a forward is given for a batch, by name.

    Of a window, an encoder reads the first half, and the decoder after it the rest.
    """
    if isinstance(batch, Named):
        given = {name: _computed(model, value) for name, value in batch.inputs.items() if name != LABELS}
        if is_encoder_decoder(model) and LABELS in batch.inputs and DECODED not in given:
            given[DECODED] = _shifted(model, batch.inputs[LABELS])
        return given
    if is_encoder_decoder(model):
        return {"input_ids": batch[:, : batch.shape[1] // 2], DECODED: predicting(model, batch)[0]}
    return {input_name(model): _computed(model, batch)}


def labelled(model: Any, batch: Named) -> dict[str, Tensor]:
    """What a forward is given, by name, that is to return the loss of a batch beside its labels."""
    return {**named(model, batch), LABELS: _computed(model, batch.inputs[LABELS])}


def takes_labels(model: Any) -> bool:
    """Whether a forward is given labels, and then returns a loss."""
    return LABELS in inspect.signature(model.forward).parameters


def _computed(model: Any, value: Tensor) -> Tensor:
    return value.to(next(model.parameters()).dtype) if value.is_floating_point() else value


def predicting(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """(the tokens that the last stack reads of a window, those that it is to predict, each from the one before).

    Of the last token nothing is predicted; a decoder after an encoder reads in its place, first of all, the token with
    which it starts.
    """
    if isinstance(batch, Named):
        tokens = named(model, batch)[DECODED if is_encoder_decoder(model) else "input_ids"]
        return tokens, batch.inputs[LABELS] if LABELS in batch.inputs else tokens[:, 1:]
    if not is_encoder_decoder(model):
        return batch, batch[:, 1:]
    rest = batch[:, batch.shape[1] // 2 :]
    return _shifted(model, rest), rest


def _shifted(model: Any, tokens: Tensor) -> Tensor:
    """What a decoder after an encoder reads that is to predict these tokens, of which some may be no labels."""
    padding = getattr(model.config, "pad_token_id", None)
    tokens = tokens.where(tokens >= 0, start_token(model) if padding is None else padding)
    return torch.cat([torch.full_like(tokens[:, :1], start_token(model)), tokens[:, :-1]], dim=1)


def reading(model: Any, tokens: Tensor, batch: Batch) -> dict[str, Tensor]:
    """What a forward is given whose last stack is to read these tokens of a batch."""
    if not is_encoder_decoder(model):
        return named(model, tokens)
    if isinstance(batch, Tensor):  # of a text, whatever the encoder reads
        return {"input_ids": tokens[:, :1], DECODED: tokens}
    return {**named(model, batch), DECODED: tokens}


def start_token(model: Any) -> int:
    """The token with which a decoder after an encoder starts."""
    names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    configs = (model.config, getattr(model, "generation_config", None))
    found = (getattr(config, name, None) for name in names for config in configs)
    return next((value for value in found if isinstance(value, int)), 0)


def forward(model: Any, given: Mapping[str, Tensor]) -> Any:
    """What a model returns for what it is given, without a key-value cache."""
    part: Any = timm_part(model)
    if part is not None and part is model:  # whose forward names its images as it likes
        return part(given[PIXELS])
    return model(**given, **({"use_cache": False} if takes_cache(model) else {}))


def takes_cache(model: Any) -> bool:
    """Whether a forward knows of a key-value cache, itself or through what it hands on."""
    parameters = inspect.signature(model.forward).parameters
    handed_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return "use_cache" in parameters or (handed_on and reads_tokens(model))


def shortest(model: nn.Module, batch: Batch) -> Batch:
    """A sample that shows how a model calls its blocks: two tokens for each stack, one image, or one of all inputs."""
    if isinstance(batch, Named) or not reads_tokens(model):
        return batch[:1]
    return batch[:1, : 4 if is_encoder_decoder(model) else 2]


def is_tokens(batch: Batch) -> TypeGuard[Tensor]:
    """Whether a batch is a tensor of token ids."""
    return isinstance(batch, Tensor) and batch.ndim == 2


def tokens_in(batches: Sequence[Batch], length: int) -> int:
    """The number of hidden states of all batches, where one sample that is no window makes `length` of them."""
    return sum(batch.numel() if is_tokens(batch) else len(batch) * length for batch in batches)
