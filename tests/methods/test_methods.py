"""The contract that every method keeps, with every pattern and dtype, and each method against its equation."""

import dataclasses
import json
import re
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
import tiny
from secateur.core import scores
from secateur.core.gradients import GradientKind, GradientNorm
from secateur.core.gram import Gram
from secateur.core.patterns import NM, Pattern, Unstructured, with_group
from secateur.core.problem import Method, Problem, Solution, select
from secateur.core.statistics import SquaredNorm, Statistic
from secateur.errors import NumericalError
from secateur.methods import METHODS
from secateur.methods.magnitude import magnitude
from secateur.methods.wanda import wanda, wanda_variant

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
PATTERNS: list[Pattern] = [
    Unstructured(0.5),
    Unstructured(0.0, "row"),
    Unstructured(0.29, "row"),
    Unstructured(0.29, "matrix"),
    Unstructured(0.9, "matrix"),
    Unstructured(0.5, "search"),
    NM(2, 4),
    NM(1, 4),
    NM(4, 8),
    NM(3, 12),
    NM(4, 4),
]
ROWS, COLUMNS, TOKENS = 10, 24, 40

UPDATING = {name for name, make in METHODS.items() if Gram in make().needs}  # the others only score
every_method = pytest.mark.parametrize("name", METHODS)
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
PAIRS = list(product(METHODS, PATTERNS))


def pinned(message: str) -> str:
    return f"^{re.escape(message)}$"


def normal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def inputs(columns: int = COLUMNS) -> Tensor:
    return normal(TOKENS, columns, 1) * torch.linspace(0.1, 3, columns)


