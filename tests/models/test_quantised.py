"""Quantised checkpoints: dequantised as their own libraries do it, used by every command, or refused by name."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import tiny
from secateur.collect.gradient_pass import gradients
from secateur.core.patterns import Unstructured
from secateur.errors import CheckpointError
from secateur.evaluate.perplexity import perplexity
from secateur.files.checkpoint import SINGLE_FILE, Checkpoint
from secateur.files.digest import model_digest
from secateur.methods.magnitude import magnitude
from secateur.methods.wanda import wanda
from secateur.models.opening.opened import open_model, open_source
from secateur.models.opening.whole import WholeModel
from secateur.models.weights.packing import block_sizes
from secateur.models.weights.quantised import DequantisedCheckpoint, open_checkpoint
from secateur.pruning.engine import prune
from secateur.record.card import write_card
from secateur.record.manifest import read_manifest
from secateur.record.verify import verify
from secateur.report.inspect import inspect

FP8 = torch.float8_e4m3fn
PROJECTION = "model.layers.0.mlp.down_proj.weight"


def quantise(weight: Tensor, scale: Tensor, blocks: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Codes for a weight whose blocks have these scales, written out with Kronecker products."""
    spread = torch.kron(scale, torch.ones(blocks))[: weight.shape[0], : weight.shape[1]]
    value = weight / spread
    return value.round().clamp(-127, 127).to(dtype) if dtype == torch.int8 else value.to(dtype)


def expected(codes: Tensor, scale: Tensor, blocks: tuple[int, int]) -> Tensor:
    spread = torch.kron(scale.float(), torch.ones(blocks))[: codes.shape[0], : codes.shape[1]]
    return (codes.float() * spread).to(torch.bfloat16)


def packed_model(
    folder: Path,
    *,
    dtype: torch.dtype = FP8,
    blocks: tuple[int, int] | str = "tensor",
    ending: str = "_scale",
    config: dict[str, Any] | None = None,
    extra: bool = False,
) -> dict[str, Tensor]:
    """A tiny LLaMA in a folder, its projections quantised; returns the plain tensors that it stands for."""
    tiny.build("llama", dtype=torch.bfloat16).save_pretrained(folder)
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, weight in load_file(folder / SINGLE_FILE).items():
        stored[name] = plain[name] = weight
        if "proj" not in name:
            continue
        rows, columns = weight.shape
        sides = {"tensor": (rows, columns), "channel": (1, columns)}.get(str(blocks), blocks)
        assert isinstance(sides, tuple)
        scale = torch.rand(-(-rows // sides[0]), -(-columns // sides[1])) * 1e-2 + 1e-3
        stored[name] = quantise(weight.float(), scale, sides, dtype)
        plain[name] = expected(stored[name], scale, sides)
        stored[name + ending] = scale.reshape(()) if blocks == "tensor" else scale
        if extra:
            stored[name.replace("weight", "input_scale")] = torch.ones(())
            stored[f"{'.'.join(name.split('.')[:3])}.self_attn.k_scale"] = torch.ones(())
    save_file(stored, folder / SINGLE_FILE, {"format": "pt"})
    if config is not None:
        described = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**described, "quantization_config": config}))
    return plain


