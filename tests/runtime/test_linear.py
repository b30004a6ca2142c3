"""`PackedLinear` beside `nn.Linear`: results, casts, inference mode, torch.compile."""

import copy
import pickle

import pytest
import torch
from torch import nn

from packed_weights import random_packed
from secateur.errors import SecateurError
from secateur.runtime.library import PathName
from secateur.runtime.linear import PackedLinear


def pair(path: PathName) -> tuple[PackedLinear, nn.Linear]:
    packed = random_packed(24, 50, torch.float32)
    dense = nn.Linear(50, 24)
    dense.weight = nn.Parameter(packed.stored)
    return PackedLinear(packed.laid_out(path), dense.bias.detach()), dense


def test_as_linear(path: PathName) -> None:
    ours, dense = pair(path)
    x = torch.randn(2, 3, 50)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), dense(x))
    torch.testing.assert_close(copy.deepcopy(ours)(x), dense(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(ours))(x), dense(x))
    assert torch.equal(ours.packed.expand(), dense.weight)
    assert list(ours.state_dict()) == ["bias"]
    assert repr(ours) == f"PackedLinear(in_features=50, out_features=24, bias=True, values=float32, path={path})"


def test_casts_leave_the_weight(path: PathName) -> None:
    ours, dense = pair(path)
    ours = ours.to(torch.bfloat16)
    assert torch.equal(ours.packed.expand(), dense.weight)
    x = torch.randn(3, 50).bfloat16()
    expected = x.float() @ dense.weight.T + dense.bias.bfloat16().float()
    torch.testing.assert_close(ours(x), expected.bfloat16(), rtol=0.01, atol=0.01)


def test_its_weight_is_the_dense_one(path: PathName) -> None:
    """For code that looks at a layer's weight, as adapters and some models of transformers do."""
    ours, dense = pair(path)
    weight = ours.weight
    assert (weight.shape, weight.dtype, weight.device) == (dense.weight.shape, torch.float32, torch.device("cpu"))
    assert ours.to(torch.bfloat16).weight.dtype == torch.bfloat16
    assert (weight.dtype, weight.is_floating_point(), weight.requires_grad) == (torch.float32, True, False)
    x = torch.randn(3, 50)
    with torch.no_grad():
        torch.testing.assert_close(torch.nn.functional.linear(x, weight), x @ dense.weight.T)
        assert torch.equal(torch.empty(24, 50).copy_(weight), dense.weight)
    assert torch.equal(weight.T[3], dense.weight.T[3])
    for change in (weight.zero_, lambda: weight.copy_(dense.weight), lambda: torch.neg(dense.weight, out=weight)):
        with pytest.raises((SecateurError, RuntimeError)):
            change()
    assert torch.equal(ours.packed.expand(), dense.weight)


def test_compiled_as_one_graph(path: PathName) -> None:
    if path in ("torch", "plain"):
        pytest.skip("the same code in Python as the other paths" if path == "plain" else "no operator of ours")
    ours, dense = pair(path)
    compiled = torch.compile(nn.Sequential(ours, nn.ReLU()), fullgraph=True, backend="aot_eager")
    for batch in (1, 5):
        x = torch.randn(batch, 50)
        with torch.inference_mode():
            torch.testing.assert_close(compiled(x), dense(x).relu())


def test_operator_is_declared_right(path: PathName) -> None:
    if path == "torch":
        pytest.skip("no operator of ours")
    ours, _ = pair(path)
    arguments = (torch.randn(2, 50), ours.numbers, ours.masks, ours.values, ours.starts, ours.scales, ours.bias, 24)
    torch.library.opcheck(
        torch.ops.secateur.packed_linear.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_backward_is_refused(path: PathName) -> None:
    if path == "torch":
        pytest.skip("torch has the gradient")
    ours, _ = pair(path)
    y = ours(torch.randn(2, 50, requires_grad=True))
    with pytest.raises(RuntimeError, match="autograd"):
        y.sum().backward()
