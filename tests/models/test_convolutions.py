"""Convolutions are matrices that multiply patches: pruned by the formulas of matrices, verified, packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BitConfig,
    BitModel,
    EfficientNetConfig,
    EfficientNetModel,
    LevitConfig,
    LevitModel,
    MobileNetV1Config,
    MobileNetV1Model,
    MobileNetV2Config,
    MobileNetV2Model,
    PoolFormerConfig,
    PoolFormerModel,
    PreTrainedConfig,
    PreTrainedModel,
    RegNetConfig,
    RegNetModel,
    ResNetConfig,
    ResNetForImageClassification,
)

import secateur
import tiny
from plain_forwards import as_transformers_loads_it, block_outputs, streamed
from secateur.errors import ModelStructureError, PatternError
from secateur.files.checkpoint import Checkpoint
from secateur.models.flow.backward import GradientTap
from secateur.models.flow.tap import InputRecorder
from secateur.models.opening.opened import open_model
from secateur.record.verify import verify

LAYERS: dict[str, dict[str, Any]] = {
    "1x1": {"kernel_size": 1},
    "3x3": {"kernel_size": 3, "padding": 1},
    "patches": {"kernel_size": 4, "stride": 4},
    "strided": {"kernel_size": 1, "stride": 2},
    "oblong": {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)},
    "same": {"kernel_size": (3, 5), "padding": "same", "dilation": (1, 2)},
    "valid": {"kernel_size": 2, "padding": "valid"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
}

OF_SEQUENCES: dict[str, dict[str, Any]] = {
    "1": {"kernel_size": 1},
    "3": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 4, "stride": 3},
    "dilated": {"kernel_size": (3,), "stride": (2,), "padding": (4,), "dilation": (3,)},
    "same": {"kernel_size": 5, "padding": "same", "dilation": 2},
    "valid": {"kernel_size": 2, "padding": "valid"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["rows", "channels_last"])
@pytest.mark.parametrize("name", LAYERS)
def test_patches_times_the_matrix_is_the_convolution(name: str, layout: torch.memory_format) -> None:
    layer = nn.Conv2d(5, 7, **LAYERS[name]).double()
    images = torch.randn(2, 5, 12, 10, dtype=torch.float64).to(memory_format=layout)
    expected = layer(images)
    with torch.no_grad(), InputRecorder({"weight": (layer.weight.flatten(1), False)}) as tap:
        assert torch.equal(layer(images), expected)
    (patches,) = tap.inputs["weight", None]
    rows = patches @ layer.weight.flatten(1).t() + layer.bias
    torch.testing.assert_close(rows, expected.flatten(2).transpose(1, 2).flatten(0, 1))


@pytest.mark.parametrize("alone", [False, True], ids=["batch", "alone"])
@pytest.mark.parametrize("name", OF_SEQUENCES)
def test_patches_of_sequences(name: str, alone: bool) -> None:
    layer = nn.Conv1d(5, 7, **OF_SEQUENCES[name]).double()
    samples = torch.randn(5, 12, dtype=torch.float64) if alone else torch.randn(2, 5, 12, dtype=torch.float64)
    expected = layer(samples)
    with torch.no_grad(), InputRecorder({"weight": (layer.weight.flatten(1), False)}) as tap:
        assert torch.equal(layer(samples), expected)
    (patches,) = tap.inputs["weight", None]
    rows = patches @ layer.weight.flatten(1).t() + layer.bias
    torch.testing.assert_close(rows, expected.transpose(-1, -2).reshape(-1, 7))


@pytest.mark.parametrize(
    ("kind", "name"),
    [*((nn.Conv2d, name) for name in LAYERS), *((nn.Conv1d, name) for name in OF_SEQUENCES)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_gradients_are_those_of_autograd(kind: Any, name: str) -> None:
    layer = kind(5, 7, **(LAYERS if kind is nn.Conv2d else OF_SEQUENCES)[name]).double()
    images = torch.randn(3, 5, *((12, 10) if kind is nn.Conv2d else (12,)), dtype=torch.float64)
    expected = torch.zeros_like(layer.weight)
    for image in images:
        (own,) = torch.autograd.grad(layer(image.unsqueeze(0)).square().sum(), layer.weight)
        expected += own.abs()
    with GradientTap({"weight": (layer.weight.flatten(1), False)}, ["l1"]) as tap:
        tap.begin(3, 1)
        made = layer(images)
    made.square().sum().backward()
    tap.end()
    torch.testing.assert_close(tap.totals()["weight", "l1"], expected.flatten(1))


def squared_inputs(layer: nn.Conv2d, images: Tensor) -> Tensor:
    """The squared norm of what each weight of a kernel multiplies: a kernel that is one there and zero elsewhere."""
    sums = torch.empty(layer.weight[0].numel())
    for place in range(len(sums)):
        kernel = torch.zeros_like(layer.weight[:1])
        kernel.view(-1)[place] = 1
        found = nn.functional.conv2d(images.square(), kernel, None, layer.stride, layer.padding, layer.dilation)
        sums[place] = found.sum()
    return sums


@torch.no_grad()
@pytest.mark.parametrize("name", ["pvt", "pvt_v2"])
def test_masks_are_those_of_wanda_on_patches(name: str, tmp_path: Path) -> None:
    """Of the convolutions of the first block, whose inputs no other pruned block has changed."""
    source, out, images = tiny.save(name, tmp_path / "model"), tmp_path / "out", tiny.pixels(4, size=32)
    manifest = secateur.prune(source, method="wanda", pattern="2:4", calibration=images, output=out, batch_size=2)
    assert verify(out, Checkpoint(source)).ok
    model, pruned = as_transformers_loads_it(source), as_transformers_loads_it(out)
    found: dict[str, Tensor] = {}
    convolutions = {f"{path}.weight": own for path, own in model.named_modules() if isinstance(own, nn.Conv2d)}
    planned = [path for path in convolutions if path in manifest.matrices]
    assert planned
    assert all(own.groups > 1 or "embed" in path for path, own in convolutions.items() if path not in planned)

    def keep(module: nn.Module, args: tuple[Tensor], path: str) -> None:
        found[path] = args[0]

    for path in planned:
        convolutions[path].register_forward_pre_hook(lambda module, args, path=path: keep(module, args, path))
    model(images)
    first = planned[0]
    layer, weights = convolutions[first], dict(pruned.named_parameters())
    score = layer.weight.flatten(1).abs() * squared_inputs(layer, found[first]).sqrt()
    order = score.unflatten(1, (-1, 4)).sort(dim=2, stable=True).indices[..., :2]
    mask = torch.ones(order.shape[0], order.shape[1], 4, dtype=torch.bool).scatter(2, order, False).flatten(1)
    assert torch.equal(weights[first].flatten(1), layer.weight.flatten(1) * mask)
    assert weights[first].shape == layer.weight.shape
    for path in planned:
        zeros = weights[path].flatten(1).unflatten(1, (-1, 4)) == 0
        assert bool((zeros.sum(2) >= 2).all())
        assert manifest.matrices[path]["shape"] == [len(weights[path]), weights[path][0].numel()]


def test_weights_are_fitted_to_what_the_convolution_makes(tmp_path: Path) -> None:
    """SparseGPT leaves less of an error than Wanda in the very outputs of the layer."""
    source, images = tiny.save("pvt", tmp_path / "model"), tiny.pixels(8, size=32)
    name = "encoder.block.0.0.attention.self.sequence_reduction"
    for method in ("wanda", "sparsegpt"):
        secateur.prune(
            source, method=method, calibration=images, output=tmp_path / method, only=["*sequence_reduction*"]
        )
    seen: dict[str, Tensor] = {}
    model = as_transformers_loads_it(source)
    model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.update(x=args[0], out=output))
    with torch.no_grad():
        model(images)
        errors = {
            method: float(
                (as_transformers_loads_it(tmp_path / method).get_submodule(name)(seen["x"]) - seen["out"]).norm()
            )
            for method in ("wanda", "sparsegpt")
        }
    assert errors["sparsegpt"] < 0.95 * errors["wanda"]


def test_packed_and_back(tmp_path: Path) -> None:
    source, images = tiny.save("segformer", tmp_path / "model"), tiny.pixels(4, size=32)
    secateur.prune(source, method="magnitude", pattern=0.6, output=tmp_path / "out")
    secateur.pack(tmp_path / "out", output=tmp_path / "packed")
    secateur.unpack(tmp_path / "packed", output=tmp_path / "plain")
    before, after = Checkpoint(tmp_path / "out"), Checkpoint(tmp_path / "plain")
    for name in before.names:
        assert torch.equal(before.read([name])[name], after.read([name])[name])
    loaded = secateur.load(tmp_path / "packed").eval()
    with torch.no_grad():
        expected = as_transformers_loads_it(tmp_path / "out")(images)[0]
        torch.testing.assert_close(loaded(images)[0], expected)


OF_CONVOLUTIONS: dict[str, tuple[type[PreTrainedModel], PreTrainedConfig]] = {
    "resnet": (
        ResNetForImageClassification,
        ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic"),
    ),
    "regnet": (
        RegNetModel,
        RegNetConfig(embedding_size=8, hidden_sizes=[16, 32, 32], depths=[1, 2, 1], groups_width=8),
    ),
    "mobilenet_v2": (MobileNetV2Model, MobileNetV2Config(image_size=32, depth_multiplier=0.25)),
    "mobilenet_v1": (MobileNetV1Model, MobileNetV1Config(image_size=32, depth_multiplier=0.25)),
    "efficientnet": (
        EfficientNetModel,
        EfficientNetConfig(image_size=32, width_coefficient=0.5, depth_coefficient=0.5, hidden_dim=640),
    ),
    "poolformer": (PoolFormerModel, PoolFormerConfig(hidden_sizes=[8, 16, 16, 16], depths=[1, 2, 1, 1])),
    "levit": (
        LevitModel,
        LevitConfig(
            image_size=64, hidden_sizes=[16, 32, 32], depths=[1] * 3, num_attention_heads=[2] * 3, key_dim=[8] * 3
        ),
    ),
}


@tiny.by_turns(OF_CONVOLUTIONS, 0)
def test_models_of_convolutions(name: str, tmp_path: Path) -> None:
    """Their replay is their own forward, with one block in memory, and what is pruned is verified."""
    kind, config = OF_CONVOLUTIONS[name]
    torch.manual_seed(0)
    model = kind(config).eval()
    for key, value in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in key or key.endswith("running_var"):  # nothing is left of an image where all norms are new
            value.data.copy_(torch.rand(value.shape) + 0.5)
    model.save_pretrained(tmp_path / "model")
    images = tiny.pixels(3, size=64)
    batches, skeleton = [images[:2], images[2:]], open_model(tmp_path / "model").skeleton
    plain = as_transformers_loads_it(tmp_path / "model")
    expected = [block_outputs(plain, [block.path for block in skeleton.blocks], batch) for batch in batches]
    for block, batch, output in streamed(skeleton, batches):
        own = expected[batch][block.index]
        assert float((output - own).norm()) <= 1e-6 * float(own.norm()), block.path
    manifest = secateur.prune(tmp_path / "model", method="wanda", calibration=images, output=tmp_path / "out")
    assert verify(tmp_path / "out", Checkpoint(tmp_path / "model")).ok
    assert all(0.4 < entry["sparsity"] <= 0.5 for entry in manifest.matrices.values())
    (found,) = secateur.similarity(tmp_path / "model", [tmp_path / "out"], images)
    pruned = as_transformers_loads_it(tmp_path / "out")
    with torch.no_grad():
        last = [getattr(own, "resnet", own)(images)[0].double() for own in (plain, pruned)]
    last = [own.flatten(2).transpose(1, 2) if own.ndim == 4 else own for own in last]
    cosine = nn.functional.cosine_similarity(*last, dim=-1)
    assert found.cosine == pytest.approx(float(cosine.mean()), rel=1e-6)


@pytest.mark.parametrize("name", OF_CONVOLUTIONS)
def test_widths_are_those_of_what_goes_into_the_first_block(name: str) -> None:
    """Estimates count hidden states by them."""
    kind, config = OF_CONVOLUTIONS[name]
    model, widths = kind(config).eval(), []
    skeleton = open_model(model).skeleton

    def keep(module: nn.Module, args: tuple[Tensor]) -> None:
        widths.append(args[0].shape[1 if args[0].ndim == 4 else 2])

    model.get_submodule(skeleton.blocks[0].path).register_forward_pre_hook(keep)
    with torch.no_grad():
        model(tiny.pixels(1, size=64))
    assert widths == [skeleton.hidden_size]


def test_targets_that_are_those_of_tokens(tmp_path: Path) -> None:
    """A spatial reduction in a block of tokens is no writer to them; where all adds to maps there is none."""
    how: dict[str, Any] = {"method": "sparsegpt", "within": "site", "targets": "residual"}
    source = tiny.save("pvt", tmp_path / "pvt")
    secateur.prune(source, calibration=tiny.pixels(4, size=32), output=tmp_path / "out", **how)
    assert verify(tmp_path / "out", Checkpoint(source)).ok
    kind, config = OF_CONVOLUTIONS["resnet"]
    kind(config).save_pretrained(tmp_path / "resnet")
    with pytest.raises(ModelStructureError, match=r"--targets residual: no matrix of resnet\.encoder"):
        secateur.prune(tmp_path / "resnet", calibration=tiny.pixels(4, size=64), output=tmp_path / "none", **how)


def test_a_model_without_any_matrix(tmp_path: Path) -> None:
    """BiT standardises its weights before they multiply."""
    config = BitConfig(embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], num_groups=8)
    BitModel(config).save_pretrained(tmp_path / "bit")
    with pytest.raises(PatternError, match="nothing is left to prune"):
        secateur.prune(tmp_path / "bit", method="magnitude", output=tmp_path / "out")
