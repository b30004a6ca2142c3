"""Gradient statistics: streamed through one block at a time, they are those of full autograd on the whole model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

import secateur
import tiny
from full_autograd import (
    LENGTH,
    NORMS,
    SAMPLES,
    assert_same_totals,
    autograd,
    dense,
    distance,
    in_float64,
    loss_of,
    output_norm,
    own_calls,
    pinned,
    routes,
    sums,
    take,
    totals_of,
)
from pruned_checkpoints import NEVER_SEEN, STREAMED
from secateur.collect.gradient_file import GradientFile
from secateur.core.gradients import GradientKind
from secateur.errors import CalibrationError
from secateur.methods import METHODS
from secateur.methods.gblm import gblm
from secateur.methods.wanda_plus import wanda_plus
from secateur.models.flow import stream
from secateur.models.opening.opened import open_model
from secateur.pruning.engine import prune

TOLERANCE = 1e-12  # float64 throughout; the largest error of all architectures is 2e-15


# Full autograd, the reference


def largest_error(folder: Path, file: GradientFile, expected: Mapping[str, Mapping[str, Tensor]]) -> tuple[float, str]:
    """The largest relative error of any matrix and norm in a file, and where it is."""
    held = file.provenance
    errors = {
        f"{norm} of {matrix.name}": distance(
            file.read(matrix.name, GradientKind(norm, held["granularity"], held["scope"])).total,
            matrix.view(expected[norm]),
        )
        for matrix in open_model(folder).skeleton.matrices
        for norm in held["norms"]
        if matrix.name in file.matrices
    }
    assert len(errors) == len(held["norms"]) * len(file.matrices) > 0
    where = max(errors, key=lambda key: errors[key])
    return errors[where], where


# Streamed gradients are those of full autograd


@tiny.by_turns(STREAMED, 2)  # the others are pruned in the default tests of test_every_architecture.py
def test_every_architecture(name, ids, tmp_path):
    source = tiny.save(name, tmp_path / "source")
    with in_float64(name):
        expected = sums(model := dense(source), autograd(model, ids))
    for batch_size in (1, 3):
        options = {"dtype": "float64", "batch_size": batch_size, "skip": NEVER_SEEN.get(name, [])}
        if batch_size > 1 and routes(source):
            with pytest.raises(CalibrationError, match=r"^--batch-size: got 3, expected 1: this model routes tokens"):
                take(source, tmp_path / "refused", ids, **options)
            continue
        with in_float64(name):
            file = take(source, tmp_path / f"gradients-{batch_size}", ids, **options)
        assert all(total.dtype == torch.float64 for total in totals_of(file).values())
        error, where = largest_error(source, file, expected)
        assert error <= TOLERANCE, f"relative error {error:.1e} in the {where}, batch size {batch_size}"


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral", "gpt2"])
def test_float32_agrees_too(name, ids, tmp_path):
    """The same in the dtype that is used, without the help of float64 inside."""
    source = tiny.save(name, tmp_path / "source")
    expected = sums(model := dense(source), autograd(model, ids))
    error, where = largest_error(source, take(source, tmp_path / "gradients", ids), expected)
    assert error <= 1e-5, f"relative error {error:.1e} in the {where}"


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
def test_the_head_in_chunks(name, tmp_path, monkeypatch):
    """A vocabulary too large for one go: 16 tokens at a time, of which the last chunk predicts nothing."""
    source = tiny.save(name, tmp_path / "source")
    ids = tiny.tokens(samples=2, length=33)
    whole = take(source, tmp_path / "whole", ids, dtype="float64", batch_size=2)
    monkeypatch.setattr(stream, "LOGITS_BYTES", 1)
    seen = []
    parts = stream.Stream._parts
    monkeypatch.setattr(
        stream.Stream, "_parts", lambda self, batch, chunk: seen.append(chunk) or parts(self, batch, chunk)
    )
    assert_same_totals(whole, take(source, tmp_path / "chunks", ids, dtype="float64", batch_size=2), 1e-12)
    assert seen == [16]


@pytest.mark.parametrize("name", ["llama", "gemma3n_text", "mixtral"])
def test_some_matrices_alone(name, tmp_path):
    """The way back ends at the first block of interest; what is taken is the same."""
    source = tiny.save(name, tmp_path / "source")
    ids = tiny.tokens(samples=SAMPLES, length=LENGTH)
    whole = totals_of(take(source, tmp_path / "whole", ids))
    stages: list[tuple[str, int, int]] = []
    some = take(
        source,
        tmp_path / "some",
        ids,
        only=["*.1.self_attn.q_proj", "*layers.2.*"],
        skip=["*.2.self_attn.o_proj"],
        progress=lambda *stage: stages.append(stage),
    )
    assert 0 < len(some.matrices) < len(whole) / 2
    assert all(torch.equal(total, whole[key]) for key, total in totals_of(some).items())
    assert [stage for stage in stages if stage[0] == "backward"] == [("backward", 1, 2), ("backward", 2, 2)]


def test_a_module_in_memory_gives_what_its_folder_gives(llama, ids, file, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama)
    assert_same_totals(take(model, tmp_path / "module", ids), file)


# Other gradients: of tokens, of blocks


def regional(model: PreTrainedModel, ids: Tensor) -> list[dict[str, Tensor]]:
    """For each sample the gradient of the norm of each dense block's own output, by running the block alone."""
    blocks = list(model.get_submodule(open_model(model).skeleton.stacks[0].path))
    model.requires_grad_()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    result = []
    for row in ids:
        own: dict[str, Tensor] = {}
        for block, args, kwargs in own_calls(model, blocks, row):
            parameters = [p for p in block.parameters() if p.dim() > 1]
            found = torch.autograd.grad(output_norm(block, args, kwargs), parameters, allow_unused=True)
            own.update({names[id(p)]: g for p, g in zip(parameters, found, strict=True) if g is not None})
        result.append(own)
    return result


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt_postnorm", "mixtral", "gemma3n_text", "mamba"])
def test_the_scope_of_a_block(name, ids, tmp_path):
    source = tiny.save(name, tmp_path / "source")
    with in_float64():
        expected = sums(model := dense(source), regional(model, ids))
        for batch_size in (1,) if routes(source) else (1, 2):
            options = {"scope": "block", "dtype": "float64", "batch_size": batch_size}
            file = take(source, tmp_path / f"gradients-{batch_size}", ids, **options)
            error, where = largest_error(source, file, expected)
            assert error <= TOLERANCE, f"relative error {error:.1e} in the {where}, batch size {batch_size}"
    assert file.provenance["scope"] == "block"


