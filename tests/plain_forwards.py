"""What transformers computes itself: a checkpoint as it loads it, what each block returns, and a stream beside that."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.models.flow.stream import Stream
from secateur.models.shape.skeleton import Skeleton, loaded
from secateur.models.shape.structure import Block


def as_transformers_loads_it(folder: Path) -> PreTrainedModel:
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model: PreTrainedModel = getattr(transformers, name).from_pretrained(folder)
    return model.eval()


@torch.no_grad()
def block_outputs(model: nn.Module, paths: Sequence[str], *args: Any, **named: Any) -> list[Tensor]:
    """What each block returns in a plain forward."""
    found: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[path] = (output if isinstance(output, Tensor) else output[0]).clone()

        return hook

    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    model(*args, **named)
    for handle in handles:
        handle.remove()
    return [found[path] for path in paths]


@torch.no_grad()
def streamed(skeleton: Skeleton, batches: Sequence[Any]) -> Iterator[tuple[Block, int, Tensor]]:
    """The output of each block for each batch, passed on to the next block, with no more than that block in memory."""
    skeleton.load_outside(head=False)
    stream = Stream(skeleton, batches)
    skeleton.unload_outside()
    for block in skeleton.blocks:
        stream.reach(block)
        assert all(parameter.is_meta for parameter in skeleton.model.parameters())
        with loaded(skeleton, block, skeleton.read(block)):
            assert _loaded_blocks(skeleton) == [block.index]
            for batch in range(len(batches)):
                output = stream.run(block, batch)
                stream.states.put(batch, output)
                yield block, batch, output
        stream.release(block)


def _loaded_blocks(skeleton: Skeleton) -> list[int]:
    return [block.index for block in skeleton.blocks if not any(own.is_meta for own in block.module.parameters())]