COMPRESSED = {"quant_method": "compressed-tensors", "quantization_status": "compressed"}
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "DeepSeek": (
        {
            "blocks": (20, 20),
            "ending": "_scale_inv",
            "config": {"quant_method": "fp8", "weight_block_size": [20, 20], "fmt": "e4m3"},
        },
        "FP8 with block scales of 20 x 20",
    ),
    "ModelOpt": ({"extra": True}, "FP8 with one scale each"),
    "channels of FP8": (
        {"blocks": "channel", "config": {**COMPRESSED, "format": "float-quantized"}},
        "FP8 with a scale per row",
    ),
    "channels of int8": (
        {"dtype": torch.int8, "blocks": "channel", "config": {**COMPRESSED, "format": "int-quantized"}},
        "int8 with a scale per row",
    ),
    "int8": ({"dtype": torch.int8, "config": {**COMPRESSED, "format": "naive-quantized"}}, "int8 with one scale each"),
    "groups of int8": (
        {"dtype": torch.int8, "blocks": (1, 16), "config": {**COMPRESSED, "format": "int-quantized"}},
        "int8 with block scales of 1 x 16",
    ),
    "e5m2": ({"dtype": torch.float8_e5m2, "config": {"quant_method": "fp8"}}, "FP8 with one scale each"),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Tensor], str]:
    """(folder, the tensors that it stands for, the format in words)"""
    settings, words = KINDS[request.param]
    plain = packed_model(tmp_path / "packed", **settings)
    if request.param == "ModelOpt":
        described = {
            "producer": {"name": "modelopt"},
            "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
        }
        (tmp_path / "packed" / "hf_quant_config.json").write_text(json.dumps(described))
    return tmp_path / "packed", plain, words


def test_reads_what_the_codes_and_scales_stand_for(kind: tuple[Path, dict[str, Tensor], str]) -> None:
    folder, plain, words = kind
    source = open_checkpoint(folder)
    assert isinstance(source, DequantisedCheckpoint)
    assert set(source.names) == set(plain)
    for name, value in plain.items():
        read = source.read([name])[name]
        assert (source.shape(name), source.dtype(name)) == (tuple(value.shape), torch.bfloat16)
        assert torch.equal(read, value), name
    described = [tensor for _, tensors in source.layout() for tensor in tensors]
    assert sorted(described) == sorted((name, torch.bfloat16, tuple(value.shape)) for name, value in plain.items())
    assert source.origin["formats"] == {words: sum("proj" in name for name in plain)}


def test_every_command_sees_the_plain_model(kind: tuple[Path, dict[str, Tensor], str], tmp_path: Path) -> None:
    folder, plain, words = kind
    dense = tmp_path / "plain"
    tiny.build("llama", dtype=torch.bfloat16).save_pretrained(dense)
    save_file(plain, dense / SINGLE_FILE, {"format": "pt"})
    tokens = tiny.tokens()
    assert perplexity(folder, tokens).nats == perplexity(dense, tokens).nats
    with WholeModel(folder) as whole, WholeModel(dense) as whole_dense, torch.no_grad():
        assert torch.equal(whole.module(tokens).logits, whole_dense.module(tokens).logits)
    assert [row.zeros for row in inspect(folder).matrices] == [row.zeros for row in inspect(dense).matrices]

    for one, out in ((folder, "from_packed"), (dense, "from_plain")):
        prune(one, method=wanda(), pattern=Unstructured(0.5), calibration=tokens, output=tmp_path / out)
    ours, theirs = load_file(tmp_path / "from_packed" / SINGLE_FILE), load_file(tmp_path / "from_plain" / SINGLE_FILE)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}

    config = json.loads((tmp_path / "from_packed" / "config.json").read_text())
    assert config == json.loads((dense / "config.json").read_text())
    assert not (tmp_path / "from_packed" / "hf_quant_config.json").exists()
    manifest = read_manifest(tmp_path / "from_packed")
    assert manifest.source["dequantised"]["formats"] == {words: 21}
    assert "dequantised" not in read_manifest(tmp_path / "from_plain").source
    for source in (folder, dense):
        checked = verify(tmp_path / "from_packed", open_source(str(source)))
        assert checked.ok, checked.problems
    assert not verify(tmp_path / "from_packed", Checkpoint(folder)).ok
    write_card(tmp_path / "from_packed", manifest, "x")
    card = (tmp_path / "from_packed" / "README.md").read_text()
    assert "with its quantised weights dequantised to bfloat16." in card
    assert "byte for byte" not in card


