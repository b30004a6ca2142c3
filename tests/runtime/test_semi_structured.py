"""2:4 on GPUs: which kernel is taken, and why one is not; without a GPU all of it but the kernels runs."""

from pathlib import Path

import pytest
import torch
from torch import nn

import secateur
import tiny
from secateur.errors import SecateurError
from secateur.runtime import semi_structured
from secateur.runtime.load import load, memory_of
from secateur.runtime.semi_structured import (
    Choice,
    choose,
    convert,
    disagreement,
    is_two_four,
    measure,
    refusal,
    table,
    two_four_layers,
    why_not,
)


def around(median: float, spread: float = 0.02) -> list[float]:
    return [median * (1 + spread * step) for step in (-2, -1, 0, 1, 2)]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        # Faster for a prompt, the same for a token.
        ({"dense": {1: 0.10, 512: 1.0}, "cusparselt": {1: 0.1001, 512: 0.7}}, "cusparselt"),
        # Faster for a prompt, and slower for a token.
        ({"dense": {1: 0.05, 512: 1.0}, "cusparselt": {1: 0.20, 512: 0.7}}, "dense"),
        ({"dense": {512: 1.0}, "cusparselt": {512: 0.7}}, "cusparselt"),
        # Within the spread.
        ({"dense": {512: 1.0}, "cusparselt": {512: 0.99}}, "dense"),
        # The greater gain.
        ({"dense": {512: 1.0}, "cusparselt": {512: 0.8}, "cutlass": {512: 0.6}}, "cutlass"),
        ({"dense": {1: 1.0, 512: 1.0}, "cusparselt": {1: 0.9, 512: 0.9}, "cutlass": {1: 1.1, 512: 0.5}}, "cusparselt"),
        # Not measured everywhere.
        ({"dense": {1: 1.0, 512: 1.0}, "cutlass": {512: 0.5}}, "dense"),
        ({"dense": {1: 1.0}}, "dense"),
    ],
)
def test_the_kernel_that_gains_somewhere_and_loses_nowhere(times: dict[str, dict[int, float]], expected: str) -> None:
    assert choose({kernel: {rows: around(ms) for rows, ms in own.items()} for kernel, own in times.items()}) == expected


def test_shapes_and_dtypes_that_a_kernel_does_not_take() -> None:
    half, single = torch.bfloat16, torch.float32
    assert refusal("cusparselt", (576, 1536), half) is None
    assert refusal("cutlass", (576, 1536), half) is None
    assert refusal("cutlass", (576, 1536), single) is None
    assert refusal("cusparselt", (576, 40), half) == "takes multiples of 16 x 16 in bfloat16, not 576 x 40"
    assert refusal("cutlass", (48, 64), half) == "takes multiples of 32 x 64 in bfloat16, not 48 x 64"
    assert refusal("cusparselt", (64, 64), single) == "takes float16, bfloat16, not float32"


def test_these_are_the_multiples_that_torch_has() -> None:
    """torch keeps them in a private table; ours must not ask for less."""
    classes = {
        "cusparselt": torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
        "cutlass": torch.sparse.SparseSemiStructuredTensorCUTLASS,
    }
    for kernel, known in semi_structured.MULTIPLES.items():
        for dtype, (height, width) in known.items():
            limits = classes[kernel]._DTYPE_SHAPE_CONSTRAINTS[dtype]
            assert (height % limits.sparse_min_rows, width % limits.sparse_min_cols) == (0, 0)


def pruned(out_features: int, in_features: int) -> nn.Linear:
    layer = nn.Linear(in_features, out_features, bias=False)
    with torch.no_grad():
        layer.weight.view(-1, 4)[:, :2] = 0
    return layer


def test_layers_that_are_two_four() -> None:
    model = nn.Sequential(pruned(8, 16), nn.Linear(16, 8), pruned(8, 16), pruned(16, 16))
    model[2].weight = model[3].weight  # shared
    assert list(two_four_layers(model)) == [model[0]]
    assert is_two_four(torch.zeros(2, 8))
    assert not is_two_four(torch.zeros(2, 6))  # not a whole number of fours
    assert not is_two_four(torch.tensor([[1.0, 1.0, 1.0, 0.0]]))


