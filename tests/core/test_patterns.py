"""Every pattern: exact counts, stable ties, the best admissible mask, and each message."""

import itertools
import json
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from secateur.core.patterns import (
    NM,
    Pattern,
    Unstructured,
    lowest,
    parse_pattern,
    pattern_from_json,
    removed_count,
    search_rows,
    with_group,
)
from secateur.errors import NumericalError, PatternError

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NM_PAIRS = [(1, 1), (1, 2), (2, 2), (2, 3), (1, 4), (2, 4), (3, 4), (4, 4), (3, 5), (5, 7), (4, 8), (7, 8)]
NM_PAIRS += [(1, 9), (5, 10), (7, 12), (13, 13), (8, 16), (1, 32), (31, 32)]
SPARSITIES = [0, 0.0, 1e-9, 0.1, 0.29, 0.5, 0.57, 2 / 3, 0.9, 0.999]
SHAPES = [(1, 1), (1, 7), (7, 1), (3, 8), (8, 100), (64, 48)]
EXACT: list[Pattern] = [
    *(Unstructured(sparsity, per) for sparsity in (0, 0.29, 0.5, 0.9) for per in (None, "row", "matrix")),
    *(NM(n, m) for n, m in NM_PAIRS),
]

economical = settings(max_examples=60, deadline=None, derandomize=True, database=None)
small_scores = st.tuples(st.integers(1, 5), st.integers(1, 24), st.integers(0, 6)).flatmap(
    lambda size: st.lists(
        st.lists(st.integers(0, size[2]), min_size=size[1], max_size=size[1]), min_size=size[0], max_size=size[0]
    )
)


def pinned(message: str) -> str:
    return f"^{re.escape(message)}$"


def scores(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def expected(pattern: Pattern, score: Tensor) -> Tensor:
    if isinstance(pattern, NM):
        return reference.select_nm(score, pattern.n, pattern.m)
    assert isinstance(pattern, Unstructured)
    select = reference.select_matrix if pattern.per == "matrix" else reference.select_rows
    return select(score, pattern.sparsity)


def width_for(pattern: Pattern) -> int:
    return 3 * pattern.m if isinstance(pattern, NM) else 20


# Counts


@pytest.mark.parametrize(
    ("entries", "sparsity", "count"),
    [
        (100, 0.29, 29),  # 0.29 * 100 is 28.999999999999996
        (100, 0.57, 57),
        (100, 0.58, 58),
        (1000, 0.001, 1),
        (10, 0.3, 3),
        (4096, 0.1, 409),
        (11008, 0.7, 7705),
        (3, 1 / 3, 0),
        (7, 0.5, 3),
        (1, 0.99, 0),
        (10**12, 0.29, 29 * 10**10),
        (10**9, 1e-9, 1),
        (10, 0, 0),
        (10, 0.0, 0),
    ],
)
def test_removed_count_is_the_floor_of_the_decimal_product(entries: int, sparsity: float, count: int) -> None:
    assert removed_count(entries, sparsity) == count == reference.removed_count(entries, sparsity)


@economical
@given(st.integers(0, 10**7), st.integers(0, 9999))
def test_removed_count_of_four_decimals(entries: int, ten_thousandths: int) -> None:
    assert removed_count(entries, ten_thousandths / 10_000) == entries * ten_thousandths // 10_000


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per", [None, "row", "matrix"])
def test_unstructured_counts_and_places(dtype: torch.dtype, shape: tuple[int, int], per: Any) -> None:
    score = scores(*shape, dtype)  # half precision has many ties
    for sparsity in SPARSITIES:
        mask = Unstructured(sparsity, per).mask(score)
        assert (mask.dtype, mask.shape) == (torch.bool, score.shape)
        if per == "matrix":
            assert int((~mask).sum()) == reference.removed_count(score.numel(), sparsity)
        else:
            assert set((~mask).sum(dim=1).tolist()) == {reference.removed_count(shape[1], sparsity)}
        assert torch.equal(mask, expected(Unstructured(sparsity, per), score))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), NM_PAIRS)
def test_n_of_every_m_are_kept(dtype: torch.dtype, n: int, m: int) -> None:
    for rows, groups in ((1, 1), (5, 1), (1, 3), (6, 4)):
        score = scores(rows, groups * m, dtype)
        mask = NM(n, m).mask(score)
        assert (mask.dtype, mask.shape) == (torch.bool, score.shape)
        assert set(mask.reshape(-1, m).sum(dim=1).tolist()) == {n}
        assert torch.equal(mask, reference.select_nm(score, n, m))


