"""Models of images whose blocks change their width from stage to stage: a stack for each stage, one after the other."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
import tiny
from plain_forwards import as_transformers_loads_it, block_outputs, streamed
from secateur.files.checkpoint import Checkpoint
from secateur.models.opening.opened import open_model
from secateur.record.verify import verify


@tiny.by_turns(tiny.STAGED, 0)
def test_replay_is_the_forward_with_one_block_in_memory(name: str, tmp_path: Path) -> None:
    skeleton = open_model(tiny.save(name, tmp_path / "model")).skeleton
    model, images = as_transformers_loads_it(tmp_path / "model"), tiny.pixels(3, size=32)
    assert [len(stack.blocks) for stack in skeleton.stacks] == list(model.config.depths)
    batches, paths = [images[:2], images[2:]], [block.path for block in skeleton.blocks]
    expected = [block_outputs(model, paths, batch) for batch in batches]
    for block, batch, output in streamed(skeleton, batches):
        own = expected[batch][block.index]
        assert float((output - own).norm()) <= 1e-6 * float(own.norm()), block.path


def magnitudes(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """The squared norm of each input of each linear layer in a plain forward."""
    found: dict[str, Tensor] = {}

    def add(module: nn.Module, args: tuple[Tensor], name: str) -> None:
        found[name] = args[0].flatten(0, -2).square().sum(0)

    hooks: list[Any] = [
        module.register_forward_pre_hook(partial(add, name=f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    model(batch)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", ["swin", "convnextv2"])
def test_masks_and_similarity_are_those_of_the_plain_model(name: str, tmp_path: Path) -> None:
    """Block by block: what goes into one comes through the pruned blocks before it, in all stages."""
    source, out, images = tiny.save(name, tmp_path / "model"), tmp_path / "out", tiny.pixels(4, size=32)
    manifest = secateur.prune(source, method="wanda", calibration=images, output=out, batch_size=4)
    assert verify(out, Checkpoint(source)).ok
    model, pruned = as_transformers_loads_it(source), as_transformers_loads_it(out)
    weights = dict(pruned.named_parameters())
    skeleton = open_model(source).skeleton
    assert {matrix.name for matrix in skeleton.matrices} == set(manifest.matrices)
    for block in skeleton.blocks:
        own = [matrix.parameter for matrix in skeleton.matrices if matrix.block == block.index]
        sums = magnitudes(model, images)
        for matrix in own:
            module = model.get_submodule(matrix.removesuffix(".weight"))
            score = module.weight.abs() * sums[matrix].sqrt()
            order = score.sort(dim=1, stable=True).indices[:, : score.shape[1] // 2]
            mask = torch.ones_like(score, dtype=torch.bool).scatter(1, order, False)
            assert torch.equal(weights[matrix], module.weight * mask), matrix
            module.weight.mul_(mask)
    (found,) = secateur.similarity(source, [out], images)
    last: list[Tensor] = [model(images)[0].double() for model in (as_transformers_loads_it(source), pruned)]
    last = [states.flatten(2).transpose(1, 2) if states.ndim == 4 else states for states in last]
    cosine = torch.nn.functional.cosine_similarity(last[0], last[1], dim=-1)
    assert found.cosine == pytest.approx(float(cosine.mean()), rel=1e-6)
    assert found.tokens == cosine.numel()


def test_other_ways_to_prune(tmp_path: Path) -> None:
    source, images = tiny.save("swin", tmp_path / "model"), tiny.pixels(4, size=32)
    ways: list[dict[str, Any]] = [
        {"method": "sparsegpt", "within": "site", "targets": "residual"},
        {"method": "wanda", "only": "encoder.layers.1.*"},
    ]
    for number, way in enumerate(ways):
        planned = secateur.estimate(source, calibration=images, **way)
        manifest = secateur.prune(source, calibration=images, output=tmp_path / str(number), **way)
        assert set(planned.plan) == set(manifest.matrices)
        assert {name[:16] for name in manifest.matrices} == (
            {"encoder.layers.1"} if "only" in way else {"encoder.layers.0", "encoder.layers.1"}
        )
