"""Gradients in half precision neither underflow nor overflow unnoticed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny
from full_autograd import autograd, dense, distance, in_float64, sums, take, totals_of
from secateur.core.gradients import GradientKind
from secateur.errors import CalibrationError, NumericalError
from secateur.models.opening.opened import open_model


def save_half(folder: Path, dtype: torch.dtype, head: float = 1.0) -> Path:
    """The tiny LLaMA rounded to half precision, its last norm and its head each scaled by a power of two."""
    model = tiny.build("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(head)
        model.model.norm.weight.mul_(head)
    model.to(dtype).save_pretrained(folder)
    return folder


def root(total: Tensor, norm: str) -> Tensor:
    return total.sqrt() if norm == "l2" else total


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)], ids=str)
@pytest.mark.parametrize(
    ("scope", "granularity"), [("model", "sample"), ("model", "token"), ("block", "sample"), ("block", "token")]
)
def test_half_precision(dtype, tolerance, scope, granularity, ids, tmp_path):
    """Against float64 on the same rounded weights: a few units of the last place (2 ** -11 and 2 ** -8)."""
    source = save_half(tmp_path / "source", dtype)
    options = {"scope": scope, "granularity": granularity}
    exact = totals_of(take(source, tmp_path / "exact", ids, dtype="float64", **options))
    name = str(dtype).removeprefix("torch.")
    for batch_size in (1, 3):
        file = take(source, tmp_path / f"half-{batch_size}", ids, dtype=name, batch_size=batch_size, **options)
        assert file.provenance["dtype"] == name
        half = totals_of(file)
        assert all(total.dtype == torch.float32 for total in half.values())
        worst = max(distance(root(half[key], key[1]), root(value, key[1])) for key, value in exact.items())
        assert worst <= tolerance, worst


def test_float16_does_not_underflow(tmp_path):
    """Gradients far below the smallest float16 number, 6e-8: plain autograd loses them, and ours keeps them."""
    source = save_half(tmp_path / "source", torch.float16, head=2.0**-9)
    ids = tiny.tokens(samples=2, length=48)
    with in_float64():
        expected = sums(model := dense(source), autograd(model, ids))["l1"]
    plain = sums(model := dense(source, torch.float16), autograd(model, ids))["l1"]
    ours = take(source, tmp_path / "half", ids, dtype="float16", norms=["l1"])
    for matrix in open_model(source).skeleton.matrices:
        exact = matrix.view(expected)
        got = ours.read(matrix.name, GradientKind("l1")).total
        assert bool((exact > 0).all())
        lost = float((matrix.view(plain) == 0).float().mean())
        assert lost > 0.9, f"{matrix.name}: plain float16 loses {lost:.1%}"
        assert bool((got > 0).all()), matrix.name
        assert distance(got, exact) <= 4e-3, matrix.name
        # Entry by entry too: as far as the rounding of sums of both signs allows.
        assert float(((got - exact).abs() / exact).median()) <= 4e-3, matrix.name


def test_bfloat16_does_not_underflow(tmp_path):
    source = save_half(tmp_path / "source", torch.bfloat16, head=2.0**-9)
    ids = tiny.tokens(samples=2, length=48)
    exact = totals_of(take(source, tmp_path / "exact", ids, dtype="float64"))
    for key, got in totals_of(take(source, tmp_path / "half", ids, dtype="bfloat16")).items():
        assert bool((got > 0).all()), key
        assert distance(got, exact[key]) <= 6e-2, key


def test_float16_that_overflows_says_so(tmp_path):
    source = save_half(tmp_path / "source", torch.float16, head=2.0**7)
    with pytest.raises((NumericalError, CalibrationError), match=r"finite|NaN or infinity"):
        take(source, tmp_path / "half", tiny.tokens(samples=1, length=12), dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