def test_without_a_gpu_the_reason_is_said() -> None:
    model = nn.Sequential(pruned(32, 64))
    assert why_not(torch.device("cpu")) == "they run on NVIDIA GPUs, and the model lies on cpu"
    with pytest.raises(SecateurError, match="2:4 kernels: they run on NVIDIA GPUs, and the model lies on cpu"):
        convert(model)
    for rows in ([], [0], [512, -1]):
        with pytest.raises(SecateurError, match="expected numbers from 1"):
            convert(model, rows)
    assert convert(nn.Sequential(nn.Linear(4, 4))) == []


def test_products_are_timed_in_turns_and_compared() -> None:
    """Timed and compared on a CPU, with dense products in the place of the kernels."""
    weight = pruned(64, 128).weight.detach()
    order: list[str] = []

    def product(name: str, x: torch.Tensor) -> torch.Tensor:
        order.append(name)
        return x @ weight.T

    names = ("dense", "cutlass")
    times = measure({name: lambda x, name=name: product(name, x) for name in names}, weight, (1, 8))
    assert {name: {rows: len(own) for rows, own in by.items()} for name, by in times.items()} == {
        name: {1: semi_structured.MEASURED, 8: semi_structured.MEASURED} for name in names
    }
    assert order[:4] == ["dense", "cutlass", "dense", "cutlass"]
    assert disagreement(weight.clone(), weight, 8) is None
    wrong = weight.clone()
    wrong[:, 3] = 0
    assert "differ from the dense ones by" in str(disagreement(wrong, weight, 8))


def test_a_layer_that_no_kernel_takes_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of `convert` but the kernels: here torch says that it has none for a CPU, which is what a table shows."""
    monkeypatch.setattr(semi_structured, "why_not", lambda device: None)
    model = nn.Sequential(pruned(32, 64), pruned(32, 64), pruned(33, 64)).bfloat16()
    weights = [layer.weight for layer in model]
    choices = convert(model, (1, 4))
    assert [layer.weight for layer in model] == weights
    assert [(choice.out_features, choice.matrices, choice.kernel) for choice in choices] == [
        (32, 2, "dense"),
        (33, 1, "dense"),
    ]
    assert choices[0].refused.keys() == {"cusparselt", "cutlass"}  # torch's own words
    assert choices[1].refused["cutlass"] == "takes multiples of 32 x 64 in bfloat16, not 33 x 64"
    shown = table(choices)
    assert "taken" in shown
    assert "takes multiples of 16 x 16 in bfloat16, not 33 x 64" in shown


def test_a_table_says_what_was_taken() -> None:
    times = {"dense": {1: around(0.05), 512: around(0.4)}, "cusparselt": {1: around(0.05), 512: around(0.25)}}
    lines = table([Choice(4096, 11008, "bfloat16", 32, "cusparselt", times, {"cutlass": "no"})]).splitlines()
    assert lines[1].split() == ["matrix", "dtype", "of", "them", "kernel", "1", "512"]
    assert lines[2].split()[-3:] == ["dense", "0.0500", "0.4000"]
    assert lines[3].split()[-4:] == ["cusparselt", "0.0500", "0.2500", "taken"]
    assert lines[4].endswith("cutlass      no")


@pytest.mark.gpu
def test_on_a_gpu_logits_stay(tmp_path: Path) -> None:
    tiny.build("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    secateur.prune(tmp_path / "model", method="magnitude", pattern="2:4", output=tmp_path / "pruned")
    seen: list[Choice] = []
    module = load(tmp_path / "pruned", device="cuda", rows=[64], on_choices=seen.extend)
    dense = load(tmp_path / "pruned", device="cuda", backend="dense")
    ids = torch.arange(16, device="cuda")[None]
    assert seen
    torch.testing.assert_close(module(ids).logits, dense(ids).logits, rtol=5e-2, atol=5e-2)


@pytest.mark.gpu
def test_large_matrices_on_a_gpu() -> None:
    """What is taken multiplies as the dense matrix does, and takes less memory."""
    model = nn.Sequential(pruned(8192, 8192)).to("cuda", torch.bfloat16)
    weight, before = model[0].weight.detach().clone(), memory_of(model)
    choices = convert(model, [4096])
    print(table(choices))
    x = torch.randn(4096, 8192, device="cuda", dtype=torch.bfloat16)
    torch.testing.assert_close(model(x), x @ weight.T, rtol=2e-2, atol=2e-2)
    if choices[0].kernel != "dense":
        assert memory_of(model) < 0.7 * before
