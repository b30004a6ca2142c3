"""What the blocks of a model give, and how far that is from what others give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import secateur
import tiny
from pruned_checkpoints import NEVER_SEEN
from secateur.models.opening.opened import open_model

HALF, TWO_OF_FOUR = secateur.Unstructured(0.5), secateur.NM(2, 4)


def pruned_model(name: str, folder: Path, pattern: Any = HALF, **options: Any) -> Path:
    """A tiny architecture in `folder`/dense, pruned into `folder`/pruned."""
    tiny.save(name, folder / "dense", **options)
    matrices = open_model(folder / "dense").skeleton.matrices
    skip = list(NEVER_SEEN.get(name, []))
    if isinstance(pattern, secateur.NM):
        skip += [matrix.name for matrix in matrices if matrix.shape[1] % pattern.m]
    ids = tiny.tokens(samples=8, length=32)
    secateur.prune(
        folder / "dense", method=secateur.wanda(), pattern=pattern, calibration=ids, skip=skip, output=folder / "pruned"
    )
    return folder / "pruned"


def distance(output: Tensor, target: Tensor) -> float:
    """The mean over tokens of the squared distance, relative to the squared length of the target."""
    output, target = output.double(), target.double()
    return float(((output - target).square().sum(-1) / target.square().sum(-1)).mean())


def block_outputs(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """What each block gives in an ordinary forward of transformers."""
    outputs: list[Tensor] = []
    blocks = secateur.models.shape.structure.find_blocks(model)
    handles = [
        block.module.register_forward_hook(
            lambda module, args, output: outputs.append(output if isinstance(output, Tensor) else output[0])
        )
        for block in blocks
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return outputs
