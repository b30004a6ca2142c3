"""int8 values: what comes back is within half a step of what went in, and the zeros are the same."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import secateur
import tiny
from pruned_checkpoints import file_hashes, read_tensors
from secateur.files.checkpoint import SINGLE_FILE
from secateur.files.codes import codes_of, relative_error, values_of
from secateur.files.packed import PackedCheckpoint, stem
from secateur.models.opening.opened import open_source
from secateur.runtime.pack import pack
from secateur.runtime.unpack import unpack


def sparse(dtype: torch.dtype, shape: tuple[int, ...] = (48, 101)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) * torch.rand(
        shape[0], *[1] * (len(shape) - 1), generator=generator
    )
    weight[torch.rand(shape, generator=generator) < 0.5] = 0
    weight[1] = 0
    return weight.to(dtype)


@pytest.mark.parametrize("shape", [(48, 101), (3, 8, 21), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_codes_against_float64(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = sparse(dtype, shape) if shape != (1, 1) else torch.ones(shape, dtype=dtype)
    codes, scales = codes_of(weight)
    exact = weight.double().numpy()
    step = np.abs(exact).max(axis=-1) / 127
    np.testing.assert_allclose(scales.numpy(), step, rtol=1e-6, atol=1e-37)
    np.testing.assert_array_equal(codes.numpy() != 0, exact != 0)
    plain = np.rint(exact / np.where(step > 0, step, 1)[..., None])
    assert np.abs(codes.numpy() - np.where((plain == 0) & (exact != 0), np.sign(exact), plain)).max() <= 1
    back = values_of(codes, scales, torch.empty_like(weight))
    assert back.dtype == dtype
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 2**-22}[dtype]
    error = np.abs(back.double().numpy() - exact)
    near_zero = np.abs(exact) < step[..., None] / 2  # became one step instead of none
    bound = np.where(near_zero, step[..., None], 0.5 * step[..., None])
    assert (error <= bound * 1.001 + rounding * np.abs(exact)).all()
    expected = np.linalg.norm(back.double().numpy() - exact) / np.linalg.norm(exact)
    assert relative_error(weight, back) == pytest.approx(expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_has_no_codes(value: float) -> None:
    weight = torch.ones(4, 8, dtype=torch.float16)
    weight[2, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        codes_of(weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_smallest_numbers_of_a_dtype_stay_kept(dtype: torch.dtype) -> None:
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # subnormal
    for largest in (1, 2, 50, 500):
        weight = torch.tensor([[0.0, smallest, smallest * largest, 0.0]], dtype=torch.float64).to(dtype)
        back = values_of(*codes_of(weight), torch.empty_like(weight))
        assert torch.equal(back != 0, weight != 0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    tiny.build("llama", dtype=torch.bfloat16).save_pretrained(folder / "model")
    secateur.prune(folder / "model", method="magnitude", pattern=0.5, output=folder / "pruned")
    return folder / "pruned"


def test_a_checkpoint_with_int8_values(checkpoint: Path, tmp_path: Path) -> None:
    result = pack(checkpoint, tmp_path / "packed", values="int8")
    assert result.bits == pytest.approx(1 + 4 + 32 / 32, rel=0.05)  # rows here are only 32 or 48 long
    assert result.same == {}
    stored = load_file(tmp_path / "packed" / "sparse-00001-of-00001.safetensors")
    packed = PackedCheckpoint(tmp_path / "packed")
    for name, tensor in read_tensors(checkpoint).items():
        found = packed.read([name])[name]
        if name not in result.errors:
            assert torch.equal(found, tensor)
            continue
        assert stored[f"{stem(name)}.compressed"].dtype == torch.int8
        assert torch.equal(found != 0, tensor != 0)
        assert result.errors[name] == pytest.approx(
            float((found.double() - tensor.double()).norm() / tensor.double().norm())
        )
        assert 0 < result.errors[name] < 0.01
    # Its manifest is that of what it stands for, and so it is proved like any other.
    for source in (None, str(checkpoint), str(checkpoint.with_name("model"))):
        verified = secateur.verify(tmp_path / "packed", None if source is None else open_source(source))
        assert verified.ok, verified.problems
    assert verified.sparsity == pytest.approx(0.5, abs=0.01)
    again = unpack(tmp_path / "packed", tmp_path / "plain")
    assert again.rounded == result.matrices == 21
    assert secateur.verify(tmp_path / "plain").ok
    ids = tiny.tokens(samples=4, length=16)
    assert (
        secateur.perplexity(tmp_path / "plain", ids).perplexity
        == secateur.perplexity(tmp_path / "packed", ids).perplexity
    )
    # What was rounded once is not rounded again.
    pack(tmp_path / "plain", tmp_path / "again", values="int8")
    unpack(tmp_path / "again", tmp_path / "twice")
    assert file_hashes(tmp_path / "twice")[SINGLE_FILE] == file_hashes(tmp_path / "plain")[SINGLE_FILE]


def test_a_matrix_without_codes_keeps_its_values_and_says_so(tmp_path: Path) -> None:
    weights = {"good.weight": sparse(torch.bfloat16), "infinite.weight": sparse(torch.bfloat16)}
    weights["infinite.weight"][0, 0] = float("inf")
    weights["whole.weight"] = (torch.arange(32 * 64).view(32, 64) % 2).int()
    (tmp_path / "plain").mkdir()
    save_file(weights, tmp_path / "plain" / SINGLE_FILE)
    result = pack(tmp_path / "plain", tmp_path / "packed", values="int8")
    assert result.same == {"infinite.weight": "it has values that are not finite", "whole.weight": "it is int32"}
    packed = PackedCheckpoint(tmp_path / "packed")
    for name in result.same:
        assert torch.equal(packed.read([name])[name], weights[name])
    assert secateur.verify(tmp_path / "packed").ok


def test_a_tensor_without_zeros_is_not_rounded(tmp_path: Path) -> None:
    weights = {"embeddings": torch.randn(64, 64), "pruned.weight": sparse(torch.float32)}
    weights["embeddings"][0] = 0  # as the row of a padding token
    (tmp_path / "plain").mkdir()
    save_file(weights, tmp_path / "plain" / SINGLE_FILE)
    result = pack(tmp_path / "plain", tmp_path / "packed", values="int8")
    assert result.dense == {"embeddings": "1.6% zeros: it would not shrink"}
