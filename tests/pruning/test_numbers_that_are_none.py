"""Weights and statistics that are no finite numbers end a run, and are named."""

# ruff: noqa: F811 - fixtures of another file

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from refused_runs import (
    ADVICE,
    FIRST,
    Refused,
    _no_trace_in_the_working_directory,  # noqa: F401
    edit,
    model,  # noqa: F401
    models,  # noqa: F401
    refused,  # noqa: F401
)
from secateur.core.problem import Method
from secateur.errors import CalibrationError, CheckpointError, NumericalError
from secateur.files.checkpoint import SINGLE_FILE
from secateur.methods.magnitude import magnitude
from secateur.methods.wanda import wanda
from secateur.pruning.engine import prune


@pytest.mark.parametrize("method", [wanda, magnitude])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_not_finite(value: str, method: Callable[[], Method], model: Path, refused: Refused) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit(model, name, lambda tensor: tensor[3, 4:7].fill_(float(value)))
    refused(
        NumericalError,
        f"{name}: 3 of 1536 weights are NaN or infinite, first {value} in row 3, column 4. The checkpoint is damaged; "
        f'download it again, or leave this matrix out with --skip "{name}".',
        model,
        method=method(),
    )
    manifest = prune(model, method=magnitude(), skip=[name], output=model.parent / "out")
    assert name not in manifest.matrices


def test_weights_of_a_later_block_that_are_not_finite(model: Path, refused: Refused) -> None:
    name = "model.layers.2.self_attn.q_proj.weight"
    edit(model, name, lambda tensor: tensor.fill_(float("nan")))
    refused(
        NumericalError,
        f"{name}: 1024 of 1024 weights are NaN or infinite, first nan in row 0, column 0. The checkpoint is damaged; "
        f'download it again, or leave this matrix out with --skip "{name}".',
        model,
        kept=True,
    )


def test_weights_in_integers(model: Path, refused: Refused) -> None:
    tensors = load_file(model / SINGLE_FILE)
    tensors[FIRST] = torch.ones(32, 48, dtype=torch.int8)
    save_file(tensors, model / SINGLE_FILE)
    refused(
        CheckpointError,
        f"{model}: the weights are quantised (torch.int8 without scales that belong to it; {FIRST}), in a format "
        "that Secateur does not dequantise. Use the unquantised checkpoint, or load this one with transformers, "
        "dequantise it (model.dequantize()), save it, and use that.",
        model,
        method=magnitude(),
    )


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("model.layers.1.input_layernorm.weight", "model.layers.1.self_attn.q_proj.weight"),
        ("model.layers.1.post_attention_layernorm.weight", "model.layers.1.mlp.gate_proj.weight"),
        ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"),
    ],
)
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_statistics_that_are_not_finite(name: str, first: str, value: str, model: Path, refused: Refused) -> None:
    edit(model, name, lambda tensor: tensor.fill_(float(value)))
    refused(
        CalibrationError,
        re.compile(
            rf"{re.escape(first)}: its inputs on the calibration samples contain NaN or infinity, first "
            rf"(nan|inf|-inf) in sample 0, token 0, input \d+\. {re.escape(ADVICE)}"
        ),
        model,
        kept=first.startswith("model.layers.1."),
    )


def test_half_precision_that_overflows(model: Path, refused: Refused) -> None:
    edit(model, "model.layers.0.mlp.up_proj.weight", lambda tensor: tensor.mul_(3e4))
    refused(
        CalibrationError,
        re.compile(
            rf"{re.escape(FIRST)}: its inputs on the calibration samples contain NaN or infinity, first "
            rf"(nan|inf|-inf) in sample \d+, token \d+, input \d+\. {re.escape(ADVICE)}"
        ),
        model,
        dtype="float16",
    )
