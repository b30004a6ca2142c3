"""The contract that every statistic keeps: a sum over tokens that can be split, merged and reordered."""

import inspect
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from secateur.core import gram, statistics
from secateur.core.gram import CrossGram, Gram
from secateur.core.statistics import SquaredNorm, Statistic
from secateur.methods import METHODS

STATISTICS: list[type[Statistic]] = [SquaredNorm, Gram]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
WIDTH = 6

every_statistic = pytest.mark.parametrize("kind", STATISTICS, ids=lambda kind: kind.__name__)
economical = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def data(tokens: int, width: int = WIDTH, seed: int = 0) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def collected(kind: type[Statistic], *batches: Tensor) -> Any:
    """One calibration sample per batch."""
    statistic = kind.empty(batches[0].shape[1])
    for x in batches:
        statistic.update(x, samples=1)
    return statistic


def assert_same(one: Any, other: Any, *, exact: bool = False) -> None:
    """Every field is equal: counts exactly, tensors exactly or to the rounding of float32."""
    assert one.total.shape == other.total.shape  # looked at first: a Gram matrix mirrors its triangle then
    assert vars(one).keys() == vars(other).keys()
    for field, value in vars(one).items():
        if isinstance(value, Tensor):
            tolerance = 0.0 if exact else 1e-6
            # Entries of a Gram matrix are sums of either sign: their rounding is that of the squares.
            least = 3 * tolerance * float(value.diagonal().max()) if value.dim() == 2 else 0.0
            torch.testing.assert_close(
                vars(other)[field], value, rtol=tolerance, atol=least, equal_nan=True, check_dtype=value.dim() != 2
            )
        else:
            assert vars(other)[field] == value, field


def test_every_statistic_is_in_the_list() -> None:
    defined = {
        kind
        for module in (statistics, gram)
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if kind.__module__ == module.__name__ and hasattr(kind, "update") and kind not in (Statistic, CrossGram)
    }
    needed = {kind for method in METHODS.values() for kind in method().inputs}
    assert defined | needed == set(STATISTICS)


@every_statistic
def test_it_is_a_statistic(kind: type[Statistic]) -> None:
    assert isinstance(kind.empty(WIDTH), Statistic)


@every_statistic
def test_empty_has_seen_nothing(kind: type[Statistic]) -> None:
    empty = kind.empty(WIDTH)
    assert (empty.tokens, empty.samples) == (0, 0)
    assert empty.is_finite()
    assert not kind.empty(WIDTH).total.any()  # type: ignore[attr-defined]


@every_statistic
@economical
@given(st.lists(st.integers(0, 300), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_split_merged_and_reordered_make_the_whole(kind: type[Statistic], sizes: list[int], random: Any) -> None:
    x = data(sum(sizes))
    whole = kind.empty(WIDTH)
    whole.update(x, samples=len(sizes))

    parts = list(x.split(sizes))
    one_by_one = collected(kind, *parts)
    random.shuffle(parts)
    reordered = collected(kind, *parts)
    cut = random.randint(0, len(parts))
    merged = collected(kind, *parts[:cut]) if cut else kind.empty(WIDTH)
    merged.merge(collected(kind, *parts[cut:]) if parts[cut:] else kind.empty(WIDTH))

    for other in (one_by_one, reordered, merged):
        assert_same(other, whole)


@every_statistic
def test_the_order_of_tokens_does_not_matter(kind: type[Statistic]) -> None:
    x = data(700)
    assert_same(collected(kind, x.flip(0)), collected(kind, x))


@every_statistic
def test_merging_an_empty_one_changes_nothing(kind: type[Statistic]) -> None:
    x = data(10)
    into, onto = collected(kind, x), kind.empty(WIDTH)
    into.merge(kind.empty(WIDTH))
    onto.merge(collected(kind, x))
    assert_same(into, collected(kind, x), exact=True)
    assert_same(onto, collected(kind, x), exact=True)


@every_statistic
def test_merging_either_way_round_is_bit_identical_and_leaves_the_other_alone(kind: type[Statistic]) -> None:
    x, y = data(10, seed=1), data(20, seed=2)
    one, other = collected(kind, x), collected(kind, y)
    one.merge(other)
    assert_same(other, collected(kind, y), exact=True)
    reverse = collected(kind, y)
    reverse.merge(collected(kind, x))
    assert_same(one, reverse, exact=True)


@every_statistic
def test_tokens_and_samples_are_counted(kind: type[Statistic]) -> None:
    statistic = kind.empty(WIDTH)
    statistic.update(data(7), samples=2)
    statistic.update(data(5))
    statistic.update(data(0), samples=1)
    assert (statistic.tokens, statistic.samples) == (12, 3)
    statistic.merge(collected(kind, data(4)))
    assert (statistic.tokens, statistic.samples) == (16, 4)


@every_statistic
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 255, 256, 257, 1000])
def test_every_dtype_gives_what_its_values_give_in_float64(kind: type[Statistic], dtype: torch.dtype, tokens: int):
    # 200 ** 2 overflows float16, and 0.3 is no bfloat16: the values are the rounded ones, the sums are wide.
    x = (data(tokens) * 200).to(dtype)
    assert_same(collected(kind, x), collected(kind, x.double()))


