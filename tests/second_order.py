"""Tiny models, their inputs, and what solvers with second moments see of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import tiny
from secateur.core.gram import Gram
from secateur.core.patterns import NM, Pattern, Unstructured
from secateur.core.problem import Method, Problem, Solution
from secateur.files.checkpoint import Checkpoint
from secateur.record.manifest import Manifest
from secateur.record.verify import verify

SAMPLES, LENGTH = 8, 32

HALF, TWO_OF_FOUR = Unstructured(0.5), NM(2, 4)
PATTERNS: list[Pattern] = [HALF, TWO_OF_FOUR]
ORDERS = [("site", "pruned"), ("block", "dense"), ("site", "dense")]
RESIDUAL = ("site", "residual")

every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)
every_order = pytest.mark.parametrize(("within", "targets"), ORDERS, ids=lambda word: word)


def calibration() -> Tensor:
    """256 tokens: enough for every expert to see some, and more than any matrix has columns."""
    return tiny.tokens(samples=SAMPLES, length=LENGTH)


Taken = dict[str, dict[type, tuple[Tensor, int, int]]]


def recording(taken: Taken, inner: Method) -> Method:
    """The method, which leaves (sum, tokens, samples) of every statistic of every matrix in `taken`."""

    def solve(problem: Problem) -> Solution:
        taken[problem.name] = {
            kind: (statistic.total.clone(), statistic.tokens, statistic.samples)
            for kind, statistic in problem.evidence.items()
            if isinstance(kind, type)
        }
        return inner.solve(problem)

    return Method("recording", solve, inner.needs | {Gram}, inner.per)


@torch.no_grad()
def inputs(model: nn.Module, modules: Sequence[str], ids: Tensor) -> dict[str, Tensor]:
    """What goes into some modules in one forward of the model, each (tokens, in), of all calls one after the other."""
    seen: dict[str, list[Tensor]] = {}

    def hook(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: seen.setdefault(path, []).append(args[0].reshape(-1, args[0].shape[-1]).clone())

    handles = [model.get_submodule(path).register_forward_pre_hook(hook(path)) for path in modules]
    model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return {path: torch.cat(parts) for path, parts in seen.items()}


def load(folder: Path) -> PreTrainedModel:
    """The model as transformers loads it, nothing missing and nothing unexpected, experts one by one."""
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model.eval()


def assert_close(found: Tensor, expected: Tensor, name: str) -> None:
    assert torch.allclose(found.double(), expected.double(), rtol=1e-4, atol=1e-5 * float(expected.abs().max())), name


def assert_verified(out: Path, source: Path, manifest: Manifest) -> None:
    report = verify(out, Checkpoint(source))
    assert report.ok, report.problems
    assert report.matrices == len(manifest.matrices) == len(manifest.plan)


CHAINS = [
    "wanda+least_squares",
    "sparsegpt+least_squares",
    "magnitude+obs_update",
    "wanda+obs_update",
    "ria+swaps",
    "ria+swaps+least_squares",
    "alps+swaps+least_squares",
    "gblm+least_squares",
    "gradient+swaps",
    "wanda_plus+least_squares",
    "wanda_variant+swaps+least_squares",
]