def test_sparsity_of_a_pattern() -> None:
    assert NM(2, 4).sparsity == 0.5
    assert NM(1, 4).sparsity == 0.75
    assert NM(4, 4).sparsity == 0.0
    assert Unstructured(0.29).sparsity == 0.29


@pytest.mark.parametrize("pattern", [*EXACT, Unstructured(0.5, "search")], ids=str)
def test_patterns_are_patterns_and_values(pattern: Pattern) -> None:
    assert isinstance(pattern, Pattern)
    assert {pattern: 1}[pattern_from_json(pattern.to_json())] == 1
    with pytest.raises(AttributeError):
        pattern.extra = 1  # type: ignore[attr-defined]


# Ties


@pytest.mark.parametrize("value", [0.0, 1.0, float("inf")])
@pytest.mark.parametrize("pattern", EXACT, ids=str)
def test_of_constant_scores_the_lower_columns_go(pattern: Pattern, value: float) -> None:
    score = torch.full((4, width_for(pattern)), value)
    assert torch.equal(pattern.mask(score), expected(pattern, score))


def test_ties_spelled_out() -> None:
    score = torch.tensor([[1.0, 0.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    assert Unstructured(0.5, "row").mask(score).int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]
    assert Unstructured(0.25, "matrix").mask(score).int().tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert NM(1, 4).mask(score).int().tolist() == [[0, 0, 0, 1], [0, 0, 0, 1]]
    assert NM(1, 2).mask(score).int().tolist() == [[1, 0, 0, 1], [0, 1, 0, 1]]


@economical
@given(small_scores, st.integers(0, 99), st.sampled_from([None, "row", "matrix"]))
def test_unstructured_with_many_ties(rows: list[list[int]], percent: int, per: Any) -> None:
    score, pattern = torch.tensor(rows).float(), Unstructured(percent / 100, per)
    mask = pattern.mask(score)
    assert torch.equal(mask, expected(pattern, score))
    assert pattern.violation(mask) is None


@economical
@given(small_scores, st.integers(1, 12), st.data())
def test_nm_with_many_ties(rows: list[list[int]], groups: int, draw: st.DataObject) -> None:
    score = torch.tensor(rows).float().repeat(1, groups)
    m = draw.draw(st.sampled_from([size for size in range(1, 25) if score.shape[1] % size == 0]))
    pattern = NM(draw.draw(st.integers(1, m)), m)
    mask = pattern.mask(score)
    assert torch.equal(mask, expected(pattern, score))
    assert pattern.violation(mask) is None


def test_minus_infinity_goes_first_and_infinity_stays() -> None:
    score = torch.tensor([[0.0, -torch.inf, torch.inf, 1.0]])
    for pattern in (Unstructured(0.5), Unstructured(0.5, "matrix"), NM(2, 4)):
        assert pattern.mask(score).tolist() == [[False, False, True, True]]


# The best admissible mask


@pytest.mark.parametrize("shape", [(1, 4), (2, 4), (3, 4), (2, 6)], ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_no_admissible_mask_retains_more(shape: tuple[int, int], ties: bool) -> None:
    score = scores(*shape, torch.float64)
    score = (score * 3).round() if ties else score
    pairs = [(n, m) for n, m in NM_PAIRS if shape[1] % m == 0]
    assert len(pairs) >= 4
    for n, m in pairs:
        best = reference.best_retained(score, lambda mask, n=n, m=m: reference.obeys_nm(mask, n, m))
        assert reference.retained(score, NM(n, m).mask(score)) == pytest.approx(best, abs=1e-12)
    for sparsity in (0.0, 0.3, 0.5, 0.8):
        best = reference.best_retained(score, lambda mask, s=sparsity: reference.obeys_rows(mask, s))
        mask = Unstructured(sparsity, "row").mask(score)
        assert reference.retained(score, mask) == pytest.approx(best, abs=1e-12)
        best = reference.best_retained(score, lambda mask, s=sparsity: reference.obeys_matrix(mask, s))
        mask = Unstructured(sparsity, "matrix").mask(score)
        assert reference.retained(score, mask) == pytest.approx(best, abs=1e-12)


# Layouts: solvers call mask() on slices


@pytest.mark.parametrize("pattern", [*EXACT, Unstructured(0.5, "search")], ids=str)
def test_mask_of_any_layout(pattern: Pattern) -> None:
    width = width_for(pattern)
    wide = scores(5, 4 * width)
    layouts = {
        "column slice": wide[:, width : 2 * width],
        "strided": wide[::2, ::4],
        "one strided row": wide[:1, ::4],
        "transposed": scores(width, 5).t(),
        "expanded rows": scores(1, width).expand(5, width),
        "expanded columns": scores(5, 1).expand(5, width),
        "expanded both": scores(1, 1).expand(5, width),
        "expanded one row": scores(1, 1).expand(1, width),
    }
    for layout, score in layouts.items():
        before = score.clone()
        assert torch.equal(pattern.mask(score), pattern.mask(before.contiguous())), layout
        assert torch.equal(score, before), layout


@pytest.mark.parametrize(("n", "m"), NM_PAIRS)
def test_nm_on_aligned_column_slices_is_the_slice_of_the_mask(n: int, m: int) -> None:
    score = scores(5, 6 * m)
    whole = NM(n, m).mask(score)
    for start, stop in itertools.combinations(range(0, 6 * m + 1, m), 2):
        assert torch.equal(NM(n, m).mask(score[:, start:stop]), whole[:, start:stop])


@pytest.mark.parametrize("shape", [(2, 6), (4, 5), (2, 2)], ids=str)
def test_nm_groups_never_cross_rows(shape: tuple[int, int]) -> None:
    # The entries divide by 4, the width does not.
    with pytest.raises(PatternError, match=pinned(f"2:4 needs a width divisible by 4, got {shape[1]}.")):
        NM(2, 4).mask(scores(*shape))


# violation()


@pytest.mark.parametrize("pattern", EXACT, ids=str)
def test_every_single_restored_weight_is_found(pattern: Pattern) -> None:
    mask = pattern.mask(scores(4, width_for(pattern)))
    assert pattern.violation(mask) is None
    assert pattern.violation(torch.zeros_like(mask)) is None  # more zeros: some kept weights were zero before
    assert pattern.violation(mask.t().contiguous().t()) is None
    for row, column in (~mask).nonzero().tolist():
        broken = mask.clone()
        broken[row, column] = True
        sentence = pattern.violation(broken)
        assert sentence is not None
        if "row" in sentence:
            assert f"row {row}" in sentence
    everything = pattern.violation(torch.ones_like(mask))
    assert (everything is None) == bool(mask.all())


def test_violations_in_words() -> None:
    mask = torch.tensor([[1, 0, 1, 0, 1, 0, 1, 0], [1, 0, 1, 0, 0, 1, 1, 1]]).bool()
    assert Unstructured(0.5, "row").violation(mask) == "row 1 has 3 zeros, expected at least 4"
    assert Unstructured(0.5, "matrix").violation(mask) == "the matrix has 7 zeros, expected at least 8"
    assert Unstructured(0.5).violation(mask) == "the matrix has 7 zeros, expected at least 8"
    assert Unstructured(0.43, "matrix").violation(mask) is None
    assert NM(2, 4).violation(mask) == "row 1, columns 4 to 7: 3 non-zeros, expected at most 2"
    assert NM(4, 8).violation(mask) == "row 1, columns 0 to 7: 5 non-zeros, expected at most 4"
    assert NM(1, 2).violation(mask) == "row 1, columns 6 to 7: 2 non-zeros, expected at most 1"
    assert NM(2, 3).violation(mask) == "8 columns do not divide into groups of 3"


def test_the_count_may_be_right_and_the_place_wrong() -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 1]]).bool()
    assert Unstructured(0.5, "row").violation(mask) is None
    assert NM(2, 4).violation(mask) == "row 0, columns 0 to 3: 3 non-zeros, expected at most 2"
    uneven = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    assert Unstructured(0.5, "matrix").violation(uneven) is None
    assert Unstructured(0.5, "row").violation(uneven) == "row 0 has 0 zeros, expected at least 2"


