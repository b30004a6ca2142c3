"""The engine against the published loops of Wanda for classifiers of images, transcribed on their own.

Transcribed from a description of `prune_vit` and `prune_convnext` in the published folder `image_classifiers`: all
images go through one part of the model after the other, a block of the ViT or a whole stage of the ConvNeXt, with
forward hooks on every `nn.Linear`. Two things are not as in the published code for language models. What comes out of
a part, before it is pruned, goes into the next one, so all inputs are the dense model's: `propagate="dense"`. And what
is added up is the mean over the tokens of a call, where for texts it is the mean over samples: for calls of one size
both are the sum of squares times a number, which changes no mask. Nothing of Secateur is used in the transcription.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import secateur
import tiny
from plain_forwards import as_transformers_loads_it

# The published loops


class WrappedLayer:
    """The sum over calls of the mean square of each input coordinate."""

    def __init__(self, layer: nn.Linear) -> None:
        self.scaler_row = torch.zeros(layer.weight.shape[1])

    def add_batch(self, inp: Tensor) -> None:
        inp = inp.reshape(-1, inp.shape[-1])
        self.scaler_row += torch.norm(inp.t(), p=2, dim=1) ** 2 / len(inp)


def compute_mask(metric: Tensor, granularity: str, sparsity: float) -> Tensor:
    """True at the weights to remove."""
    if granularity == "layer":
        return metric <= torch.sort(metric.flatten())[0][int(metric.numel() * sparsity)]
    order = torch.sort(metric, dim=-1, stable=True)[1]
    return torch.zeros_like(metric, dtype=torch.bool).scatter_(1, order[:, : int(metric.shape[1] * sparsity)], True)


Part = tuple[str, nn.Module, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


def parts(model: PreTrainedModel) -> Iterator[Part]:
    """What is pruned at once: its path, the module, what comes before it, and its own forward."""
    body = getattr(model, "vit", model)
    if hasattr(body, "layers"):
        for index, block in enumerate(body.layers):
            path = f"{'vit.' if body is not model else ''}layers.{index}"
            yield path, block, (lambda x: x) if index else body.embeddings, block
        return
    for index, stage in enumerate(body.encoder.stages):
        before = nn.Sequential(*([] if index else [body.embeddings]), *stage.downsampling_layer)
        yield f"encoder.stages.{index}.layers", stage.layers, before, nn.Sequential(*stage.layers)


@torch.no_grad()
def published(
    model: PreTrainedModel, images: Tensor, batch: int, metric: str = "wanda", granularity: str = "row"
) -> dict[str, Tensor]:
    """Prune in place; returns the masks by the names of the weights, True at what was removed."""
    removed: dict[str, Tensor] = {}
    inputs = images
    for path, module, before, forward in parts(model):
        linears = {name: own for name, own in module.named_modules() if isinstance(own, nn.Linear)}
        wrapped = {name: WrappedLayer(linear) for name, linear in linears.items()}
        inputs = before(inputs)
        handles = [
            linear.register_forward_hook(lambda _, inp, out, into=wrapped[name]: into.add_batch(inp[0]))
            for name, linear in linears.items()
        ]
        inputs = torch.cat([forward(one) for one in inputs.split(batch)])
        for handle in handles:
            handle.remove()
        for name, linear in linears.items():
            score = linear.weight.data.abs()
            if metric == "wanda":
                score *= torch.sqrt(wrapped[name].scaler_row.reshape((1, -1)))
            removed[f"{path}.{name}.weight"] = compute_mask(score, granularity, 0.5)
            linear.weight.data[removed[f"{path}.{name}.weight"]] = 0
    return removed


# The comparison

MODELS = ["vit", "vit_classifier", "convnext"]


@tiny.pairs_by_turns("name, batch", MODELS, [256, 2])
def test_masks_are_those_of_the_published_loop(name: str, batch: int, tmp_path: Path) -> None:
    source, images = tiny.save(name, tmp_path / "model"), tiny.pixels(6, size=32 if name == "convnext" else 24)
    reference, dense = as_transformers_loads_it(source), as_transformers_loads_it(source)
    removed = published(reference, images, batch)
    manifest = secateur.prune(
        source, method="wanda", calibration=images, propagate="dense", batch_size=3, output=tmp_path / "out"
    )
    got, before = (dict(own.named_parameters()) for own in (as_transformers_loads_it(tmp_path / "out"), dense))
    assert len(removed) == len(manifest.matrices)
    for path, own in reference.named_parameters():
        assert torch.equal(got[path], own), path
        assert torch.equal(got[path] == before[path], ~removed[path] if path in removed else own == own), path


@pytest.mark.parametrize("name", ["vit", "convnext"])
def test_all_inputs_are_those_of_the_dense_model(name: str, tmp_path: Path) -> None:
    """The comparison can tell: on what pruned blocks give, as with language models, later ones come out differently."""
    source, images = tiny.save(name, tmp_path / "model"), tiny.pixels(6, size=32 if name == "convnext" else 24)
    reference = as_transformers_loads_it(source)
    removed = published(reference, images, 256)
    secateur.prune(source, method="wanda", calibration=images, output=tmp_path / "out")
    got = dict(as_transformers_loads_it(tmp_path / "out").named_parameters())
    state = reference.state_dict()
    differ = [path for path in removed if not torch.equal(got[path], state[path])]
    assert differ
    assert not [path for path in differ if path.startswith(("layers.0.", "encoder.stages.0.layers.0."))]


@tiny.pairs_by_turns("name, metric", ["vit", "convnext"], ["wanda", "magnitude"])
def test_whole_layers(name: str, metric: str, tmp_path: Path) -> None:
    """The published threshold removes what it is equal to as well: one weight more than half of a layer."""
    source, images = tiny.save(name, tmp_path / "model"), tiny.pixels(6, size=32 if name == "convnext" else 24)
    removed = published(as_transformers_loads_it(source), images, 256, metric, "layer")
    secateur.prune(source, method=metric, per="matrix", calibration=images, propagate="dense", output=tmp_path / "out")
    got = dict(as_transformers_loads_it(tmp_path / "out").named_parameters())
    for path, own in removed.items():
        zero = got[path] == 0
        assert bool(own[zero].all()), path
        assert int(own.sum()) == int(zero.sum()) + 1 == own.numel() // 2 + 1, path
