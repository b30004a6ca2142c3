"""Methods with gradients: their equations, and what they do in `prune`."""

# ruff: noqa: F811 - fixtures of another file

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import reference
import tiny
from full_autograd import (
    NORMS,
    assert_same_weights,
    dense,
    each_norm,
    file,  # noqa: F401
    ids,  # noqa: F401
    llama,  # noqa: F401
    output_norm,
    own_calls,
    take,
)
from secateur.core.gradients import GradientKind, GradientNorm
from secateur.core.patterns import NM, Pattern, Unstructured
from secateur.core.problem import Method, Problem
from secateur.core.statistics import SquaredNorm
from secateur.methods import METHODS
from secateur.methods.gblm import gblm, gblm_inverse, gradient
from secateur.methods.pruner_zero import pruner_zero
from secateur.methods.wanda import wanda
from secateur.methods.wanda_plus import wanda_plus
from secateur.pruning.engine import prune

PATTERNS: dict[str, Pattern] = {
    "row": Unstructured(0.5, "row"),
    "matrix": Unstructured(0.5, "matrix"),
    "search": Unstructured(0.5, "search"),
    "2:4": NM(2, 4),
    "4:8": NM(4, 8),
}
each_pattern = pytest.mark.parametrize("pattern", list(PATTERNS.values()), ids=list(PATTERNS))


# Methods


def inputs_of_samples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    scales = torch.linspace(0.1, 3.0, 16)
    return [(torch.randn(9, 16, generator=generator) * scales).double() for _ in range(5)]


def gradients_of_samples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(10, 16, generator=generator).mul(1e-3).double() for _ in range(5)]


@dataclass(frozen=True)
class Recording:
    """A pattern that writes down the scores that it is shown."""

    seen: list[Tensor]
    sparsity: float = 0.5

    def mask(self, score: Tensor) -> Tensor:
        self.seen.append(score)
        return Unstructured(self.sparsity, "row").mask(score)

    def check(self, name: str, shape: tuple[int, int]) -> None: ...

    def violation(self, mask: Tensor) -> str | None:
        return None

    def to_json(self) -> dict[str, Any]:
        return {}