def test_a_group_left_open_admits_rows_and_matrix() -> None:
    score, open_group = scores(8, 25), Unstructured(0.29)
    for per in ("row", "matrix"):
        assert open_group.violation(Unstructured(0.29, per).mask(score)) is None


# The searched row thresholds of Wanda's variant


@economical
@given(small_scores, st.integers(1, 90))
def test_search_is_the_published_bisection(rows: list[list[int]], percent: int) -> None:
    score = torch.tensor(rows).double()  # sums of small integers are exact in both
    assert torch.equal(search_rows(score, percent / 100), reference.search_rows(score, percent / 100))


@pytest.mark.parametrize(("sparsity", "off"), [(0.1, 0.01), (0.3, 0.001), (0.5, 0.001), (0.7, 0.001)])
def test_search_comes_near_the_sparsity_with_uneven_rows(sparsity: float, off: float) -> None:
    # At 0.1 the bracket of alpha is narrower than 0.001 before the sparsity is that close.
    score = scores(64, 256) ** torch.linspace(1, 4, 64).unsqueeze(1)
    pattern = Unstructured(sparsity, "search")
    mask = pattern.mask(score)
    assert abs(float((~mask).float().mean()) - sparsity) <= off
    assert torch.equal(mask, reference.search_rows(score.double(), sparsity))
    assert len(set(mask.sum(dim=1).tolist())) > 8
    assert pattern.violation(mask) is None
    for row, kept in zip(score, mask, strict=True):
        assert row[~kept].max() < row[kept].min()


