"""Which of transformers' automatic classes builds the model of a configuration."""

import functools
from typing import Any, Literal, get_args


def auto_classes(config: Any) -> list[Any]:
    """The automatic classes to try in turn for a configuration.

    A decoder is opened with its head, also where the configuration names none; any other model as the class that
    `architectures` names, such as BertForMaskedLM or ViTModel.
    """
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        AutoModelForImageTextToText,
        AutoModelForSeq2SeqLM,
    )
    from transformers.models.auto import modeling_auto

    decoders = [AutoModelForCausalLM, AutoModelForImageTextToText]
    if getattr(config, "model_type", None) == "timm_wrapper":  # which raises a ValueError for a model without a head
        return [AutoModelForImageClassification, AutoModel]
    named = next(iter(getattr(config, "architectures", None) or ()), None)
    if named is None and getattr(config, "is_encoder_decoder", False):
        return [AutoModelForSeq2SeqLM]
    if named is None or any(named in _names(auto, config) for auto in decoders):
        return decoders
    every = [value for name, value in sorted(vars(modeling_auto).items()) if name.startswith("AutoModel")]
    found = [auto for auto in every if named in _names(auto, config)]
    # Code beside the weights says itself which classes it has.
    brought = getattr(config, "auto_map", None) or {}
    return found[:1] or [*decoders, *(auto for auto in every if auto.__name__ in brought and auto not in decoders)]


def _names(auto: Any, config: Any) -> set[str]:
    """The models that an automatic class builds of configurations of this kind."""
    found = auto._model_mapping.get(type(config), ())
    return {kind.__name__ for kind in (found if isinstance(found, list | tuple) else [found])}


def loader_of(architecture: str) -> str:
    """The class of transformers that loads such a model for its use: the automatic one for decoders, else its own."""
    known = any(architecture in names for names in _tables().values())
    return architecture if known and not _is_decoder(architecture) else "AutoModelForCausalLM"


def is_masked(architecture: str) -> bool:
    """Whether a model of transformers fills masked tokens in, and does not predict the next one."""
    return architecture in _tables()["MODEL_FOR_MASKED_LM"] and not _is_decoder(architecture)


# What the models are for of which the figures that people judge them by are known, by transformers' names.
Task = Literal[
    "IMAGE_CLASSIFICATION",
    "SEQUENCE_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "CTC",
    "SPEECH_SEQ_2_SEQ",
    "SEQ_TO_SEQ_CAUSAL_LM",
]


def task_of(architecture: str) -> Task | None:
    """What a model of transformers is for, where that is a `Task`."""
    return next((task for task in get_args(Task) if architecture in _tables()[f"MODEL_FOR_{task}"]), None)


def _is_decoder(architecture: str) -> bool:
    return any(architecture in _tables()[f"MODEL_FOR_{kind}"] for kind in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT"))


@functools.cache
def _tables() -> dict[str, set[str]]:
    """The names of models that each of transformers' tables has, by what they are for."""
    from transformers.models.auto import modeling_auto

    end = "_MAPPING_NAMES"
    tables = {name.removesuffix(end): value for name, value in vars(modeling_auto).items() if name.endswith(end)}
    return {
        name: {kind for found in table.values() for kind in ([found] if isinstance(found, str) else found)}
        for name, table in tables.items()
    }
