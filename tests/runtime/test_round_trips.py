"""Any tensor comes back from a packed checkpoint bit for bit: against numpy, whichever code packs and expands it."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load_file, save_file

from checkpoint_files import same_bytes
from secateur.files.bitmask import pack_bits
from secateur.files.checkpoint import SINGLE_FILE
from secateur.files.packed import PackedTensor
from secateur.runtime.layout import compact, expanded
from secateur.runtime.library import PathName
from secateur.runtime.pack import pack
from secateur.runtime.unpack import unpack

FLOATS = {2: [torch.bfloat16, torch.float16], 4: [torch.float32], 8: [torch.float64], 1: [torch.float8_e4m3fn]}
ANY = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of any float dtype and odd widths, with empty and full rows, and bits of NaN, infinity and -0.0."""
    size = draw(st.sampled_from(list(FLOATS)))
    integers = np.dtype(f"u{size}")
    top = 8 * size - 1
    special = [0, 0, 0, 1, 1 << top, (1 << top) - 1, (1 << 8 * size) - 1]
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=21))
    array = draw(hnp.arrays(integers, shape, elements=st.sampled_from(special) | st.integers(0, (1 << 8 * size) - 1)))
    for row in draw(st.lists(st.integers(0, shape[0] - 1), max_size=3)):
        array[row] = draw(st.sampled_from([0, 1 << top, 3]))
    return torch.from_numpy(array.view(f"i{size}")).view(draw(st.sampled_from(FLOATS[size])))


@ANY
@given(tensors())
def test_mask_and_values_are_those_of_numpy(path: PathName, tensor: torch.Tensor) -> None:
    mask, kept = pack_bits(tensor)
    ours = compact(tensor, len(kept))
    assert same_bytes(ours[0], mask)
    assert same_bytes(ours[1], kept)
    assert same_bytes(expanded(PackedTensor(mask, kept, tuple(tensor.shape), tensor.dtype)), tensor)
    for wrong in {len(kept) - 1, len(kept) + 1} - {-1}:
        with pytest.raises(ValueError, match="were counted before"):
            compact(tensor, wrong)


@pytest.mark.parametrize("compress", [False, True])
@ANY
@given(st.lists(tensors(), min_size=1, max_size=4))
def test_a_checkpoint(compress: bool, found: list[torch.Tensor]) -> None:
    if compress:
        pytest.importorskip("backports.zstd")
    weights: dict[str, Any] = {f"{number}.weight": tensor for number, tensor in enumerate(found)}
    weights["pays.weight"] = torch.zeros(64, 64)  # what is small alone may not shrink
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "plain").mkdir()
        save_file(weights, folder / "plain" / SINGLE_FILE)
        pack(folder / "plain", folder / "packed", compress=compress)
        unpack(folder / "packed", folder / "back")
        back = load_file(folder / "back" / SINGLE_FILE)
        assert back.keys() == weights.keys()
        for name, tensor in weights.items():
            assert same_bytes(back[name], tensor), name
