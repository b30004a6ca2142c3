"""The Gram matrix and its relative across two streams; what holds of every statistic is in test_statistics.py."""

import pytest
import torch
from torch import Tensor

from secateur.core.gram import CrossGram, Gram, full_precision
from secateur.core.patterns import NM
from secateur.core.problem import Problem
from secateur.core.statistics import SquaredNorm, Statistic

WIDTH = 6


def data(tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def gram(*batches: Tensor) -> Gram:
    statistic = Gram.empty(batches[0].shape[1])
    for x in batches:
        statistic.update(x, samples=1)
    return statistic


def test_gram_is_the_sum_of_outer_products() -> None:
    x = data(50)
    expected = sum(token.outer(token) for token in x.double())
    torch.testing.assert_close(gram(x[:20], x[20:]).total.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [1, 127, 128, 129, 300, 1024, 1025, 1300])
def test_wide_grams_are_whole_and_symmetric(width: int) -> None:
    """Only the upper triangle is multiplied, in panels; looking at it in between changes nothing."""
    x = torch.randn(40, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole, looked_at = gram(x[:10], x[10:]), gram(x[:10])
    torch.testing.assert_close(looked_at.total, x[:10].t() @ x[:10])
    assert looked_at.is_finite()
    looked_at.update(x[10:])
    merged = gram(x[:10])
    merged.merge(gram(x[10:]))
    for statistic in (whole, looked_at, merged):
        torch.testing.assert_close(statistic.total, x.t() @ x)
        outside = torch.ones(width, width).triu(256).bool()  # of every panel's own square
        assert torch.equal(statistic.total[outside], statistic.total.t()[outside])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    x = (data(300) * 200).to(dtype)
    total = gram(x).total
    assert total.dtype == torch.float32
    expected = x.double().t() @ x.double()
    torch.testing.assert_close(total.double(), expected, rtol=0, atol=1e-6 * float(expected.max()))


def test_float64_tokens_widen_the_sum() -> None:
    x = data(30)
    mixed = gram(x[:10])
    mixed.update(x[10:].double())
    assert mixed.total.dtype == torch.float64
    merged = gram(x[:10])
    merged.merge(gram(x[10:].double()))
    assert merged.total.dtype == torch.float64
    torch.testing.assert_close(mixed.total, merged.total)
    torch.testing.assert_close(gram(x.double()).total, x.double().t() @ x.double())


def test_the_order_of_batches_does_not_matter() -> None:
    x = data(640)
    one, other = gram(*x.split(64)), gram(*reversed(x.split(64)))
    torch.testing.assert_close(one.total, other.total, rtol=0, atol=1e-6 * float(one.total.max()))


def test_the_diagonal_is_the_squared_norm() -> None:
    x = data(300)
    whole = gram(x[:100], x[100:])
    norm, expected = whole.squared_norm(), SquaredNorm.empty(WIDTH)
    expected.update(x, samples=2)
    assert (norm.tokens, norm.samples, norm.total.dtype) == (300, 2, torch.float64)
    torch.testing.assert_close(norm.total, expected.total, rtol=1e-6, atol=0)
    norm.total.zero_()
    assert bool(whole.total.diagonal().any()), "a statistic of its own"


def test_a_problem_with_a_gram_answers_for_the_squared_norm() -> None:
    whole, norm = gram(data(20)), SquaredNorm.empty(WIDTH)
    given = Problem("w", torch.ones(2, WIDTH), NM(1, 2), {Gram: whole})
    torch.testing.assert_close(given.statistic(SquaredNorm).total, whole.total.diagonal().double())
    both = Problem("w", torch.ones(2, WIDTH), NM(1, 2), {Gram: whole, SquaredNorm: norm})
    assert both.statistic(SquaredNorm) is norm
    with pytest.raises(KeyError, match="Gram was not collected"):
        Problem("w", torch.ones(2, WIDTH), NM(1, 2), {SquaredNorm: norm}).statistic(Gram)


def test_cross_gram_is_dense_times_own() -> None:
    x, dense = data(40), data(40, seed=1)
    cross = CrossGram.empty(WIDTH)
    assert isinstance(cross, Statistic)
    cross.update(x[:15], samples=1, dense=dense[:15])
    cross.update(x[15:], samples=1, dense=dense[15:])
    assert (cross.tokens, cross.samples) == (40, 2)
    expected = dense.double().t() @ x.double()
    torch.testing.assert_close(cross.total.double(), expected, rtol=1e-5, atol=1e-5)
    columns = torch.tensor([4, 1])
    torch.testing.assert_close(cross.select(columns).total, cross.total[columns][:, columns])
    other = CrossGram.empty(WIDTH)
    other.merge(cross)
    torch.testing.assert_close(other.total, cross.total)
    assert (other.tokens, other.samples) == (40, 2)
    assert cross.is_finite()
    same = CrossGram.empty(WIDTH)
    same.update(x, dense=x)
    torch.testing.assert_close(same.total, gram(x).total)


def test_cross_gram_needs_the_dense_tokens() -> None:
    with pytest.raises(ValueError, match=r"must come with \(4, 6\) tokens, got none"):
        CrossGram.empty(WIDTH).update(data(4))
    with pytest.raises(ValueError, match=r"must come with \(4, 6\) tokens, got \(3, 6\)"):
        CrossGram.empty(WIDTH).update(data(4), dense=data(3))


@pytest.mark.parametrize("kind", [Gram, CrossGram])
def test_another_width_cannot_be_merged(kind: type[Gram] | type[CrossGram]) -> None:
    with pytest.raises(ValueError, match=r"a statistic of 5 columns cannot be merged into 6"):
        kind.empty(WIDTH).merge(kind.empty(5))  # type: ignore[arg-type]


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
def test_products_are_exact_whatever_the_setting_and_the_setting_stays(before: str) -> None:
    torch.set_float32_matmul_precision(before)
    try:
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_newer_setting_stays_too(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = torch.backends.cuda.matmul
    if not hasattr(settings, "fp32_precision"):
        pytest.skip("this PyTorch has the older setting only")

    def mixed() -> str:
        raise RuntimeError("both settings were used")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    before = settings.fp32_precision
    settings.fp32_precision = "tf32"
    try:
        with full_precision():
            assert settings.fp32_precision == "ieee"
        assert settings.fp32_precision == "tf32"
    finally:
        settings.fp32_precision = before