def by_token(model: PreTrainedModel, ids: Tensor) -> dict[str, dict[str, Tensor]]:
    """{norm: {name: total}} over the outer products of each token's input and gradient, from hooks on modules."""
    names = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    made: dict[str, dict[str, Tensor]] = {norm: {} for norm in NORMS}
    model.requires_grad_()
    for row in ids:
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def keep(name: str, x: Tensor, y: Tensor, inputs: Any = inputs, outputs: Any = outputs) -> None:
            y.retain_grad()
            inputs[name], outputs[name] = x.detach(), y

        handles = [
            module.register_forward_hook(lambda _, x, y, name=name: keep(name, x[0], y))
            for name, module in names.items()
        ]
        loss_of(model, row).backward()
        for handle in handles:
            handle.remove()
        for name, module in names.items():
            x, gradient = (value.reshape(-1, value.shape[-1]) for value in (inputs[name], outputs[name].grad))
            each = torch.einsum("to,ti->toi", gradient, x)
            each = each.transpose(1, 2) if isinstance(module, Conv1D) else each
            for norm, values in (("l1", each.abs()), ("l2", each**2)):
                total = made[norm].setdefault(f"{name}.weight", torch.zeros_like(each[0]))
                total += values.sum(dim=0)
    return made


@pytest.mark.parametrize("name", ["llama", "llama_bias", "gemma2", "gpt2", "qwen3", "opt"])
def test_the_granularity_of_a_token(name, ids, tmp_path):
    source = tiny.save(name, tmp_path / "source")
    with in_float64():
        expected = by_token(dense(source), ids)
        for batch_size in (1, 2, 3):
            options = {"granularity": "token", "dtype": "float64", "batch_size": batch_size}
            file = take(source, tmp_path / f"gradients-{batch_size}", ids, **options)
            error, where = largest_error(source, file, expected)
            assert error <= TOLERANCE, f"relative error {error:.1e} in the {where}, batch size {batch_size}"