def test_a_row_without_a_score_under_the_threshold_loses_nothing() -> None:
    # The published code indexes position -1 here. Each score of row 0 is half of its total.
    score = torch.tensor([[1.0, 1.0], [0.1, 1.0]])
    assert search_rows(score, 0.25).tolist() == [[True, True], [False, True]]


def test_search_removes_nothing_at_zero_and_stops_where_alpha_ends() -> None:
    score = torch.tensor([[1.0, 1.0, 1.0, 97.0]])
    assert bool(search_rows(score, 0.0).all())
    assert bool(search_rows(torch.zeros(2, 4), 0.0).all())
    assert search_rows(score, 0.99).tolist() == [[False, False, False, True]]
    assert not bool(search_rows(torch.zeros(2, 4), 0.5).any())


def test_search_with_totals_that_overflow() -> None:
    score = torch.ones(3, 8)
    score[1] = 1e38
    message = "the scores of row 1 add up to more than torch.float32 holds; use fixed counts per row or per matrix."
    with pytest.raises(NumericalError, match=pinned(message)):
        Unstructured(0.5, "search").mask(score)
    assert bool(Unstructured(0.5, "search").mask(score.double()).any())


# JSON and text


@pytest.mark.parametrize(
    "pattern",
    [*EXACT, Unstructured(0.5, "search"), *(Unstructured(sparsity) for sparsity in SPARSITIES)],
    ids=str,
)
def test_json_round_trip(pattern: Pattern) -> None:
    assert pattern_from_json(json.loads(json.dumps(pattern.to_json()))) == pattern


def test_json_and_text_of_a_pattern() -> None:
    assert NM(2, 4).to_json() == {"n": 2, "m": 4}
    assert Unstructured(0.5, "row").to_json() == {"sparsity": 0.5, "per": "row"}
    assert Unstructured(0.5).to_json() == {"sparsity": 0.5, "per": None}
    assert str(NM(2, 4)) == "2:4"
    assert str(Unstructured(0.5)) == "0.5 unstructured"
    assert str(Unstructured(0.29, "matrix")) == "0.29 unstructured per matrix"


@pytest.mark.parametrize("text", ["2:4", " 2:4 ", "2 : 4", "02:4"])
def test_parse_pattern(text: str) -> None:
    assert parse_pattern(text) == NM(2, 4)


@pytest.mark.parametrize(("n", "m"), NM_PAIRS)
def test_parse_what_str_wrote(n: int, m: int) -> None:
    assert parse_pattern(str(NM(n, m))) == NM(n, m)


def test_with_group_fills_only_an_open_group() -> None:
    assert with_group(Unstructured(0.5), "matrix") == Unstructured(0.5, "matrix")
    assert with_group(Unstructured(0.5, "row"), "matrix") == Unstructured(0.5, "row")
    assert with_group(NM(2, 4), "matrix") == NM(2, 4)


# Messages


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [
        (50, "sparsity must be at least 0 and below 1, got 50. Did you mean 0.5?"),
        (62.5, "sparsity must be at least 0 and below 1, got 62.5. Did you mean 0.625?"),
        (2, "sparsity must be at least 0 and below 1, got 2. Did you mean 0.02?"),
        (99, "sparsity must be at least 0 and below 1, got 99. Did you mean 0.99?"),
        (1.5, "sparsity must be at least 0 and below 1, got 1.5."),
        (1, "sparsity must be at least 0 and below 1, got 1."),
        (1.0, "sparsity must be at least 0 and below 1, got 1."),
        (100, "sparsity must be at least 0 and below 1, got 100."),
        (-0.1, "sparsity must be at least 0 and below 1, got -0.1."),
        (float("nan"), "sparsity must be at least 0 and below 1, got nan."),
        (float("inf"), "sparsity must be at least 0 and below 1, got inf."),
    ],
)
def test_sparsity_out_of_range(sparsity: float, message: str) -> None:
    with pytest.raises(PatternError, match=pinned(message)):
        Unstructured(sparsity)


