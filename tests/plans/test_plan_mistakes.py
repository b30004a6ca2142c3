"""Patterns and plans that cannot be are refused in one sentence, and nothing is written."""

# ruff: noqa: F811 - fixtures of another file

from pathlib import Path

import pytest

from refused_runs import (
    FIRST,
    Refused,
    _no_trace_in_the_working_directory,  # noqa: F401
    model,  # noqa: F401
    models,  # noqa: F401
    refused,  # noqa: F401
)
from secateur.core.patterns import NM, Unstructured
from secateur.errors import PatternError
from secateur.plans.plan import Plan


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [
        (1.0, "sparsity must be at least 0 and below 1, got 1."),
        (-0.1, "sparsity must be at least 0 and below 1, got -0.1."),
        (50, "sparsity must be at least 0 and below 1, got 50. Did you mean 0.5?"),
        (float("nan"), "sparsity must be at least 0 and below 1, got nan."),
        (float("inf"), "sparsity must be at least 0 and below 1, got inf."),
    ],
)
def test_sparsity_out_of_range(sparsity: float, message: str) -> None:
    with pytest.raises(PatternError) as caught:
        Unstructured(sparsity)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("n", "m", "message"),
    [
        (4, 2, "N:M keeps N of every M weights, so 1 <= N <= M; got 4:2. Did you mean 2:4?"),
        (0, 4, "N:M keeps N of every M weights, so 1 <= N <= M; got 0:4."),
        (-2, 4, "N:M keeps N of every M weights, so 1 <= N <= M; got -2:4."),
        (2, 0, "N:M keeps N of every M weights, so 1 <= N <= M; got 2:0."),
    ],
)
def test_n_of_m_out_of_range(n: int, m: int, message: str) -> None:
    with pytest.raises(PatternError) as caught:
        NM(n, m)
    assert str(caught.value) == message


def test_a_width_that_does_not_divide(model: Path, refused: Refused) -> None:
    refused(
        PatternError,
        f"{FIRST}: 2:5 needs in_features divisible by 5, got 48. "
        f'Skip it with --skip "{FIRST}" or choose an unstructured pattern.',
        model,
        pattern=NM(2, 5),
    )
    name = "model.layers.0.mlp.gate_proj.weight"
    refused(
        PatternError,
        f"{name}: 3:48 needs in_features divisible by 48, got 32. "
        f'Skip it with --skip "{name}" or choose an unstructured pattern.',
        model,
        pattern=NM(3, 48),
    )


def test_globs_that_match_nothing(model: Path, refused: Refused) -> None:
    refused(
        PatternError,
        '--skip "*.up_pro" matches none of 21 matrices. Did you mean "*.up_proj"?',
        model,
        skip=["*.up_pro"],
    )
    refused(
        PatternError,
        '--only "lm_head" matches none of 21 matrices. They have names such as "model.layers.0.mlp.down_proj.weight".',
        model,
        only=["*.up_proj", "lm_head"],
    )


def test_nothing_left_to_prune(model: Path, refused: Refused) -> None:
    message = "nothing is left to prune: --only and --skip leave none of 21 matrices."
    refused(PatternError, message, model, skip=["*"])
    refused(PatternError, message, model, only=["*.up_proj"], skip=["*.mlp.*"])
    refused(
        PatternError, "the plan is empty: it names no matrix, so nothing is left to prune.", model, pattern=Plan({})
    )


def test_plans_that_do_not_fit(model: Path, refused: Refused) -> None:
    refused(
        PatternError,
        f'{FIRST}x: no prunable matrix of this name in the model. Did you mean "{FIRST}"?',
        model,
        pattern=Plan({FIRST + "x": NM(2, 4)}),
    )
    refused(
        PatternError,
        "a whole plan already says which matrices to prune; leave out only and skip.",
        model,
        pattern=Plan({FIRST: NM(2, 4)}),
        skip=["*.q_proj"],
    )


def test_propagate_is_spelled_wrong(model: Path, refused: Refused) -> None:
    message = '--propagate: got "prunned", expected pruned or dense. Did you mean "pruned"?'
    refused(PatternError, message, model, propagate="prunned")