class ExpertProducts(TorchFunctionMode):
    """Adds the outer products of tokens for each 2-D slice of a 3-D parameter that `linear` multiplies."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.fused = {name: p for name, p in model.named_parameters() if p.dim() == 3}
        self.totals = {norm: {name: torch.zeros_like(p) for name, p in self.fused.items()} for norm in NORMS}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear:
            for name, parameter in self.fused.items():
                for expert in range(parameter.shape[0]):
                    if args[1].data_ptr() == parameter.data_ptr() + parameter[0].nbytes * expert:
                        x = args[0].detach()
                        result.register_hook(lambda g, x=x, name=name, expert=expert: self.add(name, expert, x, g))
        return result

    def add(self, name: str, expert: int, x: Tensor, g: Tensor) -> None:
        each = torch.einsum("to,ti->toi", g, x)
        self.totals["l1"][name][expert] += each.abs().sum(dim=0)
        self.totals["l2"][name][expert] += (each**2).sum(dim=0)


def test_the_granularity_of_a_token_that_is_routed(tmp_path):
    """Experts see the tokens of all samples of a batch as one; token by token that makes no difference."""
    source = tiny.save("mixtral", tmp_path / "source")
    ids = tiny.tokens(samples=4, length=16)
    with in_float64():
        model = dense(source)
        expected = {norm: {name: torch.zeros_like(p) for name, p in model.named_parameters()} for norm in NORMS}
        for norm, totals in by_token(model, ids).items():
            expected[norm].update(totals)
        with ExpertProducts(model) as products:
            for row in ids:
                loss_of(model, row).backward()
        for norm in NORMS:
            expected[norm].update(products.totals[norm])
            expected[norm] = dict(revert_weight_conversion(model, expected[norm]))
        for batch_size in (1, 2, 4):
            options = {"granularity": "token", "dtype": "float64", "batch_size": batch_size}
            file = take(source, tmp_path / f"gradients-{batch_size}", ids, **options)
            error, where = largest_error(source, file, expected)
            assert error <= TOLERANCE, f"relative error {error:.1e} in the {where}, batch size {batch_size}"


# Mixtures of experts


def test_samples_of_a_routed_batch_cannot_be_told_apart(tmp_path):
    source = tiny.save("mixtral", tmp_path / "source")
    ids = tiny.tokens(samples=4, length=16)
    message = (
        "--batch-size: got 2, expected 1: this model routes tokens to experts, which sees the tokens of all samples of "
        "a batch as one, and gradients are taken sample by sample. Leave --batch-size out, or use --granularity token."
    )
    for scope in ("model", "block"):
        with pytest.raises(CalibrationError, match=pinned(message)):
            take(source, tmp_path / "gradients", ids, batch_size=2, scope=scope)
    for method in (gblm(), wanda_plus()):
        with pytest.raises(CalibrationError, match=pinned(message)):
            prune(source, method=method, calibration=ids, batch_size=2, output=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    one = take(source, tmp_path / "one", ids, batch_size=1)
    assert_same_totals(one, take(source, tmp_path / "auto", ids))
    prune(source, method=gblm(), calibration=ids, output=tmp_path / "out")
    prune(source, method=wanda_plus(), calibration=ids, output=tmp_path / "plus")


@pytest.mark.parametrize("scope", ["model", "block"])
def test_an_expert_without_tokens(scope, tmp_path):
    source = tiny.save("mixtral", tmp_path / "source")
    ids = tiny.tokens(samples=1, length=3)
    with pytest.raises(CalibrationError) as caught:
        take(source, tmp_path / "gradients", ids, scope=scope)
    found = re.fullmatch(
        r"(\S+\.experts\.\d\.\S+): its gradient is zero on all 1 calibration samples, so nothing is known of its "
        r'weights\. Calibrate on more samples \(--samples\), or leave it dense with --skip "(\S+)"\.',
        str(caught.value),
    )
    assert found is not None, caught.value
    assert found[1] == found[2]
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    take(source, tmp_path / "gradients", ids, scope=scope, skip=["*.experts.*"])
    method = METHODS["wanda_plus" if scope == "block" else "gradient"]()
    with pytest.raises(secateur.SecateurError, match=r"\.experts\.\d\..*--skip"):
        prune(source, method=method, calibration=ids, output=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gradients", "source"]
