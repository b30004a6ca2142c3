"""Squared gradients of the outputs of matrices, against full autograd on the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import tiny
from full_autograd import InFloat64
from secateur.calibration.drawing import calibration_windows
from secateur.collect.exempt import Exempt
from secateur.collect.measures import Measuring
from secateur.core.needs import OutputGradients
from secateur.core.patterns import Unstructured
from secateur.models.flow.backward import drawn_tokens
from secateur.models.opening.opened import open_model
from secateur.plans.sensitivity import sensitivity
from secateur.plans.uniform import uniform

SAMPLES, LENGTH, SEED = 3, 12, 5


def by_autograd(source: Path, ids: Tensor) -> dict[str, Tensor]:
    """The sum over tokens of the squared gradient of each output, by module, with labels that the model draws."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64).eval()
    draw = drawn_tokens(SEED)
    sums: dict[str, Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):

            def watch(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
                def add(gradient: Tensor) -> None:
                    squares = gradient.reshape(-1, gradient.shape[-1]).square().sum(dim=0)
                    sums[name] = sums.get(name, torch.zeros_like(squares)) + squares

                output.register_hook(add)

            handles.append(module.register_forward_hook(watch))
    for number, sample in enumerate(ids):
        with InFloat64():
            logits = model(input_ids=sample.unsqueeze(0), use_cache=False).logits[:, :-1]
        labels = draw(number, sample[None, 1:], logits)
        nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    return sums


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gemma3_text"])
def test_they_are_those_of_full_autograd(name: str, tmp_path: Path) -> None:
    source = tiny.save(name, tmp_path / "model")
    ids = tiny.tokens(samples=SAMPLES, length=LENGTH)
    expected = by_autograd(source, ids)
    opened = open_model(source, dtype="float64")
    plan = uniform({matrix.name: matrix.shape for matrix in opened.skeleton.matrices}, Unstructured(0.5))
    measuring = Measuring(opened, sensitivity(), "matrix", plan, exempt=Exempt())
    with InFloat64():
        measuring.run(calibration_windows(ids, None), 1, SEED)
    assert len(plan) == len(measuring.gradients) > 0
    for matrix in opened.skeleton.matrices:
        found = measuring.gradients[matrix.name]
        whole = expected[matrix.parameter.removesuffix(".weight")]
        rows = whole if matrix.rows is None else whole[matrix.rows]
        assert torch.allclose(found.total, rows, rtol=1e-6)
        assert found.tokens == SAMPLES * (LENGTH - 1)


@pytest.mark.parametrize("name", ["mixtral"])
def test_experts_have_what_reached_them(name: str, tmp_path: Path) -> None:
    # What the experts of a block write is added to the residual stream, with the router's weight: the gradient of a
    # routed token's output is the stream's times that weight, so that all experts together have at most the stream's.
    source = tiny.save(name, tmp_path / "model")
    opened = open_model(source, dtype="float64")
    matrices = [matrix for matrix in opened.skeleton.matrices if matrix.expert is not None]
    assert matrices
    plan = uniform({matrix.name: matrix.shape for matrix in opened.skeleton.matrices}, Unstructured(0.5))
    ids = tiny.tokens(samples=SAMPLES, length=40)
    measuring = Measuring(opened, sensitivity(), "matrix", plan, exempt=Exempt())
    units = measuring.run(calibration_windows(ids, None), 1, SEED)
    assert len(units.members) == len(plan)
    assert bool((units.found.values > 0).all())
    assert {OutputGradients} == {type(own) for own in measuring.gradients.values()}
