"""Modules inside what other libraries wrap around them: the plain module, with the names that a checkpoint has."""

from collections.abc import Callable
from contextlib import ExitStack

from torch import nn

from secateur.errors import ModelStructureError

WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")  # where torch.compile and activation checkpointing keep a module
PARALLEL = ("DataParallel", "DistributedDataParallel")


def plain_module(model: nn.Module) -> tuple[nn.Module, Callable[[], None]]:
    """The module inside the wrappers of torch.compile, of (Distributed)DataParallel and of activation checkpointing.

    Wrappers deeper inside are taken out as well, until the function that is returned puts them back. Parameters are
    the same ones throughout. Raises `ModelStructureError` for what cannot be unwrapped, and says what to do.
    """
    model = _unwrapped(model)
    with ExitStack() as restoring:
        for parent in list(model.modules()):
            for name, child in list(parent._modules.items()):
                if child is not None and (plain := _unwrapped(child)) is not child:
                    restoring.callback(parent._modules.__setitem__, name, child)
                    parent._modules[name] = plain
        # nn.Module.compile keeps what it compiled beside the module, and calls that.
        for module in model.modules():
            if module._compiled_call_impl:
                restoring.callback(setattr, module, "_compiled_call_impl", module._compiled_call_impl)
                module._compiled_call_impl = None
        _check_plain(model)
        return model, restoring.pop_all().close


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module inside all wrappers around it; itself where there are none."""
    for name in (*WRAPPED, *(("module",) if type(module).__name__ in PARALLEL else ())):
        inner = module._modules.get(name)
        if inner is not None:
            return _unwrapped(inner)
    return module


def _check_plain(model: nn.Module) -> None:
    """Raise `ModelStructureError` for parameters in pieces, on other devices, or under other names than a file has."""
    name = type(model).__name__
    for path, module in model.named_modules():
        if "FullyShardedDataParallel" in type(module).__name__:
            raise ModelStructureError(
                f"{path or name}: FSDP keeps its parameters in pieces. Gather and save the model first, and give the "
                "folder; Secateur streams it."
            )
        if "parametrizations" in module._modules:
            raise ModelStructureError(
                f"{path or name}: its weights are parametrised (torch.nn.utils.parametrize). Make them plain first "
                "with torch.nn.utils.parametrize.remove_parametrizations."
            )
        masked = next(
            (leaf for leaf in module._buffers if f"{leaf.removesuffix('_mask')}_orig" in module._parameters), ""
        )
        if masked:
            raise ModelStructureError(
                f"{path or name}: holds a mask of torch.nn.utils.prune ({masked}). Make it permanent first with "
                f'torch.nn.utils.prune.remove(module, "{masked.removesuffix("_mask")}").'
            )
    for path, parameter in model.named_parameters():
        if type(parameter.data).__name__ == "DTensor" or type(parameter).__name__ == "DTensor":
            raise ModelStructureError(
                f"{path}: is spread over processes (a DTensor of FSDP or tensor parallelism). Save the model first, "
                "and give the folder; Secateur streams it."
            )
    places = {str(parameter.device) for parameter in model.parameters()}
    mapped = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    meta = next((path for path, parameter in model.named_parameters() if parameter.is_meta), None)
    if meta is not None or len(places) > 1 or len(mapped) > 1 or "disk" in mapped:
        raise ModelStructureError(
            f"{name}: its weights are offloaded or spread over devices (device_map"
            f"{f', {meta} is on meta' if meta else ''}). Give the folder or hub id instead; Secateur streams it."
        )
