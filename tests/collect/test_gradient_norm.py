"""The statistic of gradients: a sum over samples that can be split and merged."""

from __future__ import annotations

import re

import pytest
import torch

import reference
from full_autograd import contents, each_norm, pinned, take
from secateur.core.gradients import GradientKind, GradientNorm
from secateur.errors import CalibrationError


@each_norm
def test_the_statistic_is_a_sum_that_can_be_split_and_merged(norm):
    kind = GradientKind(norm)
    gradients = torch.randn(7, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = GradientNorm.empty(kind, (5, 4), dtype=torch.float64)
    parts = [GradientNorm.empty(kind, (5, 4), dtype=torch.float64) for _ in range(3)]
    before = gradients.clone()
    for number, own in enumerate(gradients):
        whole.update(own, tokens=10)
        parts[number % 3].update(own, tokens=10)
    assert torch.equal(gradients, before), "an update does not write to the gradient"
    merged = GradientNorm.empty(kind, (5, 4), dtype=torch.float64)
    for part in parts:
        merged.merge(part)
    for found in (whole, merged):
        assert (found.samples, found.tokens, found.kind) == (7, 70, kind)
        expected = gradients.abs().sum(0) if norm == "l1" else gradients.square().sum(0)
        torch.testing.assert_close(found.total, expected, rtol=1e-14, atol=0)
        expected = torch.tensor(reference.gradient_norm(list(gradients), norm), dtype=torch.float64)
        torch.testing.assert_close(found.norm(), expected, rtol=1e-14, atol=0)
        assert found.is_finite()
    mean = (gradients.square().sum(0) / 7).sqrt()
    if norm == "l2":
        torch.testing.assert_close(whole.root_mean_square(), mean, rtol=1e-14, atol=0)


def test_the_statistic_is_float32_whatever_the_gradient():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        statistic = GradientNorm.empty(GradientKind("l2"), (2, 3))
        own = torch.full((2, 3), 2.0**-14).to(dtype)
        for _ in range(3):
            statistic.update(own)
        assert statistic.total.dtype == torch.float32
        assert torch.equal(statistic.total, torch.full((2, 3), 3 * 2.0**-28)), "the square is not taken in half"
    statistic.update(torch.full((2, 3), float("inf")))
    assert not statistic.is_finite()


def test_no_samples_at_all():
    statistic = GradientNorm.empty(GradientKind("l2"), (2, 3))
    assert (statistic.samples, statistic.tokens) == (0, 0)
    assert not statistic.norm().any()
    assert not statistic.root_mean_square().any()


def test_only_the_same_kind_and_shape_merge():
    statistic = GradientNorm.empty(GradientKind("l1"), (2, 3))
    message = "gradients (l2 per token, block) of a matrix (2, 3) cannot be merged into (l1 per sample, model) (2, 3)."
    with pytest.raises(ValueError, match=pinned(message)):
        statistic.merge(GradientNorm.empty(GradientKind("l2", "token", "block"), (2, 3)))
    with pytest.raises(ValueError, match=re.escape("of a matrix (3, 2) cannot be merged")):
        statistic.merge(GradientNorm.empty(GradientKind("l1"), (3, 2)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm": "l3"}, 'norm: got "l3", expected l1 or l2.'),
        ({"granularity": "batch"}, 'granularity: got "batch", expected sample or token.'),
        ({"scope": "layer"}, 'scope: got "layer", expected model or block.'),
    ],
)
def test_unknown_kinds(fields, message, llama, ids, tmp_path):
    with pytest.raises(CalibrationError, match=pinned(message)):
        GradientKind(**fields)
    options = {"norms": [fields["norm"]]} if "norm" in fields else fields
    with pytest.raises(CalibrationError, match=pinned(message if "norm" in fields else f"--{message}")):
        take(llama, tmp_path / "g", ids, **options)
    assert contents(tmp_path) == []


def test_kinds_print_and_compare():
    assert str(GradientKind()) == "l1 per sample, model"
    assert str(GradientKind("l2", "token", "block")) == "l2 per token, block"
    assert GradientKind("l1") == GradientKind() != GradientKind("l2")
