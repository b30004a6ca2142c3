"""SparseGPT and its ablations: the published loop, on made and on real matrices."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
import reference_solvers
from layer_problems import correlated, gram_of, normal, problem, start_from
from real_data import DATA
from secateur.core.gram import Gram
from secateur.core.patterns import NM, Pattern, Unstructured
from secateur.core.problem import Method, Problem, chain
from secateur.methods import METHODS
from secateur.methods.magnitude import magnitude
from secateur.methods.obs_update import magnitude_iterative, obs_update, wanda_iterative
from secateur.methods.sparsegpt import sparsegpt
from secateur.methods.wanda import wanda

# Real matrices


@pytest.fixture(scope="module")
def real() -> dict[str, tuple[Tensor, Tensor]]:
    """Weights and inputs of three matrices of a real model, as wide as 64, 64 and 172 columns."""
    folder = DATA / "models" / "stories260K"
    if not folder.exists():
        pytest.skip(f"{folder} is not on this machine")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = (DATA / "lm" / "tinystories_sample.txt").read_text(encoding="utf-8")[:12000]
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", verbose=False).input_ids[:, : 4 * 512]
    names = ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj", "model.layers.4.mlp.down_proj")
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name in names:
        module = model.get_submodule(name)
        weight = module.weight.detach()
        module.register_forward_pre_hook(
            lambda _, inputs, name=name, weight=weight: found.__setitem__(name, (weight, inputs[0].flatten(0, -2)))
        )
    with torch.no_grad():
        model(input_ids=ids.view(4, -1), use_cache=False)
    return found


REAL = ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj", "model.layers.4.mlp.down_proj")
SELECTIONS: list[tuple[Pattern, Callable[[int], reference_solvers.Select], int]] = [
    (Unstructured(0.5), lambda rows: reference_solvers.pooled(rows, 0.5), 128),
    (Unstructured(0.67), lambda rows: reference_solvers.pooled(rows, 0.67), 128),
    (Unstructured(0.67, "row"), lambda rows: reference_solvers.row_by_row(0.67), 128),
    (NM(2, 4), lambda rows: reference_solvers.groups_of(2, 4), 4),
    (NM(4, 8), lambda rows: reference_solvers.groups_of(4, 8), 8),
    (NM(1, 4), lambda rows: reference_solvers.groups_of(1, 4), 4),
    (NM(3, 12), lambda rows: reference_solvers.groups_of(3, 12), 12),
    (NM(10, 43), lambda rows: reference_solvers.groups_of(10, 43), 43),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("pattern", "select", "every"),
    SELECTIONS,
    ids=lambda value: "" if callable(value) and not isinstance(value, Pattern) else str(value),
)
@pytest.mark.parametrize("name", REAL)
def test_sparsegpt_is_the_published_loop_on_real_matrices(
    real: dict[str, tuple[Tensor, Tensor]], name: str, pattern: Pattern, select: Any, every: int, dtype: torch.dtype
) -> None:
    weight, x = real[name]
    if isinstance(pattern, NM) and weight.shape[1] % pattern.m:
        pytest.skip(f"{weight.shape[1]} columns do not divide into groups of {pattern.m}")
    given = problem(weight, x, pattern, dtype)
    solution = sparsegpt().solve(given)
    expected, mask = reference_solvers.sparsegpt(given.weight, gram_of(given), select(len(weight)), every=every)
    assert torch.equal(solution.mask, mask)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(solution.weight.double(), expected, rtol=0, atol=tolerance)


# SparseGPT


@pytest.mark.parametrize(
    ("pattern", "select", "every"),
    SELECTIONS[:7],
    ids=lambda value: "" if callable(value) and not isinstance(value, Pattern) else str(value),
)
@pytest.mark.parametrize(("rows", "width"), [(24, 264), (1, 24), (40, 120), (7, 144), (5, 1104)])
def test_sparsegpt_is_the_published_loop(rows: int, width: int, pattern: Pattern, select: Any, every: int) -> None:
    if isinstance(pattern, NM) and width % pattern.m:
        pytest.skip(f"{width} columns do not divide into groups of {pattern.m}")
    given = problem(normal(rows, width, 1), correlated(600, width, outliers=(3, 17)), pattern, torch.float64)
    expected, mask = reference_solvers.sparsegpt(given.weight, gram_of(given), select(rows), every=every)
    solution = sparsegpt().solve(given)
    assert torch.equal(solution.mask, mask)
    torch.testing.assert_close(solution.weight, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sparsity", [0.1, 0.29, 0.5, 0.77])
@pytest.mark.parametrize("width", [1, 100, 129, 300])
def test_sparsegpt_removes_exactly_the_floor_of_the_share(sparsity: float, width: int) -> None:
    given = problem(normal(7, width, 1), correlated(400, width), Unstructured(sparsity))
    mask = sparsegpt().solve(given).mask
    assert int((~mask).sum()) == reference.removed_count(7 * width, sparsity)
    per_row = dataclasses.replace(given, pattern=Unstructured(sparsity, "row"))
    removed = (~sparsegpt().solve(per_row).mask).sum(dim=1)
    assert removed.tolist() == [reference.removed_count(width, sparsity)] * 7


def test_sparsegpt_with_dead_inputs() -> None:
    x = correlated(300, 140)
    x[:, [0, 5, 77, 139]] = 0
    given = problem(normal(9, 140, 1), x, Unstructured(0.5), torch.float64)
    solution = sparsegpt().solve(given)
    expected, mask = reference_solvers.sparsegpt(given.weight, gram_of(given), reference_solvers.pooled(9, 0.5))
    assert torch.equal(solution.mask, mask)
    assert not bool(solution.mask[:, [0, 5, 77, 139]].any()), "they go first"
    torch.testing.assert_close(solution.weight, expected, rtol=0, atol=1e-9)
    sparse = dataclasses.replace(given, pattern=Unstructured(0.01))
    assert not bool(sparsegpt().solve(sparse).weight[:, [0, 5, 77, 139]].any()), "and are zero when nothing has to go"


@pytest.mark.parametrize("name", ["magnitude_iterative", "wanda_iterative", "magnitude+obs_update"])
def test_ablations_with_dead_inputs(name: str) -> None:
    x = correlated(300, 140)
    x[:, [0, 5, 77, 139]] = 0
    given = problem(normal(9, 140, 1), x, Unstructured(0.1), torch.float64)
    method = chain(magnitude(), obs_update()) if "+" in name else METHODS[name]()
    solution = method.solve(given)
    assert not bool(solution.weight[:, [0, 5, 77, 139]].any()), "zero, whatever the mask says, as published"
    if "+" in name:
        assert torch.equal(solution.mask, magnitude().solve(given).mask)


def test_the_first_scores_of_sparsegpt_are_those_of_wanda_for_independent_inputs() -> None:
    """For a diagonal Gram matrix and no damping ``w² / U_jj²`` is Wanda's score squared, and nothing is updated."""
    total = torch.diag(torch.linspace(0.1, 30, 96, dtype=torch.float64) ** 2)
    weight = normal(12, 96, 1).double()
    given = Problem("w", weight, Unstructured(0.5, "matrix"), {Gram: Gram(total, 500, 5)})
    one, other = sparsegpt(damping=0.0).solve(given), wanda().solve(given)
    assert torch.equal(one.mask, other.mask)
    torch.testing.assert_close(one.weight, other.weight, rtol=1e-12, atol=0)
    in_groups = dataclasses.replace(given, pattern=NM(2, 4))
    assert torch.equal(sparsegpt(damping=0.0).solve(in_groups).mask, wanda().solve(in_groups).mask)


