"""The reader in the documentation of the format reads what `pack` writes."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from secateur.files.checkpoint import SINGLE_FILE
from secateur.files.packed import PackedCheckpoint
from secateur.runtime.pack import pack

PAGE = Path(__file__).parents[2] / "docs" / "packed.md"
BLOCK = re.compile(r"<!-- This reader is run by a test\. -->\n```python\n(.*?)^```$", re.M | re.S)


@pytest.mark.parametrize("shape", [(24, 43), (3, 8, 21)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("values", ["same", "int8"])
def test_it_reads_what_pack_writes(tmp_path: Path, values: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    (code,) = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    reader: dict[str, Any] = {}
    exec(code, reader)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    weight[torch.rand(shape, generator=generator) < 0.6] = 0
    (tmp_path / "plain").mkdir()
    save_file({"a.weight": weight, "b": torch.ones(3)}, tmp_path / "plain" / SINGLE_FILE)
    pack(tmp_path / "plain", tmp_path / "packed", values=values)
    found = reader["read"](tmp_path / "packed", "a.weight")
    assert found.shape == shape
    if values == "same" or dtype == torch.float64:
        assert found.tobytes() == weight.view(torch.uint8).numpy().tobytes()
    else:
        ours = PackedCheckpoint(tmp_path / "packed").read(["a.weight"])["a.weight"]
        np.testing.assert_array_equal(torch.from_numpy(found).to(dtype).float().numpy(), ours.float().numpy())
