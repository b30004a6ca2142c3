"""The sparse formats of compressed-tensors: files that its release 0.14.0.1 wrote, and files built from the layout.

`written_by_compressed_tensors/FORMAT/` is what its ModelCompressor made of a tiny LLaMA, and `FORMAT.safetensors` there
what transformers saved of the same model before.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import secateur
import tiny
from checkpoint_files import same_bytes
from pruned_checkpoints import load
from secateur.errors import CheckpointError
from secateur.files.checkpoint import SINGLE_FILE
from secateur.models.weights.bitmask import FORMATS, SparseBitmaskCheckpoint
from secateur.models.weights.quantised import open_checkpoint
from secateur.report.inspect import inspect
from secateur.runtime.pack import pack
from secateur.runtime.unpack import unpack

WRITTEN = Path(__file__).with_name("written_by_compressed_tensors")
STEM = "model.layers.0.mlp.down_proj"


@pytest.fixture(params=FORMATS)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(WRITTEN / request.param, tmp_path / request.param))


def test_what_the_package_wrote_is_read_bit_for_bit(checkpoint: Path) -> None:
    expected = load_file(WRITTEN / f"{checkpoint.name}.safetensors")
    source = open_checkpoint(checkpoint)
    assert isinstance(source, SparseBitmaskCheckpoint)
    assert source.format == checkpoint.name
    assert len(source.sparse) == 7
    assert set(expected) <= set(source.names)
    for name, tensor in source.read(source.names).items():
        assert source.shape(name) == tuple(tensor.shape)
        tied = "model.embed_tokens.weight" if name == "lm_head.weight" else name
        assert same_bytes(tensor, expected[tied]), name
        assert same_bytes(torch.cat(list(source.parts(name))).view(tensor.shape), tensor)


def test_unpack_writes_a_plain_checkpoint_that_loads(checkpoint: Path, tmp_path: Path) -> None:
    result = unpack(checkpoint, tmp_path / "plain")
    assert (result.format, result.matrices) == (checkpoint.name, 7)
    expected = load_file(WRITTEN / f"{checkpoint.name}.safetensors")
    found = load_file(tmp_path / "plain" / SINGLE_FILE)
    assert all(same_bytes(found[name], tensor) for name, tensor in expected.items())
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    model = load(tmp_path / "plain", dtype="auto")
    assert same_bytes(model.get_submodule(STEM).weight.data, expected[f"{STEM}.weight"])
    # And on into our own format.
    pack(tmp_path / "plain", tmp_path / "packed")
    assert inspect(tmp_path / "packed").matrices == inspect(tmp_path / "plain").matrices


def test_it_opens_as_it_is(checkpoint: Path, tmp_path: Path) -> None:
    unpack(checkpoint, tmp_path / "plain")
    ids = tiny.tokens(samples=2, length=16) % 64
    assert secateur.perplexity(checkpoint, ids).perplexity == secateur.perplexity(tmp_path / "plain", ids).perplexity
    assert inspect(checkpoint).sparsity == pytest.approx(0.5, abs=0.1)


def from_the_layout(weight: np.ndarray) -> dict[str, torch.Tensor]:
    """The parts of a weight in the format sparse-bitmask, from its description."""
    rows, columns = weight.shape
    mask = np.zeros((rows, (columns + 7) // 8), dtype=np.uint8)
    values, offsets = [], []
    for row in range(rows):
        offsets.append(len(values))
        for column in range(columns):
            if weight[row, column] != 0:
                mask[row, column // 8] |= 1 << column % 8
                values.append(weight[row, column])
    return {
        f"{STEM}.shape": torch.tensor([rows, columns]),
        f"{STEM}.bitmask": torch.from_numpy(mask),
        f"{STEM}.compressed": torch.from_numpy(np.array(values, dtype=weight.dtype)),
        f"{STEM}.row_offsets": torch.tensor(offsets),
    }


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("shape", [(16, 20), (5, 7), (3, 64), (1, 1)], ids=str)
def test_what_the_layout_describes_is_read(tmp_path: Path, shape: tuple[int, int], dtype: Any) -> None:
    weight = np.random.default_rng(0).normal(size=shape).astype(dtype)
    weight[np.random.default_rng(1).random(shape) < 0.6] = 0
    weight[0] = 0
    save_file(from_the_layout(weight), tmp_path / SINGLE_FILE)
    source = SparseBitmaskCheckpoint(tmp_path)
    np.testing.assert_array_equal(source.read([f"{STEM}.weight"])[f"{STEM}.weight"].numpy(), weight)


Tensors = dict[str, torch.Tensor]


def put(part: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({f"{STEM}.{part}": value(tensors[f"{STEM}.{part}"])})


DAMAGED: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "no values": (lambda tensors: tensors.pop(f"{STEM}.compressed"), "down_proj.compressed is missing"),
    "no shape": (lambda tensors: tensors.pop(f"{STEM}.shape"), "down_proj.shape is missing"),
    "a shape that is no shape": (put("shape", lambda shape: shape.float()), "shape is F32"),
    "a shape of three": (put("shape", lambda shape: torch.tensor([1, 2, 3])), "expected I64"),
    "a huge shape": (put("shape", lambda shape: shape * (1 << 40)), "its mask is U8"),
    "a negative shape": (put("shape", lambda shape: -shape), "its mask is U8"),
    "a wide mask": (put("bitmask", lambda mask: mask.short()), "its mask is I16"),
    "a bit more": (put("bitmask", lambda mask: mask.index_fill(0, torch.tensor([0]), 7)), "its mask keeps"),
    "too few values": (put("compressed", lambda values: values.view(-1)[1:].clone()), "values are stored"),
    "the weight as well": (
        lambda tensors: tensors.update({f"{STEM}.weight": torch.zeros(16, 20)}),
        "down_proj.weight is there as well",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_does_not_fit_is_refused_by_name(checkpoint: Path, case: str) -> None:
    change, message = DAMAGED[case]
    tensors = load_file(checkpoint / SINGLE_FILE)
    change(tensors)
    save_file(tensors, checkpoint / SINGLE_FILE, {"format": "pt"})
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(checkpoint).read([f"{STEM}.weight"])
    assert STEM in str(caught.value)


def test_row_offsets_of_another_mask_are_refused(tmp_path: Path) -> None:
    shutil.copytree(WRITTEN / "sparse-bitmask", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / SINGLE_FILE)
    tensors[f"{STEM}.row_offsets"][3] += 1
    save_file(tensors, tmp_path / "model" / SINGLE_FILE, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{STEM}: .* its row offsets are not those of its mask"):
        open_checkpoint(tmp_path / "model").read([f"{STEM}.weight"])


def test_a_configuration_without_such_tensors_is_refused(tmp_path: Path) -> None:
    shutil.copytree(WRITTEN / "sparse-bitmask", tmp_path / "model")
    shutil.copy(WRITTEN / "sparse-bitmask.safetensors", tmp_path / "model" / SINGLE_FILE)
    with pytest.raises(CheckpointError, match="sparse-bitmask, of which no tensor is there"):
        open_checkpoint(tmp_path / "model")
