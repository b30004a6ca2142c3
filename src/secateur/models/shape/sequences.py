"""The stacks of a model of timm, whose blocks lie in sequences that nothing but their make-up tells from others."""

from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import nn

Modules = nn.ModuleList | nn.Sequential


def timm_part(model: Any) -> nn.Module | None:
    """A model of timm, also inside the wrapper that transformers has for it; None for any other model."""
    part = getattr(model, "timm_model", model)
    return part if isinstance(part, nn.Module) and hasattr(part, "pretrained_cfg") else None


def image_shape(part: Any) -> tuple[int, int, int]:
    """(channels, height, width) of the images that a model of timm was made for."""
    from timm import models

    now = getattr(models, "get_model_input_config", None)  # older versions know the pretrained model's alone
    facts = part.pretrained_cfg if now is None else now(part)
    channels, height, width = facts.get("input_size") or (3, 224, 224)
    return channels, height, width


def fill_buffers(model: nn.Module) -> None:
    """Compute the buffers of a model of timm that were made on the meta device, where its parameters are."""
    part = timm_part(model)
    for module in () if part is None else part.modules():
        compute = getattr(module, "init_non_persistent_buffers", None)
        if compute is None or not any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            continue
        inside = list(module.modules())
        kept = [own._parameters for own in inside]
        try:
            for own, held in zip(inside, kept, strict=True):  # which say on which device, and in which dtype
                own._parameters = {name: _empty(value) for name, value in held.items()}
            compute()
        finally:
            for own, held in zip(inside, kept, strict=True):
                own._parameters = held


def drop_weights(model: nn.Module) -> nn.Module:
    """The same model, with its parameters on the meta device."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(value.detach().to("meta"), requires_grad=False)
    return model


def _empty(parameter: nn.Parameter | None) -> nn.Parameter | None:
    if parameter is None:
        return None
    return nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=False)


def sequences(module: nn.Module, path: str = "") -> Iterator[tuple[str, Modules]]:
    """The paths and modules of the stacks in a module, in the order in which it names them.

    A stack is a list or sequence of blocks of one class. Where every entry of a list holds one, as the stages of Swin
    and ConvNeXt do, each of those is a stack.
    """
    for name, child in module.named_children():
        where = f"{path}.{name}".strip(".")
        stages = [_inside(f"{where}.{number}", own) for number, own in enumerate(child)] if _is_list(child) else [None]
        found = [stage for stage in stages if stage is not None]
        if len(found) == len(stages):
            yield from found
        elif _are_blocks(child):
            yield where, child
        else:
            yield from sequences(child, where)


def _inside(path: str, stage: nn.Module) -> tuple[str, Modules] | None:
    """The list of blocks that makes up most of a stage, or is the stage."""
    lists = [(f"{path}.{name}".strip("."), own) for name, own in stage.named_modules() if _are_blocks(own)]
    found = max(lists, key=lambda named: _weights(named[1]), default=None)
    return found if found is not None and 2 * _weights(found[1]) > _weights(stage) else None


def _is_list(module: nn.Module) -> TypeGuard[Modules]:
    return isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 0


def _are_blocks(module: nn.Module) -> TypeGuard[Modules]:
    """Whether a module is a list of numbered blocks of one class, each made of several modules and with matrices."""
    if not _is_list(module) or list(module._modules) != [str(number) for number in range(len(module))]:
        return False
    first = module[0]
    composed = bool(list(first.children())) and not _is_list(first)
    return composed and all(
        type(own) is type(first) and any(value.dim() > 1 for value in own.parameters()) for own in module
    )


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
