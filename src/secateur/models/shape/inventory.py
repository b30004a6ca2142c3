"""Which matrices of a model are prunable, block by block, and why every other tensor is not."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from secateur.models.shape.matrices import Matrix, is_kernel, numbered_experts, prunable_parameters
from secateur.models.shape.structure import embeddings_of

if TYPE_CHECKING:
    from secateur.models.shape.skeleton import Skeleton


def inventory(skeleton: "Skeleton") -> list[tuple[list[Matrix], dict[str, str]]]:
    """For each block its prunable matrices, and why its other tensors are not prunable."""
    experts = numbered_experts(skeleton.text_config)
    owners = Counter(id(parameter) for block in skeleton.blocks for parameter in block.module.parameters())
    result = []
    for block in skeleton.blocks:
        planned, reasons = prunable_parameters(block.module, experts)
        for name, parameter in block.module.named_parameters():
            twin = skeleton.tied_to(f"{block.path}.{name}")
            shared = skeleton.in_a_block(twin) and not twin.startswith(f"{block.path}.")
            if (owners[id(parameter)] > 1 or shared) and name in planned:
                del planned[name]
                reasons[name] = "shared between blocks"
        kernels = {f"{block.path}.{name}" for name in planned if is_kernel(block.module, name)}
        transposed = {f"{block.path}.{name}": value for name, value in planned.items()}
        reasons = {f"{block.path}.{name}": reason for name, reason in reasons.items()}
        matrices: list[Matrix] = []
        left_out: dict[str, str] = {}
        for group in skeleton.conversion.of(skeleton.block_tensors[block.index]):
            placed = skeleton.conversion.placements(group, transposed, kernels)
            for name in group.names:
                if name not in placed:
                    vector = "bias or norm" if len(skeleton.source.shape(name)) < 2 else "not a linear matrix"
                    left_out[name] = reasons.get(group.target, vector)
            for name, places in placed.items():
                shape = skeleton.source.shape(name)
                fused = len(shape) == 3 and places[0].expert is not None
                if len(shape) > 2 and not fused:  # a convolution
                    shape = (shape[0], math.prod(shape[1:]))
                for index, place in enumerate(places):
                    matrix = Matrix(
                        name=f"{name}.{index}" if fused else name,
                        shape=(shape[-1], shape[-2]) if place.transposed else (shape[-2], shape[-1]),
                        block=block.index,
                        tensor=name,
                        index=index if fused else None,
                        **vars(place),
                    )
                    matrices.append(matrix)
        result.append((matrices, left_out))
    return result


def left_out(skeleton: "Skeleton", of_blocks: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Why each other tensor of two and more dimensions is not prunable: {tensor name: reason}."""
    reasons = {name: reason for own in of_blocks for name, reason in own.items()}
    inside = {name for names in skeleton.block_tensors for name in names}
    both = [embeddings_of(skeleton.model, f"get_{side}_embeddings") for side in ("input", "output")]
    embeddings = {id(module.weight) for module in both if module is not None and hasattr(module, "weight")}
    parameters = dict(skeleton.model.named_parameters(remove_duplicate=False))
    for name in skeleton.source.names:
        if name in inside:
            continue
        groups = skeleton.conversion.of([name])
        parameter = parameters.get(groups[0].target) if groups else None
        if not groups:
            reasons[name] = "not read by the model"
        elif parameter is not None and id(parameter) in embeddings:
            reasons[name] = "embedding or lm_head"
        elif len(skeleton.source.shape(name)) < 2:
            reasons[name] = "bias or norm"
        else:
            reasons[name] = "outside the blocks"
    return reasons
