"""Products that are out of the ordinary: used twice, overwritten, or of another kind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from full_autograd import NORMS, pinned
from secateur.errors import ModelStructureError
from secateur.models.flow import backward


def tap_of(module: nn.Linear, samples: int = 1, length: int = 3) -> backward.GradientTap:
    tap = backward.GradientTap({"w": (module.requires_grad_(False).weight, False)}, NORMS)
    tap.begin(samples, length)
    return tap


def linear() -> nn.Linear:
    return nn.Linear(4, 5, bias=False).double()


def test_a_weight_that_multiplies_twice():
    """The gradient is the sum over both products, whose absolute value is not the sum of absolute values."""
    module, x = linear(), torch.randn(2, 3, 4).double()
    weight = module.weight.detach().clone().requires_grad_()
    tap = tap_of(module, samples=2)
    states = x.clone().requires_grad_()
    with tap:
        output = module(states) - module(states.flip(-1)).tanh()
    output.square().sum().backward()
    tap.end()
    expected = []
    for own in x:
        output = own @ weight.t() - (own.flip(-1) @ weight.t()).tanh()
        expected.append(*torch.autograd.grad(output.square().sum(), weight))
    totals = tap.totals()
    torch.testing.assert_close(totals["w", "l1"], torch.stack(expected).abs().sum(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(totals["w", "l2"], torch.stack(expected).square().sum(0), rtol=1e-12, atol=1e-12)
    assert module.weight.grad is None


@pytest.mark.parametrize("granularity", ["sample", "token"])
@pytest.mark.parametrize("function", ["addmm", "baddbmm", "matmul", "left"])
def test_products_of_every_kind(function, granularity):
    """Whichever function multiplies, on whichever side, and with a factor where it takes one."""
    weight, x = torch.randn(5, 4).double(), torch.randn(3, 4).double()
    parameter = nn.Parameter(weight.clone(), requires_grad=False)
    tap = backward.GradientTap({"w": (parameter, False)}, NORMS, granularity)
    tap.begin(1, 3)
    states = x.clone().requires_grad_()
    factor = 3.0 if "add" in function else 1.0
    with tap:
        if function == "addmm":
            output = torch.addmm(torch.ones(5).double(), states, parameter.t(), alpha=3)
        elif function == "baddbmm":
            output = torch.baddbmm(torch.ones(1, 3, 5).double(), states[None], parameter.t()[None], alpha=3)[0]
        elif function == "matmul":
            output = states @ parameter.t()
        else:
            output = (parameter @ states.t()).t()
    output.square().sum().backward()
    tap.end()
    each = torch.einsum("to,ti->toi", 2 * factor * output.detach(), x)
    each = each.sum(dim=0, keepdim=True) if granularity == "sample" else each
    totals = tap.totals()
    for norm, expected in {"l1": each.abs().sum(dim=0), "l2": each.square().sum(dim=0)}.items():
        torch.testing.assert_close(totals["w", norm], expected, rtol=1e-12, atol=1e-12 * float(expected.max()))


def test_an_input_that_is_overwritten_later():
    module = linear()
    states = torch.randn(1, 3, 4).double().requires_grad_()
    with tap_of(module):
        own = states * 2
        output = module(own)
        own.add_(1)
    message = (
        "w: its input is overwritten after the multiplication, so that its gradient cannot be taken. "
        "Skip it with --skip, or use a method without gradients."
    )
    with pytest.raises(ModelStructureError, match=pinned(message)):
        output.sum().backward()


def test_samples_that_cannot_be_told_apart():
    module = linear()
    states = torch.randn(5, 4).double().requires_grad_()  # some tokens of two samples
    with tap_of(module, samples=2, length=3):
        output = module(states)
    message = (
        "w: multiplies an input of shape (5, 4), in which the 2 samples of 3 tokens cannot be told apart. "
        "Use --batch-size 1."
    )
    with pytest.raises(ModelStructureError, match=pinned(message)):
        output.sum().backward()


def test_a_product_of_what_needs_no_gradient():
    """Such as of embeddings that a block has of its own."""
    module, x = linear(), torch.randn(1, 3, 4).double()
    tap = tap_of(module)
    with tap:
        output = module(x)
    (output**2).sum().backward()
    tap.end()
    totals = tap.totals()
    torch.testing.assert_close(totals["w", "l1"], (2 * output[0].t() @ x[0]).abs(), rtol=1e-12, atol=1e-12)