def small_problem(method: Method, pattern: Pattern, dtype: torch.dtype) -> Problem:
    weight = torch.randn(10, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    squares = SquaredNorm.empty(16)
    for x in inputs_of_samples():
        squares.update(x if dtype == torch.float64 else x.float(), samples=1)
    assert method.gradient is not None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    total = GradientNorm.empty(method.gradient, (10, 16), dtype=wide)
    for own in gradients_of_samples():
        total.update(own)
    return Problem("model.layers.0.w", weight, pattern, {SquaredNorm: squares, method.gradient: total})


EQUATIONS: dict[str, tuple[Method, Callable[[Tensor], Tensor]]] = {
    f"{name}-{norm}": (method, score)
    for norm in NORMS
    for name, method, score in (
        (
            "gblm",
            gblm(norm),
            lambda w, n=norm: reference.gblm_score(w, inputs_of_samples(), gradients_of_samples(), n, 100.0),
        ),
        (
            "gblm-1000",
            gblm(norm, 1000.0),
            lambda w, n=norm: reference.gblm_score(w, inputs_of_samples(), gradients_of_samples(), n, 1000.0),
        ),
        (
            "gblm_inverse",
            gblm_inverse(norm),
            lambda w, n=norm: reference.gblm_inverse_score(w, inputs_of_samples(), gradients_of_samples(), n, 100.0),
        ),
        ("gradient", gradient(norm), lambda w, n=norm: reference.gradient_score(w, gradients_of_samples(), n)),
        ("pruner_zero", pruner_zero(norm), lambda w, n=norm: reference.pruner_zero_score(w, gradients_of_samples(), n)),
    )
} | {
    f"wanda_plus-{alpha}": (
        wanda_plus(alpha),
        lambda w, a=alpha: reference.wanda_plus_score(w, inputs_of_samples(), gradients_of_samples(), a),
    )
    for alpha in (100.0, 1000.0)
}


@pytest.mark.parametrize(("method", "equation"), EQUATIONS.values(), ids=EQUATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scores_are_the_equations(method, equation, dtype):
    seen: list[Tensor] = []
    given = small_problem(method, Recording(seen), dtype)
    before = given.weight.clone(), given.gradient_norm().total.clone()
    method.solve(given)
    expected = equation(given.weight)
    assert expected.dtype == torch.float64
    assert seen[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # The mean over samples of an input's squares is float32 whatever the weights.
    tolerance = 1e-12 if dtype == torch.float64 and not method.needs else 1e-6
    largest = float(expected.max())
    torch.testing.assert_close(seen[0].double(), expected, rtol=tolerance, atol=tolerance * largest)
    assert torch.equal(given.weight, before[0])
    assert torch.equal(given.gradient_norm().total, before[1])
    for pattern, mask in (
        (Unstructured(0.5), reference.select_rows(expected, 0.5)),
        (Unstructured(0.3, "matrix"), reference.select_matrix(expected, 0.3)),
        (Unstructured(0.5, "search"), reference.search_rows(expected, 0.5)),
        (NM(2, 4), reference.select_nm(expected, 2, 4)),
        (NM(4, 8), reference.select_nm(expected, 4, 8)),
    ):
        assert torch.equal(method.solve(replace(given, pattern=pattern)).mask, mask), pattern


def test_what_methods_ask_for():
    asked = {name: METHODS[name]().gradient for name in METHODS}
    assert {name: kind for name, kind in asked.items() if kind is not None} == {
        "gblm": GradientKind("l1"),
        "gblm_inverse": GradientKind("l1"),
        "gradient": GradientKind("l1"),
        "wanda_plus": GradientKind("l2", "sample", "block"),
        "pruner_zero": GradientKind("l2"),
    }
    assert METHODS["gradient"]().inputs == METHODS["pruner_zero"]().inputs == frozenset()
    for name in ("gblm", "gblm_inverse", "wanda_plus"):
        assert METHODS[name]().inputs == {SquaredNorm}


@each_norm
def test_the_paper_and_its_code_rank_alike(norm):
    """With sqrt(samples) times the alpha, the norm over all samples is sqrt(samples) times the whole score."""
    weight = small_problem(gblm(), NM(2, 4), torch.float64).weight
    inputs, gradients = inputs_of_samples(), gradients_of_samples()
    root = len(inputs) ** 0.5
    code = reference.gblm_score(weight, inputs, gradients, norm, 100.0)
    paper = reference.gblm_paper_score(weight, inputs, gradients, norm, 100.0 * root)
    torch.testing.assert_close(paper, code * root, rtol=1e-6, atol=0)


def test_gradients_that_are_all_equal_leave_pruner_zero_with_ties():
    method = pruner_zero()
    given = small_problem(method, NM(2, 4), torch.float32)
    given.gradient_norm().total.fill_(0.25)
    assert torch.equal(method.solve(given).mask, reference.select_nm(torch.zeros(10, 16), 2, 4))


@pytest.mark.parametrize("name", ["gblm", "gblm_inverse", "gradient", "wanda_plus", "pruner_zero"])
def test_a_problem_without_gradients(name):
    method = METHODS[name]()
    given = small_problem(method, NM(2, 4), torch.float32)
    given = replace(given, evidence={SquaredNorm: given.statistic(SquaredNorm)})
    message = "model.layers.0.w: no gradients were collected; list a GradientKind in the needs of the method."
    with pytest.raises(KeyError) as caught:
        method.solve(given)
    assert caught.value.args == (message,)


# In pruning


def masks_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor != 0 for name, tensor in load_file(folder / "model.safetensors").items() if tensor.dim() == 2}


@tiny.pairs_by_turns("pattern, norm", PATTERNS.values(), NORMS)
def test_gblm_lies_between_wanda_and_gradient(norm, pattern, llama, ids, file, tmp_path):
    """At powers of two both limits are exact: the smaller term is below the rounding of the larger one."""

    def pruned(name: str, method: Method) -> Path:
        given = file.path if method.gradient is not None else None
        prune(llama, method=method, pattern=pattern, calibration=ids, gradient=given, output=tmp_path / name)
        return tmp_path / name

    plain, alone = pruned("wanda", wanda()), pruned("gradient", gradient(norm))
    assert_same_weights(pruned("small", gblm(norm, 2.0**-60)), plain)
    assert_same_weights(pruned("none", gblm(norm, 0.0)), plain)
    assert_same_weights(pruned("large", gblm(norm, 2.0**60)), alone)
    # At the default alpha the masks lie in between: unlike both.
    between = masks_of(pruned("gblm", gblm(norm)))
    for other in (plain, alone):
        assert any(not torch.equal(mask, between[name]) for name, mask in masks_of(other).items())


def wanda_plus_by_hand(folder: Path, ids: Tensor, sparsity: float, *, behind_pruned: bool) -> dict[str, Tensor]:
    """{name: mask}: block by block, regional gradients by autograd on inputs behind the blocks pruned so far."""
    model = dense(folder)
    masks = {}
    for index, block in enumerate(model.model.layers):
        linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        squares = {name: torch.zeros(module.in_features).double() for name, module in linears.items()}
        regional = {name: torch.zeros_like(module.weight) for name, module in linears.items()}

        def keep(name: str, _: Any, x: Any, y: Any, squares: dict[str, Tensor] = squares) -> None:
            squares[name] += x[0][0].detach().square().sum(0)

        for row in ids:
            ((_, args, kwargs),) = own_calls(model, [block], row)
            handles = [module.register_forward_hook(partial(keep, name)) for name, module in linears.items()]
            found = torch.autograd.grad(output_norm(block, args, kwargs), [m.weight for m in linears.values()])
            for handle in handles:
                handle.remove()
            for name, own in zip(linears, found, strict=True):
                regional[name] += own**2
        for name, module in linears.items():
            g = (regional[name] / len(ids)).sqrt()
            score = (module.weight.abs() * (squares[name].sqrt() + 100 * g)).detach()
            mask = masks[f"model.layers.{index}.{name}.weight"] = reference.select_rows(score, sparsity)
            if behind_pruned:
                module.weight.data.mul_(mask)
    return masks


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("propagate", ["pruned", "dense"])
def test_wanda_plus_sees_the_dense_block_behind_pruned_ones(name, propagate, ids, tmp_path):
    source = tiny.save(name, tmp_path / "source")
    prune(source, method=wanda_plus(), calibration=ids, dtype="float64", propagate=propagate, output=tmp_path / "out")
    by_hand = wanda_plus_by_hand(source, ids, 0.5, behind_pruned=propagate == "pruned")
    got = masks_of(tmp_path / "out")
    different = {name: int((mask != got[name]).sum()) for name, mask in by_hand.items()}
    assert len(different) == 7 * tiny.BLOCKS
    assert not any(different.values()), different


def test_wanda_plus_in_batches(ids, llama, tmp_path):
    for batch_size in (1, 3):
        out = tmp_path / f"out-{batch_size}"
        prune(llama, method=wanda_plus(), calibration=ids, dtype="float64", batch_size=batch_size, output=out)
    assert_same_weights(tmp_path / "out-1", tmp_path / "out-3")


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "gemma3n_text"])
def test_regional_gradients_from_a_file_are_those_of_dense_blocks(name, tmp_path):
    source = tiny.save(name, tmp_path / "source")
    ids = tiny.tokens(samples=4, length=16)
    file = take(source, tmp_path / "gradients", ids, scope="block", norms=["l2"])
    options = {"method": wanda_plus(), "calibration": ids, "propagate": "dense"}
    prune(source, **options, output=tmp_path / "own")
    prune(source, **options, gradient=file.path, output=tmp_path / "file")
    assert_same_weights(tmp_path / "own", tmp_path / "file")