@every_statistic
def test_non_contiguous_tokens(kind: type[Statistic]) -> None:
    x = data(600, 2 * WIDTH)
    assert_same(collected(kind, x[::2, ::2]), collected(kind, x[::2, ::2].contiguous()))
    assert_same(collected(kind, x.t().contiguous().t()), collected(kind, x))


@every_statistic
def test_update_does_not_write_to_the_tokens_nor_keep_them(kind: type[Statistic]) -> None:
    x = data(10)
    statistic = collected(kind, x)
    assert torch.equal(x, data(10))
    x.zero_()
    assert_same(statistic, collected(kind, data(10)), exact=True)


@every_statistic
@pytest.mark.parametrize("columns", [[0, 2, 3], [5, 1], [4], [3, 3], list(range(WIDTH))], ids=str)
def test_select_is_the_statistic_of_those_columns(kind: type[Statistic], columns: list[int]) -> None:
    x, index = data(300), torch.tensor(columns)
    whole = collected(kind, x)
    selected = whole.select(index)
    assert_same(selected, collected(kind, x[:, index]))
    whole.update(x)
    assert_same(selected, collected(kind, x[:, index]))


@every_statistic
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("token", [0, 299])
def test_nan_and_infinity_are_found(kind: type[Statistic], dtype: torch.dtype, bad: float, token: int) -> None:
    x = data(300).to(dtype)
    assert collected(kind, x).is_finite()
    x[token, 4] = bad
    statistic = collected(kind, x)
    assert not statistic.is_finite()
    assert not statistic.select(torch.tensor([4])).is_finite()
    assert statistic.select(torch.tensor([0, 1, 2, 3, 5])).is_finite() or kind is not SquaredNorm
    healthy = collected(kind, data(5))
    healthy.merge(statistic)
    assert not healthy.is_finite()


def test_squared_norm_is_the_sum_of_squares() -> None:
    x = data(300)
    statistic = collected(SquaredNorm, x)
    expected = [math.fsum(value**2 for value in column) for column in x.double().t().tolist()]
    assert statistic.total.dtype == torch.float64
    assert statistic.total.tolist() == pytest.approx(expected, rel=1e-6)


def test_norm_is_over_all_tokens_and_float32() -> None:
    x = data(50)
    norm = collected(SquaredNorm, x[:20], x[20:]).norm()
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm, x.double().norm(dim=0).float(), rtol=1e-6, atol=0.0)


@economical
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_per_sample_is_the_published_running_mean(lengths: list[int]) -> None:
    samples = list(data(sum(lengths)).split(lengths))
    per_sample = collected(SquaredNorm, *samples).per_sample()
    assert per_sample.dtype == torch.float32
    assert per_sample.tolist() == pytest.approx(reference.published_running_mean(samples), rel=1e-5)


def test_per_sample_averages_over_samples_and_not_tokens() -> None:
    statistic = SquaredNorm.empty(1)
    statistic.update(torch.ones(16, 1), samples=4)
    assert statistic.per_sample().tolist() == [4.0]
    assert SquaredNorm.empty(1).per_sample().tolist() == [0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_long_batch_loses_nothing(dtype: torch.dtype) -> None:
    # Added one by one in float32, 65536 equal squares are wrong in the fourth digit.
    x = torch.full((65536, 2), 0.1, dtype=dtype)
    total = collected(SquaredNorm, x).total
    torch.testing.assert_close(total, x.double().square().sum(dim=0), rtol=2e-6, atol=0.0)
