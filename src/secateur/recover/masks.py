"""Which weights of a model in memory are pruned: the zeros of its matrices, at most those that a manifest plans."""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from secateur.errors import PatternError
from secateur.files.checkpoint import Checkpoint
from secateur.models.shape.matrices import numbered_experts, prunable_parameters
from secateur.models.shape.skeleton import Skeleton
from secateur.models.shape.structure import find_blocks
from secateur.record.manifest import read_manifest


def matrix_parameters(model: nn.Module) -> dict[str, tuple[nn.Parameter, bool]]:
    """Every parameter that holds prunable matrices, by its name in the model, and whether it is stored (in, out).

    A model with adapters is seen without them: names are those of the base model, and adapters are left out.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    adapters = {
        id(parameter)
        for module in base.modules()
        for leaf in getattr(module, "adapter_layer_names", ())
        if isinstance(getattr(module, leaf, None), nn.Module)
        for parameter in getattr(module, leaf).parameters()
    }
    experts = numbered_experts(getattr(base, "config", None))
    found: dict[str, tuple[nn.Parameter, bool]] = {}
    for block in find_blocks(base):
        parameters = dict(block.module.named_parameters())
        for name, stored in prunable_parameters(block.module, experts)[0].items():
            if id(parameters[name]) not in adapters:
                found[f"{block.path}.{name}".replace(".base_layer.", ".")] = (parameters[name], stored)
    return found


def planned_parameters(model: nn.Module, folder: Path) -> dict[str, nn.Parameter]:
    """The parameters that hold the matrices that a pruned checkpoint's manifest plans, by their names in the model.

    `model` was loaded from `folder`. Raises `PatternError` where a matrix has not the zeros that the manifest records.
    """
    parameters = matrix_parameters(model)
    manifest = read_manifest(folder)
    plain: Any = model
    if hasattr(model, "get_base_model"):  # adapters have renamed modules: where tensors land shows in a model without
        base: Any = model.get_base_model()  # type: ignore[operator]
        with init_empty_weights(include_buffers=False):
            plain = type(base)._from_config(base.config)
    first = next(model.parameters())
    skeleton = Skeleton(plain, Checkpoint(folder), device=first.device, dtype=first.dtype, resident=True)
    matrices = {matrix.name: matrix for matrix in skeleton.matrices}
    for name, entry in manifest.matrices.items():
        matrix = matrices.get(name)
        if matrix is None or matrix.parameter not in parameters:
            raise PatternError(f"{name}: pruned in {folder}, and {type(model).__name__} has no such matrix.")
        parameter, stored = parameters[matrix.parameter]
        weight = matrix.of_parameter(parameter.detach(), stored)
        zeros = weight.numel() - int(weight.count_nonzero())
        if list(weight.shape) != entry["shape"] or zeros != entry["zeros"]:
            raise PatternError(
                f"{name}: {zeros} zeros of {list(weight.shape)} in the model, expected {entry['zeros']} of "
                f"{entry['shape']} as in {folder}. Load the model from there before training."
            )
    planned = {matrices[name].parameter for name in manifest.matrices}
    return {name: parameter for name, (parameter, _) in parameters.items() if name in planned}


def keep_from_zero(values: Tensor, kept: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """The values in a dtype, zero exactly where they are not kept, and how many of the others were nudged.

    Weights that are kept and have become zero, by rounding or by chance, get the smallest magnitude that is safe in
    the dtype, with their sign, so that exactly the pruned weights are zero.
    """
    result = torch.where(kept, values, 0).to(dtype)
    lost = kept & (result == 0)
    count = int(lost.sum())
    if count:
        # A subnormal of float16 is an ordinary number; those of float32 and bfloat16 some devices flush to zero.
        information = torch.finfo(dtype)
        least = max(information.smallest_normal * information.eps, torch.finfo(torch.bfloat16).smallest_normal)
        sign = torch.where(values.signbit(), -1.0, 1.0).to(dtype)
        result = torch.where(lost, sign * least, result)
    return result, count