def test_bad_group() -> None:
    with pytest.raises(PatternError, match=pinned("per must be row, matrix or search, got 'column'.")):
        Unstructured(0.5, "column")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("n", "m", "end"),
    [(4, 2, "4:2. Did you mean 2:4?"), (0, 4, "0:4."), (4, 0, "4:0."), (0, 0, "0:0."), (-1, 4, "-1:4.")],
)
def test_n_above_m(n: int, m: int, end: str) -> None:
    with pytest.raises(PatternError, match=pinned(f"N:M keeps N of every M weights, so 1 <= N <= M; got {end}")):
        NM(n, m)


def test_width_that_does_not_divide() -> None:
    message = (
        "model.layers.3.mlp.down_proj: 2:4 needs in_features divisible by 4, got 11010. "
        'Skip it with --skip "model.layers.3.mlp.down_proj" or choose an unstructured pattern.'
    )
    with pytest.raises(PatternError, match=pinned(message)):
        NM(2, 4).check("model.layers.3.mlp.down_proj", (4096, 11010))
    NM(2, 4).check("", (11010, 4096))
    Unstructured(0.5).check("", (3, 11010))


@pytest.mark.parametrize(
    "text", ["", "2", "2:", ":4", "2:4:8", "2/4", "50%", "0.5", "-2:4", "two:four", "2.0:4", "²:4", "2_0:40"]
)
def test_text_that_is_no_pattern(text: str) -> None:
    message = (
        f'pattern must be N:M, such as 2:4 (keep 2 of every 4), got "{text}". '
        "For unstructured pruning use --sparsity 0.5."
    )
    with pytest.raises(PatternError, match=pinned(message)):
        parse_pattern(text)


def test_text_with_n_above_m() -> None:
    message = "N:M keeps N of every M weights, so 1 <= N <= M; got 4:2. Did you mean 2:4?"
    with pytest.raises(PatternError, match=pinned(message)):
        parse_pattern("4:2")


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"n": 2},
        {"n": 2, "m": 4, "per": "row"},
        {"sparsity": 0.5},
        {"n": "2", "m": "4"},
        {"n": 2.5, "m": 4},
        {"n": True, "m": 4},
        {"n": None, "m": 4},
        {"sparsity": "0.5", "per": None},
        {"sparsity": None, "per": "row"},
        {"sparsity": True, "per": "row"},
        "2:4",
        0.5,
        None,
        ["n", "m"],
    ],
    ids=str,
)
def test_json_that_is_no_pattern(value: Any) -> None:
    message = f'a pattern is {{"n": 2, "m": 4}} or {{"sparsity": 0.5, "per": "row"}}, got {value!r}.'
    with pytest.raises(PatternError, match=pinned(message)):
        pattern_from_json(value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"n": 4, "m": 2}, "N:M keeps N of every M weights, so 1 <= N <= M; got 4:2. Did you mean 2:4?"),
        ({"sparsity": 50, "per": None}, "sparsity must be at least 0 and below 1, got 50. Did you mean 0.5?"),
        ({"sparsity": 0.5, "per": ["row"]}, "per must be row, matrix or search, got ['row']."),
    ],
    ids=str,
)
def test_json_with_impossible_numbers(value: Any, message: str) -> None:
    with pytest.raises(PatternError, match=pinned(message)):
        pattern_from_json(value)


def many(rows: int, columns: int) -> dict[str, Tensor]:
    """Scores with ties, infinities and both zeros."""
    random = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).abs()
    return {
        "random": random,
        "ascending": random.sort().values,
        "half zero": random * (random > 0.67),
        "a few values": (random * 4).round(),
        "all alike": torch.ones(rows, columns),
        "both zeros": torch.where(random > 0.67, 0.0, -0.0),
        "infinite": torch.where(random > 1, torch.inf, random),
        "float64": random.double() * 1e-300,
        "bfloat16": random.bfloat16(),
        "float16": random.half(),
    }


@pytest.mark.parametrize("kind", many(1, 1))
@pytest.mark.parametrize(("rows", "columns"), [(1, 70_001), (33, 100), (300, 1)])
def test_the_lowest_are_the_first_of_a_stable_sort(kind: str, rows: int, columns: int) -> None:
    score = many(rows, columns)[kind]
    order = score.sort(dim=1, stable=True).indices
    for count in {1, min(64, columns), columns // 3, columns // 2, columns - 1, columns}:
        expected = torch.zeros_like(score, dtype=torch.bool).scatter_(1, order[:, :count], True)
        assert torch.equal(lowest(score, count), expected), count
