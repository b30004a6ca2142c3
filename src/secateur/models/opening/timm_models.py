"""Models of timm: made by their names, and their configuration and images as timm itself has them."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from secateur.errors import CheckpointError
from secateur.models.opening.bars import without_bars
from secateur.models.opening.configuration import CONFIGURATION, read_configuration, reason
from secateur.models.shape.sequences import image_shape, timm_part

PREFIX = "timm:"


def made_by_name(name: str) -> nn.Module:
    """The pretrained model of timm of this name. Raises `CheckpointError` where timm has none, or is not installed."""
    try:
        import timm
    except ImportError:
        raise CheckpointError(f"{PREFIX}{name}: needs the timm package: pip install timm") from None
    try:
        with without_bars():
            model: nn.Module = timm.create_model(name, pretrained=True)
    except Exception as error:  # whatever timm, the hub's client or a reader of weights raises
        raise CheckpointError(
            f"{PREFIX}{name}: timm cannot make it: {reason(error)}. timm.list_pretrained() names those that it can."
        ) from None
    return model


def configuration_of(model: Any) -> dict[str, Any]:
    """What is told of a model that is not its weights: by transformers, or by timm."""
    if hasattr(model, "config"):
        found: dict[str, Any] = model.config.to_dict()
        return found
    part: Any = timm_part(model)
    return {} if part is None else {"pretrained_cfg": dict(part.pretrained_cfg), "made_of": str(part)}


def architecture_of(model: Any) -> str:
    """The class of transformers that loads what is written of a model: its own, or that for models of timm."""
    if timm_part(model) is not model:
        return type(model).__name__
    return "TimmWrapperForImageClassification" if getattr(model, "num_classes", 0) else "TimmWrapperModel"


def of_timm(folder: Path) -> bool:
    """Whether a folder holds a model as timm writes it, which says in config.json how images are made ready."""
    found = read_configuration(folder)
    return "architecture" in found and isinstance(found.get("pretrained_cfg"), dict)


def write_timm_configuration(model: nn.Module, target: Path) -> None:
    """Write config.json as timm does, which it and transformers load. Raises `CheckpointError` where timm cannot."""
    from timm.models import _hub

    file = target / CONFIGURATION
    try:
        _hub.save_config_for_hf(model, str(file))
        written = json.loads(file.read_text(encoding="utf-8"))
    except Exception as error:  # whatever arguments of the model lead timm to
        raise CheckpointError(f"{type(model).__name__}: timm cannot write its configuration: {reason(error)}") from None
    arguments = written.get("model_args", {})
    if arguments.pop("num_classes", None) is not None:  # it is there already, and transformers would give it twice
        file.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def timm_image_processor(model: nn.Module) -> Any:
    """What makes pixel values of images for a model of timm, or None for any other."""
    part: Any = timm_part(model)
    if part is None:
        return None
    from transformers import TimmWrapperImageProcessor

    facts = {**part.pretrained_cfg, "input_size": image_shape(part)}
    return TimmWrapperImageProcessor(pretrained_cfg=facts, architecture=facts.get("architecture"))
