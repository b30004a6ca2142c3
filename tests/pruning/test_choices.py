"""Choices that contradict each other, and choices that go together."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from secateur.errors import PatternError
from secateur.pruning.engine import prune
from secateur.pruning.named import method_of
from secateur.pruning.preparation import check_choices, chosen_correction
from secateur.pruning.settings import PruneSettings


def check(method: str, choices: dict[str, Any]) -> None:
    settings = PruneSettings("nowhere", **choices)
    chosen_correction(settings)
    check_choices(method_of(method), settings)


@pytest.mark.parametrize(
    ("method", "choices", "message"),
    [
        ("wanda", {"propagate": "sparse"}, '--propagate: got "sparse", expected pruned or dense.'),
        ("wanda", {"within": "layer"}, '--within: got "layer", expected block or site.'),
        ("sparsegpt", {"targets": "sparse"}, '--targets: got "sparse", expected pruned, dense or residual.'),
        (
            "sparsegpt",
            {"targets": "residual"},
            "--targets residual makes up for what pruning did before, also within the block: add --within site.",
        ),
        (
            "sparsegpt",
            {"targets": "dense", "correction": 0.5},
            "--correction is for --targets residual, and targets are dense.",
        ),
        *[
            (
                "sparsegpt",
                {"within": "site", "targets": "residual", "correction": share},
                f"--correction: got {share:g}, expected a share above 0 and up to 1.",
            )
            for share in (0.0, -0.5, 1.5, math.nan)
        ],
        (
            "sparsegpt",
            {"propagate": "dense", "within": "site"},
            "--within site is about what pruning did before; with --propagate dense nothing sees that.",
        ),
        (
            "sparsegpt",
            {"propagate": "dense", "targets": "dense"},
            "--targets dense is about what pruning did before; with --propagate dense nothing sees that.",
        ),
        (
            "sparsegpt",
            {"propagate": "dense", "within": "site", "targets": "dense"},
            "--within site is about what pruning did before; with --propagate dense nothing sees that.",
        ),
        ("magnitude", {"within": "site"}, "--within site: magnitude takes no statistics of inputs, in any order."),
        ("gradient", {"within": "site"}, "--within site: gradient takes no statistics of inputs, in any order."),
        (
            "wanda_plus",
            {"within": "site"},
            "--within site: wanda_plus takes gradients of whole blocks; use --within block.",
        ),
        (
            "wanda_plus+least_squares",
            {"within": "site"},
            "--within site: wanda_plus+least_squares takes gradients of whole blocks; use --within block.",
        ),
        *[
            (
                method,
                {"within": "site" if method != "magnitude" else "block", "targets": targets},
                f"--targets {targets}: {method} changes no weights, so nothing can be fitted. Use a method that does, "
                f"or refine it: --method {method}+least_squares.",
            )
            for method in ("magnitude", "wanda", "gblm")
            for targets in ("dense", "residual")
        ],
    ],
    ids=str,
)
def test_choices_that_contradict_each_other(method: str, choices: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(PatternError) as told:
        check(method, choices)
    assert str(told.value) == message
    with pytest.raises(PatternError) as told:
        prune(
            tmp_path / "nowhere", method=method_of(method), output=tmp_path / "out", **choices
        )  # before anything is read
    assert str(told.value) == message


@pytest.mark.parametrize(
    ("method", "choices"),
    [
        ("wanda", {"propagate": "dense"}),
        ("wanda", {"within": "site"}),
        ("gblm", {"within": "site"}),
        ("sparsegpt", {"propagate": "dense"}),
        ("sparsegpt", {"within": "site", "targets": "dense"}),
        ("sparsegpt", {"within": "site", "targets": "residual", "correction": 1.0}),
        ("magnitude+least_squares", {"within": "site", "targets": "dense"}),
        ("wanda_plus+least_squares", {"targets": "dense"}),
    ],
    ids=str,
)
def test_choices_that_go_together(method: str, choices: dict[str, Any]) -> None:
    check(method, choices)
