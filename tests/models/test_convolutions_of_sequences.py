"""Convolutions of sequences, as in a Conformer: pruned like matrices, on the frames of the recordings alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    ParakeetEncoder,
    ParakeetEncoderConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Wav2Vec2BertConfig,
    Wav2Vec2BertModel,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerModel,
)

import secateur
import tiny
from plain_forwards import as_transformers_loads_it
from secateur.calibration.named import named_samples
from secateur.errors import CalibrationError
from secateur.files.checkpoint import Checkpoint
from secateur.record.verify import verify

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
SOUND: dict[str, Any] = {"conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 8]}
CONFORMERS: dict[str, tuple[type[PreTrainedModel], PreTrainedConfig, str, tuple[int, ...]]] = {
    "wav2vec2-conformer": (
        Wav2Vec2ConformerModel,
        Wav2Vec2ConformerConfig(**SIZES, **SOUND, num_conv_pos_embedding_groups=4, conv_depthwise_kernel_size=5),
        "input_values",
        (400,),
    ),
    "wav2vec2-bert": (
        Wav2Vec2BertModel,
        Wav2Vec2BertConfig(**SIZES, feature_projection_input_dim=16, conv_depthwise_kernel_size=5),
        "input_features",
        (20, 16),
    ),
    "parakeet": (
        ParakeetEncoder,
        ParakeetEncoderConfig(**SIZES, subsampling_conv_channels=8, num_mel_bins=16, conv_kernel_size=5),
        "input_features",
        (64, 16),
    ),
}


def conformer(name: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    kind, config, inputs, shape = CONFORMERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config).eval(), {inputs: torch.randn(4, *shape)}


@torch.no_grad()
def masks_by_hooks(model: nn.Module, batches: list[dict[str, Tensor]], planned: list[str]) -> dict[str, Tensor]:
    """What Wanda keeps of each weight, half of every row, with all inputs those of the dense model."""
    sums: dict[str, Tensor] = {}

    def add(module: nn.Module, args: tuple[Tensor], name: str) -> None:
        x = args[0]
        if isinstance(module, nn.Conv1d):  # each weight alone, on the squares of what it multiplies
            added = torch.empty(module.weight[0].numel())
            for place in range(len(added)):
                kernel = torch.zeros_like(module.weight[:1])
                kernel.view(-1)[place] = 1
                added[place] = nn.functional.conv1d(
                    x.square(), kernel, None, module.stride, module.padding, module.dilation
                ).sum()
        else:
            added = x.reshape(-1, x.shape[-1]).square().sum(0)
        sums[name] = sums[name] + added if name in sums else added

    hooks = []
    for name in planned:
        own = model.get_submodule(name.removesuffix(".weight"))
        hooks.append(own.register_forward_pre_hook(lambda module, args, name=name: add(module, args, name)))
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()
    masks = {}
    for name in planned:
        score = model.get_parameter(name).flatten(1).abs() * sums[name].sqrt()
        order = score.sort(dim=1, stable=True).indices[:, : score.shape[1] // 2]
        masks[name] = torch.ones_like(score, dtype=torch.bool).scatter(1, order, False)
    return masks


def same(pruned: nn.Module, dense: nn.Module, masks: dict[str, Tensor]) -> None:
    for name, mask in masks.items():
        weight = dense.get_parameter(name)
        assert torch.equal(pruned.get_parameter(name), weight * mask.view_as(weight)), name


@tiny.by_turns(CONFORMERS, 1)
def test_a_conformer(name: str, tmp_path: Path) -> None:
    model, inputs = conformer(name)
    model.save_pretrained(tmp_path / "model")
    settings: dict[str, Any] = {"method": "wanda", "calibration": inputs, "propagate": "dense", "batch_size": 3}
    manifest = secateur.prune(tmp_path / "model", output=tmp_path / "out", **settings)
    assert verify(tmp_path / "out", Checkpoint(tmp_path / "model")).ok
    pointwise = [name for name in manifest.matrices if "pointwise_conv" in name]
    assert len(pointwise) == 2 * SIZES["num_hidden_layers"]
    assert {tuple(manifest.matrices[name]["shape"]) for name in pointwise} == {(64, 32), (32, 32)}
    assert {row["tensors"] for row in manifest.left_out if row["reason"] == "convolution in groups"} == {2}
    pruned, dense = (as_transformers_loads_it(tmp_path / folder) for folder in ("out", "model"))
    same(pruned, dense, masks_by_hooks(dense, [inputs], list(manifest.matrices)))


def with_wider_kernels() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A Conformer whose second convolution looks at three frames."""
    model, inputs = conformer("wav2vec2-bert")
    for layer in model.encoder.layers:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            layer.conv_module.pointwise_conv2 = nn.Conv1d(32, 32, 3, padding=1, bias=False)
    return model, inputs