def test_one_column_block_is_exact_optimal_brain_surgery_for_one_weight() -> None:
    """Removing one weight of the first column makes up for it with all others, as well as can be without damping."""
    x = correlated(200, 12).double()
    weight = normal(1, 12, 1).double()
    mask = torch.ones(1, 12, dtype=torch.bool)
    mask[0, 0] = False
    given = problem(weight, x, Unstructured(0.0), torch.float64)
    expected = reference_solvers.least_squares(weight, x, mask)
    assert not torch.equal(expected, weight * mask)
    solution = chain(start_from(mask), obs_update(damping=0.0)).solve(given)
    torch.testing.assert_close(solution.weight, expected)


@pytest.mark.parametrize("make", [magnitude, wanda], ids=["magnitude", "wanda"])
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_sequential_ablation_is_the_published_loop_with_a_given_mask(make: Any, pattern: Pattern) -> None:
    given = problem(normal(10, 200, 1), correlated(500, 200), pattern, torch.float64)
    solution = chain(make(), obs_update()).solve(given)
    mask = make().solve(given).mask
    expected, _ = reference_solvers.obs_loop(
        given.weight,
        gram_of(given),
        lambda w, first, pivots: w,
        lambda score, first: mask[:, first : first + score.shape[1]],
    )
    assert torch.equal(solution.mask, mask)
    torch.testing.assert_close(solution.weight, expected, rtol=0, atol=1e-9)
    assert solution.notes["obs_update_damping"] == 0.01


@pytest.mark.parametrize(
    ("pattern", "select", "every"),
    [SELECTIONS[0], SELECTIONS[3]],
    ids=lambda value: "" if callable(value) and not isinstance(value, Pattern) else str(value),
)
def test_iterative_ablations_are_the_published_loop(pattern: Pattern, select: Any, every: int) -> None:
    x = correlated(500, 200, outliers=(4,))
    given = problem(normal(10, 200, 1), x, pattern, torch.float64)
    norm = x.double().norm(dim=0)
    score_of: dict[Callable[[], Method], Any] = {
        magnitude_iterative: lambda w, first, pivots: w.abs(),
        wanda_iterative: lambda w, first, pivots: w.abs() * norm[first : first + w.shape[1]],
    }
    for make, score in score_of.items():
        solution = make().solve(given)
        expected, mask = reference_solvers.obs_loop(given.weight, gram_of(given), score, select(10), every=every)
        assert torch.equal(solution.mask, mask)
        torch.testing.assert_close(solution.weight, expected, rtol=0, atol=1e-6)