def statistics(method: Method, x: Tensor) -> dict[type[Statistic], Statistic]:
    """Everything that a method needs, from two calibration samples."""
    result: dict[type[Statistic], Statistic] = {}
    for kind in method.inputs:
        statistic = result[kind] = kind.empty(x.shape[1])
        statistic.update(x[: TOKENS // 2], samples=1)
        statistic.update(x[TOKENS // 2 :], samples=1)
    return result


def problem(
    method: Method,
    pattern: Pattern,
    dtype: torch.dtype = torch.float32,
    *,
    weight: Tensor | None = None,
    x: Tensor | None = None,
) -> Problem:
    weight = normal(ROWS, COLUMNS, 0) if weight is None else weight
    x = inputs(weight.shape[1]) if x is None else x
    evidence: dict[Any, Any] = dict(statistics(method, x))
    if method.gradient is not None:
        evidence[method.gradient] = gradients(method.gradient, weight)
    return Problem("model.layers.0.mlp.up_proj.weight", weight.to(dtype), pattern, evidence)


def gradients(kind: GradientKind, weight: Tensor) -> GradientNorm:
    """Gradients of two samples, with entries that differ by orders of magnitude."""
    result = GradientNorm.empty(kind, (weight.shape[0], weight.shape[1]))
    for seed in (2, 3):
        result.update(normal(*weight.shape, seed) * torch.logspace(-6, -3, weight.shape[1]), tokens=TOKENS // 2)
    return result


def bits(weight: Tensor) -> Tensor:
    return weight.contiguous().view(BITS[weight.dtype.itemsize])


def assert_contract(given: Problem, solution: Solution, method: Method) -> None:
    assert isinstance(solution, Solution)
    assert (solution.weight.dtype, solution.weight.shape) == (given.weight.dtype, given.weight.shape)
    assert (solution.mask.dtype, solution.mask.shape) == (torch.bool, given.weight.shape)
    assert with_group(given.pattern, method.per).violation(solution.mask) is None
    assert bool((bits(solution.weight)[~solution.mask] == 0).all()), "removed weights are +0.0"
    assert bool(solution.weight.isfinite().all())
    assert all(isinstance(value, float) for value in solution.notes.values())


@dataclasses.dataclass(frozen=True)
class Recording:
    """A pattern of a user's own, which writes down the scores that it is shown."""

    seen: list[Tensor]
    sparsity: float = 0.5

    def mask(self, score: Tensor) -> Tensor:
        self.seen.append(score)
        return Unstructured(self.sparsity, "row").mask(score)

    def check(self, name: str, shape: tuple[int, int]) -> None: ...

    def violation(self, mask: Tensor) -> str | None:
        return Unstructured(self.sparsity, "row").violation(mask)

    def to_json(self) -> dict[str, Any]:
        return {}


# Every method


@every_method
def test_a_method_is_made_without_arguments_under_its_own_name(name: str) -> None:
    method = METHODS[name]()
    assert method.name == name
    assert isinstance(method.needs, frozenset)
    assert all(isinstance(kind.empty(3), Statistic) for kind in method.inputs)
    assert method.per in ("row", "matrix", "search")
    assert METHODS[name].__doc__


@tiny.pairs_by_turns("name, pattern, dtype", PAIRS, DTYPES)
def test_contract(name: str, pattern: Pattern, dtype: torch.dtype) -> None:
    method = METHODS[name]()
    weight = normal(ROWS, COLUMNS, 0)
    weight[0, :3] = torch.tensor([0.0, -0.0, -1.0])
    given = problem(method, pattern, dtype, weight=weight)
    solution = method.solve(given)
    assert_contract(given, solution, method)
    same = (bits(solution.weight) == bits(given.weight))[solution.mask]
    if name not in UPDATING:
        assert bool(same.all()), "kept weights are bit-identical"
    elif not bool(solution.mask.all()):
        assert not bool(same.all()), "kept weights make up for the removed ones"


def sums(statistic: Any) -> str:
    """All that a statistic holds, as text; a Gram matrix mirrors its triangle when its sum is first looked at."""
    assert statistic.total is not None
    return json.dumps(
        vars(statistic), default=lambda value: value.tolist() if isinstance(value, Tensor) else str(value)
    )


@tiny.pairs_by_turns("name, pattern, dtype", PAIRS, DTYPES)
def test_solve_is_pure_and_deterministic(name: str, pattern: Pattern, dtype: torch.dtype) -> None:
    method = METHODS[name]()
    given = problem(method, pattern, dtype)
    weight = given.weight.clone()
    before = {kind: sums(statistic) for kind, statistic in given.evidence.items()}
    first, second = method.solve(given), METHODS[name]().solve(given)
    assert torch.equal(bits(given.weight), bits(weight))
    for kind, statistic in given.evidence.items():
        assert sums(statistic) == before[kind]
    assert torch.equal(bits(first.weight), bits(second.weight))
    assert torch.equal(first.mask, second.mask)
    first.weight.zero_()
    assert torch.equal(bits(given.weight), bits(weight)), "the solution shares no memory with the problem"


@every_method
@every_dtype
def test_scores_are_float32_or_wider(name: str, dtype: torch.dtype) -> None:
    method = METHODS[name]()
    recording = Recording([])
    given = problem(method, recording, dtype)
    assert_contract(given, method.solve(given), method)
    assert recording.seen
    for score in recording.seen:
        assert score.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert score.shape == given.weight.shape


@every_method
@every_pattern
def test_stored_transposed(name: str, pattern: Pattern) -> None:
    method = METHODS[name]()
    row_major = problem(method, pattern)
    column_major = dataclasses.replace(row_major, weight=row_major.weight.t().contiguous().t())
    one, other = method.solve(row_major), method.solve(column_major)
    assert torch.equal(one.mask, other.mask)
    assert torch.equal(one.weight, other.weight)


@every_method
def test_an_open_group_is_the_one_of_the_method(name: str) -> None:
    method = METHODS[name]()
    left_open = method.solve(problem(method, Unstructured(0.5)))
    for per in ("row", "matrix", "search"):
        spelled_out = method.solve(problem(method, Unstructured(0.5, per)))
        assert torch.equal(left_open.mask, spelled_out.mask) == (per == method.per)


@every_method
@pytest.mark.parametrize(
    ("shape", "pattern"),
    [
        ((1, COLUMNS), Unstructured(0.5, "row")),
        ((1, COLUMNS), Unstructured(0.5, "matrix")),
        ((1, COLUMNS), Unstructured(0.5, "search")),
        ((1, COLUMNS), NM(2, 4)),
        ((COLUMNS, 1), Unstructured(0.5, "row")),
        ((COLUMNS, 1), Unstructured(0.5, "matrix")),
        ((COLUMNS, 1), Unstructured(0.5, "search")),
        ((COLUMNS, 1), NM(1, 1)),
        ((1, 1), Unstructured(0.5, "matrix")),
    ],
    ids=str,
)
def test_one_row_and_one_column(name: str, shape: tuple[int, int], pattern: Pattern) -> None:
    method = METHODS[name]()
    given = problem(method, pattern, weight=normal(*shape, 0))
    assert_contract(given, method.solve(given), method)
    assert torch.equal(given.weight, normal(*shape, 0)), "a view of one row is contiguous either way round"


@every_method
@every_pattern
def test_a_matrix_of_ties(name: str, pattern: Pattern) -> None:
    method = METHODS[name]()
    given = problem(method, pattern, weight=-torch.ones(ROWS, COLUMNS), x=torch.ones(TOKENS, COLUMNS))
    if method.gradient is not None:
        equal = GradientNorm(method.gradient, torch.full((ROWS, COLUMNS), 0.25), TOKENS, 2)
        given = dataclasses.replace(given, evidence={**given.evidence, method.gradient: equal})
    solution = method.solve(given)
    assert_contract(given, solution, method)
    group = with_group(pattern, method.per)
    score = torch.ones(ROWS, COLUMNS)
    if name in UPDATING:
        return  # after the first update nothing is tied
    if isinstance(group, NM):
        assert torch.equal(solution.mask, reference.select_nm(score, group.n, group.m))
    elif isinstance(group, Unstructured) and group.per != "search":
        selection = reference.select_matrix if group.per == "matrix" else reference.select_rows
        assert torch.equal(solution.mask, selection(score, group.sparsity))
    elif isinstance(group, Unstructured):
        assert torch.equal(solution.mask, reference.search_rows(score, group.sparsity))


@tiny.pairs_by_turns("name, pattern, nothing", PAIRS, ["weight", "inputs", "both"])
def test_all_zeros_are_no_error(name: str, pattern: Pattern, nothing: str) -> None:
    method = METHODS[name]()
    weight = torch.zeros(ROWS, COLUMNS) if nothing != "inputs" else None
    x = torch.zeros(TOKENS, COLUMNS) if nothing != "weight" else None
    given = problem(method, pattern, weight=weight, x=x)
    assert_contract(given, method.solve(given), method)


@every_method
def test_a_missing_statistic_is_named(name: str) -> None:
    method = METHODS[name]()
    empty = Problem("model.layers.0.mlp.up_proj.weight", normal(ROWS, COLUMNS, 0), NM(2, 4))
    if not method.needs:
        assert method.solve(empty).mask.sum() == ROWS * COLUMNS / 2
        return
    with pytest.raises(KeyError) as caught:
        method.solve(empty)
    assert any(
        caught.value.args[0]
        == f"model.layers.0.mlp.up_proj.weight: {kind.__name__} was not collected; list it in the needs of the method."
        for kind in method.inputs
    ) or (method.gradient is not None and "no gradients were collected" in caught.value.args[0])


# Scores


@every_dtype
def test_magnitude_score_is_the_absolute_value(dtype: torch.dtype) -> None:
    given = problem(magnitude(), NM(2, 4), dtype)
    score = scores.magnitude(given)
    assert torch.equal(score.double(), reference.magnitude_score(given.weight))


@every_dtype
def test_wanda_score_is_the_equation_up_to_one_factor(dtype: torch.dtype) -> None:
    given = problem(wanda(), NM(2, 4), dtype)
    score = scores.wanda(given).double()
    samples = given.statistic(SquaredNorm).samples
    equation = reference.wanda_score(given.weight, inputs())
    torch.testing.assert_close(score * samples**0.5, equation, rtol=1e-6, atol=0.0)


# Paper: the masks of each method against its equation


@every_dtype
@pytest.mark.parametrize("sparsity", [0.29, 0.5, 0.75])
def test_magnitude_against_the_reference(dtype: torch.dtype, sparsity: float) -> None:
    given = problem(magnitude(), Unstructured(sparsity), dtype)
    expected = reference.select_matrix(reference.magnitude_score(given.weight), sparsity)
    assert torch.equal(magnitude().solve(given).mask, expected)


@every_dtype
@pytest.mark.parametrize("sparsity", [0.29, 0.5, 0.75])
def test_wanda_against_the_reference(dtype: torch.dtype, sparsity: float) -> None:
    given = problem(wanda(), Unstructured(sparsity), dtype)
    score = reference.wanda_score(given.weight, inputs())
    assert torch.equal(wanda().solve(given).mask, reference.select_rows(score, sparsity))
    matrix = dataclasses.replace(given, pattern=Unstructured(sparsity, "matrix"))
    assert torch.equal(wanda().solve(matrix).mask, reference.select_matrix(score, sparsity))


@every_dtype
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(4, 8), NM(3, 12), NM(6, 24)], ids=str)
def test_n_of_m_against_the_reference(dtype: torch.dtype, pattern: NM) -> None:
    given = problem(wanda(), pattern, dtype)
    score = reference.wanda_score(given.weight, inputs())
    assert torch.equal(wanda().solve(given).mask, reference.select_nm(score, pattern.n, pattern.m))
    score = reference.magnitude_score(given.weight)
    assert torch.equal(magnitude().solve(given).mask, reference.select_nm(score, pattern.n, pattern.m))


@every_dtype
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.6])
def test_wanda_variant_against_the_reference(dtype: torch.dtype, sparsity: float) -> None:
    given = problem(wanda_variant(), Unstructured(sparsity), dtype)
    expected = reference.search_rows(reference.wanda_score(given.weight, inputs()), sparsity)
    assert torch.equal(wanda_variant().solve(given).mask, expected)


def test_wanda_removes_a_large_weight_on_a_silent_input() -> None:
    x = torch.ones(TOKENS, 4)
    x[:, 2] = 0.001
    weight = torch.tensor([[1.0, 2.0, 100.0, 3.0]])
    assert wanda().solve(problem(wanda(), Unstructured(0.25), weight=weight, x=x)).mask.tolist() == [[1, 1, 0, 1]]
    assert magnitude().solve(problem(magnitude(), Unstructured(0.25), weight=weight)).mask.tolist() == [[0, 1, 1, 1]]


def test_inputs_that_are_always_zero_go_first_and_by_column() -> None:
    x = inputs()
    x[:, [3, 8, 21]] = 0
    mask = wanda().solve(problem(wanda(), Unstructured(2 / COLUMNS + 1e-9), x=x)).mask
    assert {tuple((~row).nonzero().flatten().tolist()) for row in mask} == {(3, 8)}


def test_wanda_does_not_depend_on_how_tokens_are_cut_into_samples() -> None:
    given = problem(wanda(), Unstructured(0.5))
    whole = SquaredNorm.empty(COLUMNS)
    whole.update(inputs(), samples=1)
    other = dataclasses.replace(given, evidence={SquaredNorm: whole})
    assert torch.equal(wanda().solve(given).mask, wanda().solve(other).mask)


# Numbers that are not finite


def test_scores_that_overflow() -> None:
    weight = torch.ones(ROWS, COLUMNS)
    weight[2, 5] = weight[7, 5] = 1e30
    total = torch.ones(COLUMNS, dtype=torch.float64)
    total[5] = 1e30**2
    given = Problem("model.layers.0.w", weight, NM(2, 4), {SquaredNorm: SquaredNorm(total, tokens=9, samples=1)})
    with pytest.raises(NumericalError, match=r"^model\.layers\.0\.w: \d+ of 240 wanda scores are not finite "):
        wanda().solve(given)
    total[5] = 1e20**2 / 1e10  # ||X_5|| = 1e15, whose square float32 holds
    message = (
        "model.layers.0.w: 2 of 240 wanda scores are not finite although weights and statistics are: "
        "their product overflows float32."
    )
    with pytest.raises(NumericalError, match=pinned(message)):
        wanda().solve(given)
    assert NM(2, 4).violation(wanda().solve(dataclasses.replace(given, weight=weight.double())).mask) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@every_method
def test_weights_that_are_not_finite(name: str, value: float) -> None:
    method = METHODS[name]()
    weight = normal(ROWS, COLUMNS, 0)
    weight[3, 4] = value
    what = "weights are" if name in UPDATING else rf"{name} scores "
    with pytest.raises(NumericalError, match=rf"^model\.layers\.0\.mlp\.up_proj\.weight: \d+ of 240 {what}"):
        method.solve(problem(method, NM(2, 4), weight=weight))


# A method of a user's own


def test_a_score_of_ones_own_is_a_method_in_one_line() -> None:
    keep_negative = select("keep-negative", lambda problem: -problem.weight.float())
    given = problem(keep_negative, Unstructured(0.5), torch.bfloat16)
    solution = keep_negative.solve(given)
    assert_contract(given, solution, keep_negative)
    for row, kept in zip(given.weight, solution.mask, strict=True):
        assert row[kept].max() <= row[~kept].min()


class LargestInput:
    """A statistic of a user's own: the largest absolute value of each input."""

    def __init__(self, largest: Tensor) -> None:
        self.largest, self.tokens, self.samples = largest, 0, 0

    @classmethod
    def empty(cls, in_features: int, device: torch.device | str = "cpu") -> "LargestInput":
        return cls(torch.zeros(in_features, device=device))

    def update(self, x: Tensor, samples: int = 0) -> None:
        self.largest = torch.maximum(self.largest, x.float().abs().amax(dim=0))
        self.tokens, self.samples = self.tokens + x.shape[0], self.samples + samples

    def merge(self, other: "LargestInput") -> None:
        self.largest = torch.maximum(self.largest, other.largest)
        self.tokens, self.samples = self.tokens + other.tokens, self.samples + other.samples

    def select(self, columns: Tensor) -> "LargestInput":
        return LargestInput(self.largest[columns])

    def is_finite(self) -> bool:
        return bool(self.largest.isfinite().all())


def test_a_method_and_a_statistic_of_ones_own() -> None:
    def solve(problem: Problem) -> Solution:
        mask = problem.pattern.mask(problem.weight.abs() * problem.statistic(LargestInput).largest)
        return Solution(problem.weight * mask * 2, mask, {"scale": 2.0})

    doubled = Method("doubled", solve, needs=frozenset({LargestInput}))
    given = problem(doubled, NM(2, 4))
    solution = doubled.solve(given)
    assert doubled.per == "row"
    assert solution.notes == {"scale": 2.0}
    largest = inputs().abs().amax(dim=0).double()
    assert torch.equal(solution.mask, reference.select_nm(reference.magnitude_score(given.weight) * largest, 2, 4))
    assert torch.equal(solution.weight, given.weight * solution.mask * 2)