def test_no_patch_holds_padding() -> None:
    """Recordings of three lengths, padded at either end: the masks of those that are cut beforehand."""
    model, inputs = with_wider_kernels()
    dense, lengths = with_wider_kernels()[0], [20, 11, 16, 11]
    features, mask = inputs["input_features"], torch.zeros(4, 20, dtype=torch.int64)
    alone = []
    for number, length in enumerate(lengths):
        start = 20 - length if number == 1 else 0
        mask[number, start : start + length] = 1
        alone.append({"input_features": features[number : number + 1, start : start + length].clone()})
    padded = {"input_features": features.where(mask.bool().unsqueeze(2), 7.0), "attention_mask": mask}
    manifest = secateur.prune(model, method="wanda", calibration=padded, propagate="dense", batch_size=2)
    entries = [entry for name, entry in manifest.matrices.items() if "pointwise_conv2" in name]
    assert [entry["shape"] for entry in entries] == [[32, 96]] * 2
    assert {entry["tokens"] for entry in manifest.matrices.values()} == {sum(lengths)}
    masked = [own | {"attention_mask": torch.ones(1, own["input_features"].shape[1])} for own in alone]
    same(model, dense, masks_by_hooks(dense, masked, list(manifest.matrices)))


def test_weights_are_fitted_to_what_the_convolution_makes() -> None:
    """SparseGPT leaves less of an error than Wanda in the very outputs of the layer."""
    dense, inputs = with_wider_kernels()
    seen: dict[str, Tensor] = {}
    layer = "encoder.layers.0.conv_module.pointwise_conv2"
    dense.get_submodule(layer).register_forward_hook(lambda module, args, out: seen.update(x=args[0], out=out))
    errors = {}
    with torch.no_grad():
        dense(**inputs)
        for method in ("wanda", "sparsegpt"):
            model = with_wider_kernels()[0]
            secateur.prune(model, method=method, calibration=inputs, only=["*pointwise_conv2*"])
            errors[method] = float((model.get_submodule(layer)(seen["x"]) - seen["out"]).norm())
    assert errors["sparsegpt"] < 0.95 * errors["wanda"]


def test_what_is_cut_of_named_inputs() -> None:
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]])
    ids = torch.arange(8).view(2, 4)
    given = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": torch.tensor([[-100, 5, -100, -100], [1, 2, 3, 4]]),
        "decoder_input_ids": ids + 10,
        "decoder_attention_mask": torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0]]),
        "pixel_values": torch.zeros(2, 4, 8, 8),
    }
    found = named_samples(given, None)
    assert found is not None
    first, second = found.each
    assert {name: value.tolist() for name, value in first.items() if name != "pixel_values"} == {
        "input_ids": [1, 2],
        "attention_mask": [1, 1],
        "labels": [5, -100],
        "decoder_input_ids": [10],
        "decoder_attention_mask": [1],
    }
    assert first["pixel_values"].shape == (4, 8, 8)
    assert second["input_ids"].tolist() == [4, 5, 6, 7]
    assert second["decoder_input_ids"].tolist() == [14, 15, 16]
    with_decoder_ids = found.for_a_decoder().each[0]
    assert with_decoder_ids["labels"].tolist() == [5, -100]
    given = {name: value for name, value in given.items() if not name.startswith("decoder")}
    without = named_samples(given, None)
    assert without is not None
    assert [own["labels"].tolist() for own in without.for_a_decoder().each] == [[5], [1, 2, 3, 4]]
    # Labels in the padding are those of a decoder.
    given["labels"][0, 3] = 5
    found = named_samples(given, None)
    assert found is not None
    assert found.each[0]["labels"].tolist() == [-100, 5, -100, 5]
    for row, what in (([1, 0, 1, 1], "padding between its tokens"), ([0, 0, 0, 0], "padding alone")):
        with pytest.raises(CalibrationError, match=f"attention_mask of sample 1 has {what}, expected tokens with"):
            named_samples({"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1], row])}, None)
    mel = {"input_features": torch.zeros(2, 3, 4), "attention_mask": mask}
    found = named_samples(mel, None)
    assert found is not None
    assert found.each[0]["attention_mask"].tolist() == [0, 1, 1, 0]