def test_gradients_are_those_of_the_plain_model(tmp_path: Path) -> None:
    plain = packed_model(tmp_path / "packed")
    tiny.build("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "plain")
    save_file(plain, tmp_path / "plain" / SINGLE_FILE, {"format": "pt"})
    for name in ("packed", "plain"):
        gradients(tmp_path / name, output=tmp_path / f"{name}.safetensors", calibration=tiny.tokens())
    one, other = load_file(tmp_path / "packed.safetensors"), load_file(tmp_path / "plain.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_what_becomes_of_the_weights_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    packed_model(tmp_path / "packed", extra=True)
    with caplog.at_level(logging.WARNING, "secateur"):
        for _ in range(2):
            open_model(tmp_path / "packed")
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'packed'}: 21 weights are stored as FP8 with one scale each; they are dequantised to bfloat16 as "
        "they are read, and what is written is bfloat16. 24 scales of activations are left out."
    ]


def test_a_configuration_inside_another(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    packed_model(folder, blocks=(20, 20), ending="_scale_inv")
    config = json.loads((folder / "config.json").read_text())
    config["inner_config"] = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [20, 20]}}
    (folder / "config.json").write_text(json.dumps(config))
    prune(folder, method=magnitude(), output=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["inner_config"] == {}


def test_as_transformers_dequantises_fp8(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    folder = tmp_path / "model"
    packed_model(folder, blocks=(16, 8), ending="_scale_inv")
    stored, source = load_file(folder / SINGLE_FILE), open_checkpoint(folder)
    for name, codes in stored.items():
        if "proj" in name and codes.dtype == FP8:
            theirs = Fp8Dequantize(None)._dequantize_one(codes, stored[f"{name}_scale_inv"], torch.bfloat16)
            assert torch.equal(source.read([name])[name], theirs)


@pytest.mark.parametrize("zeros", [False, True])
def test_as_compressed_tensors_dequantises_int8(zeros: bool, tmp_path: Path) -> None:
    theirs_all = pytest.importorskip("compressed_tensors.quantization")
    args = theirs_all.QuantizationArgs(num_bits=8, strategy="channel", symmetric=not zeros)
    folder = tmp_path / "model"
    packed_model(folder, dtype=torch.int8, blocks="channel", config={**COMPRESSED, "format": "int-quantized"})
    stored = load_file(folder / SINGLE_FILE)
    names = [name for name in stored if f"{name}_scale" in stored]
    if zeros:
        for name in names:
            stored[f"{name}_zero_point"] = torch.randint(-9, 9, stored[f"{name}_scale"].shape, dtype=torch.int8)
        save_file(stored, folder / SINGLE_FILE, {"format": "pt"})
    source = open_checkpoint(folder)
    assert len(source.names) == len(stored) - (1 + zeros) * len(names)
    for name in names:
        theirs = theirs_all.dequantize(stored[name], stored[f"{name}_scale"], stored.get(f"{name}_zero_point"), args)
        assert torch.equal(source.read([name])[name], theirs.to(torch.bfloat16))


def test_zero_points(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    packed_model(folder, dtype=torch.int8, blocks="channel", config={**COMPRESSED, "format": "int-quantized"})
    stored = load_file(folder / SINGLE_FILE)
    scale = stored[f"{PROJECTION}_scale"]
    points = stored[f"{PROJECTION}_zero_point"] = torch.randint(-9, 9, scale.shape, dtype=torch.int8)
    save_file(stored, folder / SINGLE_FILE, {"format": "pt"})
    found = open_checkpoint(folder).read([PROJECTION])[PROJECTION]
    assert torch.equal(found, ((stored[PROJECTION].float() - points.float()) * scale).to(torch.bfloat16))


def test_exponents_as_scales(tmp_path: Path) -> None:
    """UE8M0, as bytes: scales that are powers of two."""
    folder = tmp_path / "model"
    packed_model(folder, blocks=(16, 16), ending="_scale_inv")
    stored = load_file(folder / SINGLE_FILE)
    for name in [name for name in stored if name.endswith("_scale_inv")]:
        stored[name] = torch.randint(110, 130, stored[name].shape, dtype=torch.uint8)
    save_file(stored, folder / SINGLE_FILE, {"format": "pt"})
    scale = torch.exp2(stored[f"{PROJECTION}_scale_inv"].float() - 127)
    found = open_checkpoint(folder).read([PROJECTION])[PROJECTION]
    assert torch.equal(found, expected(stored[PROJECTION], scale, (16, 16)))


def mxfp4_model(folder: Path) -> dict[str, Tensor]:
    """A tiny GPT-OSS whose experts are stored as MXFP4; returns the plain tensors by transformers' own dequantiser."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    config = tiny.ARCHITECTURES["gpt_oss"]()
    config.intermediate_size = 64
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    stored, plain = {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, weight in load_file(folder / SINGLE_FILE).items():
        plain[name] = stored[name] = weight
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, width, rows = weight.shape
            del stored[name]
            codes = torch.randint(0, 256, (experts, rows, width // 32, 16), dtype=torch.uint8, generator=generator)
            scales = torch.randint(118, 126, (experts, rows, width // 32), dtype=torch.uint8, generator=generator)
            stored[f"{name}_blocks"], stored[f"{name}_scales"] = codes, scales
            plain[name] = convert_moe_packed_tensors(codes, scales)
    save_file(stored, folder / SINGLE_FILE, {"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(described))
    return plain


def test_mxfp4_experts(tmp_path: Path) -> None:
    plain = mxfp4_model(tmp_path / "model")
    source = open_checkpoint(tmp_path / "model")
    assert isinstance(source, DequantisedCheckpoint)
    assert source.origin["formats"] == {"MXFP4": 6}
    assert set(source.names) == set(plain)
    for name, value in plain.items():
        assert source.shape(name) == tuple(value.shape)
        assert torch.equal(source.read([name])[name], value), name
    prune(tmp_path / "model", method=wanda(), calibration=tiny.tokens(8, 32), output=tmp_path / "out")
    assert verify(tmp_path / "out", open_source(str(tmp_path / "model"))).ok
    pruned = load_file(tmp_path / "out" / SINGLE_FILE)
    assert {name: tensor.shape for name, tensor in pruned.items()} == {
        name: value.shape for name, value in plain.items()
    }


def test_every_code_of_mxfp4(tmp_path: Path) -> None:
    """All 256 bytes with all exponents but the one that is no number."""
    from secateur.models.weights.packing import unpacked_mxfp4

    codes = torch.arange(256, dtype=torch.uint8).repeat(255).view(1, 255, 16, 16)
    scales = torch.arange(255, dtype=torch.uint8).view(1, 255, 1).repeat(1, 1, 16)
    found = unpacked_mxfp4(codes, scales, torch.empty(1, 512, 255, dtype=torch.bfloat16))
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    table = torch.tensor([*values, *(-value for value in values)], dtype=torch.float64)
    halves = torch.stack((torch.arange(256) % 16, torch.arange(256) // 16), dim=1).flatten()
    exact = table[halves].unsqueeze(1) * torch.exp2(torch.arange(255, dtype=torch.float64) - 127)
    assert torch.equal(found[0].double(), exact.to(torch.bfloat16).double())


@pytest.mark.parametrize(
    ("shape", "scales", "configured", "found"),
    [
        ((576, 7168), (5, 56), [(128, 128)], (128, 128)),
        ((576, 7168), (5, 56), [], (128, 128)),
        ((192, 256), (2, 2), [], (128, 128)),
        ((192, 250), (2, 25), [], None),
        ((192, 256), (2, 1), [], (128, 256)),
        ((192, 256), (2, 2), [(96, 128)], (96, 128)),
        ((48, 32), (1, 1), [], (48, 32)),
        ((48, 32), (48, 1), [(128, 128)], (1, 32)),
        ((48, 32), (7, 1), [], None),
        ((4, 48, 32), (4, 1, 1), [], (1, 48, 32)),
        ((4, 48, 32), (4, 3, 2), [(16, 16)], (1, 16, 16)),
        ((4, 48, 32), (4, 1, 32), [], (1, 48, 1)),
    ],
)
def test_sizes_of_blocks(shape: Any, scales: Any, configured: Any, found: Any) -> None:
    assert block_sizes(shape, scales, configured) == found


def test_scales_that_do_not_fit(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    packed_model(folder, blocks=(7, 7), ending="_scale_inv")
    with pytest.raises(CheckpointError) as caught:
        perplexity(folder, tiny.tokens())
    assert "is of shape (" in str(caught.value)
    assert "which does not say which weights share a scale. Is weight_block_size missing in config.json?" in str(
        caught.value
    )


FOREIGN: dict[str, tuple[dict[str, Tensor], str]] = {
    "GPTQ": ({"qweight": torch.ones(4, 32, dtype=torch.int32), "scales": torch.ones(1, 32)}, "GPTQ or AWQ"),
    "bitsandbytes": ({"weight": torch.ones(768, 1, dtype=torch.uint8), "weight.absmax": torch.ones(24)}, "4 bits"),
    "LLM.int8": ({"weight": torch.ones(32, 48, dtype=torch.int8), "SCB": torch.ones(32)}, "bitsandbytes, 8 bits"),
    "int4": ({"weight_packed": torch.ones(32, 6, dtype=torch.int32), "weight_scale": torch.ones(32, 1)}, "4-bit"),
    "NVFP4": (
        {
            "weight": torch.ones(32, 24, dtype=torch.uint8),
            "weight_scale": torch.ones(32, 3).to(FP8),
            "weight_scale_2": torch.ones(()),
        },
        "NVFP4",
    ),
    "FP8 alone": ({"weight": torch.ones(32, 48).to(FP8)}, "torch.float8_e4m3fn without scales that belong to it"),
    "a scale too many": ({"weight": torch.ones(32, 48), "weight_scale": torch.ones(())}, "a scale that nothing uses"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_formats_are_refused_by_name(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny.save("llama", folder)
    tensors = load_file(folder / SINGLE_FILE)
    del tensors[PROJECTION]
    parts, words = FOREIGN[name]
    tensors |= {PROJECTION.replace("weight", part): value for part, value in parts.items()}
    save_file(tensors, folder / SINGLE_FILE, {"format": "pt"})
    for run in (
        lambda: perplexity(folder, tiny.tokens()),
        lambda: prune(folder, method=magnitude(), output=tmp_path / "out"),
        lambda: inspect(folder),
        lambda: WholeModel(folder).module,
    ):
        with pytest.raises(CheckpointError) as caught:
            run()
        assert str(caught.value).startswith(f"{folder}: the weights are quantised (")
        assert words in str(caught.value)
        assert PROJECTION.removesuffix("weight") in str(caught.value)
        assert "model.dequantize()" in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {**COMPRESSED, "format": "pack-quantized"},
        {**COMPRESSED, "format": "float-quantized", "transform_config": {"config_groups": {"R1": {}}}},
        {**COMPRESSED, "format": "float-quantized", "sparsity_config": {"format": "sparse-24-bitmask"}},
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        {"quant_method": "hqq"},
        {"bits": 4},
    ],
    ids=str,
)
def test_formats_that_a_configuration_announces(config: dict[str, Any], tmp_path: Path) -> None:
    packed_model(tmp_path / "model", config=config)
    with pytest.raises(CheckpointError, match="in a format that Secateur does not dequantise"):
        open_model(tmp_path / "model")


def test_a_configuration_about_sparsity_alone(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] = {**COMPRESSED, "format": "dense", "sparsity_config": {"format": "dense"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert isinstance(open_checkpoint(tmp_path / "model"), Checkpoint)
    prune(tmp_path / "model", method=magnitude(), output=tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_the_digest_of_a_model_counts_its_scales(tmp_path: Path) -> None:
    packed_model(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "other")
    stored = load_file(tmp_path / "other" / SINGLE_FILE)
    stored[f"{PROJECTION}_scale"] *= 2
    save_file(stored, tmp_path / "other" / SINGLE_FILE, {"format": "pt"})
    assert model_digest(tmp_path / "model") != model_digest(tmp_path / "other")
