"""Gradient statistics: streamed through one block at a time, they are those of full autograd on the whole model."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

import reference
import secateur
import tiny
from secateur.collect.gradient_file import GradientFile
from secateur.collect.gradient_pass import chunk_sizes
from secateur.core.gradients import GradientKind, GradientNorm
from secateur.core.patterns import NM, Pattern, Unstructured
from secateur.core.problem import Method, Problem
from secateur.core.statistics import SquaredNorm
from secateur.errors import CalibrationError, CheckpointError, ModelStructureError, NumericalError
from secateur.methods import METHODS
from secateur.methods.gblm import gblm, gblm_inverse, gradient
from secateur.methods.pruner_zero import pruner_zero
from secateur.methods.wanda import wanda
from secateur.methods.wanda_plus import wanda_plus
from secateur.models.flow import backward, stream
from secateur.models.opening.opened import open_model
from secateur.models.shape.matrices import tapped
from secateur.pruning.engine import prune
from test_cli import CALIBRATION, call, save_model  # noqa: F401 - `call` is a fixture
from test_engine import NEVER_SEEN, STREAMED, bits

NORMS = ("l1", "l2")
SAMPLES, LENGTH = 3, 12
TOLERANCE = 1e-12  # float64 throughout; the largest error of all architectures is 2e-15

PATTERNS: dict[str, Pattern] = {
    "row": Unstructured(0.5, "row"),
    "matrix": Unstructured(0.5, "matrix"),
    "search": Unstructured(0.5, "search"),
    "2:4": NM(2, 4),
    "4:8": NM(4, 8),
}
each_pattern = pytest.mark.parametrize("pattern", list(PATTERNS.values()), ids=list(PATTERNS))
each_norm = pytest.mark.parametrize("norm", NORMS)


def pinned(message: str) -> str:
    return f"^{re.escape(message)}$"


# Full autograd, the reference


class InFloat64(TorchFunctionMode):
    """What a model computes in float32 for stability (norms, softmax, rotary angles) is computed in float64.

    Without it two orders of the same sums differ by the rounding of float32, whatever the dtype of the model.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "float":
            return args[0].double()
        if name in ("to", "type"):
            args = tuple(torch.float64 if argument is torch.float32 else argument for argument in args)
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@contextlib.contextmanager
def in_float64(name: str = "") -> Iterator[None]:
    """xglm masks with the smallest float64 number in a tensor of the default dtype."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if name == "xglm" else default)
    try:
        with InFloat64():
            yield
    finally:
        torch.set_default_dtype(default)


def dense(folder: Path, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """The model as transformers loads and runs it, experts one by one."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model.to(dtype).eval()


def loss_of(model: nn.Module, row: Tensor) -> Tensor:
    """The mean cross-entropy of a sample's next-token predictions."""
    return F.cross_entropy(model(row[None], use_cache=False).logits[0, :-1], row[1:])


def sums(model: PreTrainedModel, gradients: Sequence[Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """{norm: {checkpoint name: total}} of the gradients of each sample, which have the names of parameters."""
    made = {norm: {name: torch.zeros_like(p) for name, p in model.named_parameters()} for norm in NORMS}
    for own in gradients:
        for name, found in own.items():
            made["l1"][name] += found.abs()
            made["l2"][name] += found**2
    return {norm: dict(revert_weight_conversion(model, totals)) for norm, totals in made.items()}


def autograd(model: PreTrainedModel, ids: Tensor) -> list[dict[str, Tensor]]:
    """The gradient of every parameter for every sample: `backward` through the whole model, one sample at a time."""
    result = []
    for row in ids:
        model.zero_grad(set_to_none=True)
        loss_of(model, row).backward()
        result.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    model.zero_grad(set_to_none=True)
    return result


def distance(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got.double() - expected.double()).norm() / expected.double().norm())


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


def take(model: Any, output: Path, ids: Tensor, **options: Any) -> GradientFile:
    return secateur.gradients(model, output, **{"calibration": ids, "norms": NORMS, "device": "cpu"} | options)


def routes(folder: Path) -> bool:
    """Whether the tokens of all samples of a batch are mixed on their way to an expert that is prunable."""
    matrices = open_model(folder).skeleton.matrices
    return any(matrix.expert is not None or ".experts." in matrix.name for matrix in matrices)


def totals_of(file: GradientFile) -> dict[tuple[str, str], Tensor]:
    held = file.provenance
    return {
        (name, norm): file.read(name, GradientKind(norm, held["granularity"], held["scope"])).total
        for name in file.matrices
        for norm in held["norms"]
    }


def assert_same_totals(one: GradientFile, two: GradientFile, tolerance: float = 0.0) -> None:
    first, second = totals_of(one), totals_of(two)
    assert first.keys() == second.keys()
    worst = max(distance(first[key], second[key]) for key in first)
    assert worst <= tolerance, worst


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("gradients") / "llama")


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return tiny.tokens(samples=SAMPLES, length=LENGTH)


@pytest.fixture(scope="module")
def file(llama: Path, ids: Tensor) -> GradientFile:
    """Both norms of the tiny LLaMA, computed in float32."""
    return take(llama, llama.parent / "gradients.safetensors", ids)


# The statistic


@each_norm
def test_the_statistic_is_a_sum_that_can_be_split_and_merged(norm):
    kind = GradientKind(norm)
    gradients = torch.randn(7, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = GradientNorm.empty(kind, (5, 4), dtype=torch.float64)
    parts = [GradientNorm.empty(kind, (5, 4), dtype=torch.float64) for _ in range(3)]
    before = gradients.clone()
    for number, own in enumerate(gradients):
        whole.update(own, tokens=10)
        parts[number % 3].update(own, tokens=10)
    assert torch.equal(gradients, before), "an update does not write to the gradient"
    merged = GradientNorm.empty(kind, (5, 4), dtype=torch.float64)
    for part in parts:
        merged.merge(part)
    for found in (whole, merged):
        assert (found.samples, found.tokens, found.kind) == (7, 70, kind)
        expected = gradients.abs().sum(0) if norm == "l1" else gradients.square().sum(0)
        torch.testing.assert_close(found.total, expected, rtol=1e-14, atol=0)
        expected = torch.tensor(reference.gradient_norm(list(gradients), norm), dtype=torch.float64)
        torch.testing.assert_close(found.norm(), expected, rtol=1e-14, atol=0)
        assert found.is_finite()
    mean = (gradients.square().sum(0) / 7).sqrt()
    if norm == "l2":
        torch.testing.assert_close(whole.root_mean_square(), mean, rtol=1e-14, atol=0)


def test_the_statistic_is_float32_whatever_the_gradient():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        statistic = GradientNorm.empty(GradientKind("l2"), (2, 3))
        own = torch.full((2, 3), 2.0**-14).to(dtype)
        for _ in range(3):
            statistic.update(own)
        assert statistic.total.dtype == torch.float32
        assert torch.equal(statistic.total, torch.full((2, 3), 3 * 2.0**-28)), "the square is not taken in half"
    statistic.update(torch.full((2, 3), float("inf")))
    assert not statistic.is_finite()


def test_no_samples_at_all():
    statistic = GradientNorm.empty(GradientKind("l2"), (2, 3))
    assert (statistic.samples, statistic.tokens) == (0, 0)
    assert not statistic.norm().any()
    assert not statistic.root_mean_square().any()


def test_only_the_same_kind_and_shape_merge():
    statistic = GradientNorm.empty(GradientKind("l1"), (2, 3))
    message = "gradients (l2 per token, block) of a matrix (2, 3) cannot be merged into (l1 per sample, model) (2, 3)."
    with pytest.raises(ValueError, match=pinned(message)):
        statistic.merge(GradientNorm.empty(GradientKind("l2", "token", "block"), (2, 3)))
    with pytest.raises(ValueError, match=re.escape("of a matrix (3, 2) cannot be merged")):
        statistic.merge(GradientNorm.empty(GradientKind("l1"), (3, 2)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm": "l3"}, 'norm: got "l3", expected l1 or l2.'),
        ({"granularity": "batch"}, 'granularity: got "batch", expected sample or token.'),
        ({"scope": "layer"}, 'scope: got "layer", expected model or block.'),
    ],
)
def test_unknown_kinds(fields, message, llama, ids, tmp_path):
    with pytest.raises(CalibrationError, match=pinned(message)):
        GradientKind(**fields)
    options = {"norms": [fields["norm"]]} if "norm" in fields else fields
    with pytest.raises(CalibrationError, match=pinned(message)):
        take(llama, tmp_path / "g", ids, **options)
    assert contents(tmp_path) == []


def test_kinds_print_and_compare():
    assert str(GradientKind()) == "l1 per sample, model"
    assert str(GradientKind("l2", "token", "block")) == "l2 per token, block"
    assert GradientKind("l1") == GradientKind() != GradientKind("l2")


# Streamed gradients are those of full autograd


@pytest.mark.parametrize("name", STREAMED)
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
    head = backward.Stream.head
    monkeypatch.setattr(
        backward.Stream, "head", lambda self, batch, chunk: seen.append(chunk) or head(self, batch, chunk)
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


def own_calls(model: nn.Module, blocks: Iterable[nn.Module], row: Tensor) -> list[tuple[nn.Module, Any, Any]]:
    """(block, args, kwargs) of each block's own call in a forward of one sample."""
    calls: list[tuple[nn.Module, Any, Any]] = []

    def keep(block: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append((block, args, dict(kwargs)))

    handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks]
    with torch.no_grad():
        model(row[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return calls


def output_norm(block: nn.Module, args: Any, kwargs: Any) -> Tensor:
    """The Euclidean norm of what a block makes of one sample, with its graph."""
    output = block(*args, **kwargs)
    return (output if isinstance(output, Tensor) else output[0]).norm()


def regional(model: PreTrainedModel, ids: Tensor) -> list[dict[str, Tensor]]:
    """For each sample the gradient of the norm of each dense block's own output, by running the block alone."""
    blocks = list(model.get_submodule(open_model(model).skeleton.path))
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


# Products that are out of the ordinary


def tap_of(module: nn.Linear, samples: int = 1, length: int = 3) -> backward.GradientTap:
    tap = backward.GradientTap({"w": (module.requires_grad_(False).weight, False)}, NORMS)
    tap.begin(samples, length)
    return tap


def linear() -> nn.Linear:
    return nn.Linear(4, 5, bias=False).double()


def test_a_weight_that_multiplies_twice():
    """The gradient is the sum over both products, whose absolute value is not the sum of absolute values."""
    module, x = linear(), torch.randn(2, 3, 4).double()
    weight = module.weight.detach().clone().requires_grad_()
    tap = tap_of(module, samples=2)
    states = x.clone().requires_grad_()
    with tap:
        output = module(states) - module(states.flip(-1)).tanh()
    output.square().sum().backward()
    tap.end()
    expected = []
    for own in x:
        output = own @ weight.t() - (own.flip(-1) @ weight.t()).tanh()
        expected.append(*torch.autograd.grad(output.square().sum(), weight))
    torch.testing.assert_close(tap.totals["w", "l1"], torch.stack(expected).abs().sum(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tap.totals["w", "l2"], torch.stack(expected).square().sum(0), rtol=1e-12, atol=1e-12)
    assert module.weight.grad is None


@pytest.mark.parametrize("granularity", ["sample", "token"])
@pytest.mark.parametrize("function", ["addmm", "baddbmm", "matmul", "left"])
def test_products_of_every_kind(function, granularity):
    """Whichever function multiplies, on whichever side, and with a factor where it takes one."""
    weight, x = torch.randn(5, 4).double(), torch.randn(3, 4).double()
    parameter = nn.Parameter(weight.clone(), requires_grad=False)
    tap = backward.GradientTap({"w": (parameter, False)}, NORMS, granularity)
    tap.begin(1, 3)
    states = x.clone().requires_grad_()
    factor = 3.0 if "add" in function else 1.0
    with tap:
        if function == "addmm":
            output = torch.addmm(torch.ones(5).double(), states, parameter.t(), alpha=3)
        elif function == "baddbmm":
            output = torch.baddbmm(torch.ones(1, 3, 5).double(), states[None], parameter.t()[None], alpha=3)[0]
        elif function == "matmul":
            output = states @ parameter.t()
        else:
            output = (parameter @ states.t()).t()
    output.square().sum().backward()
    tap.end()
    each = torch.einsum("to,ti->toi", 2 * factor * output.detach(), x)
    each = each.sum(dim=0, keepdim=True) if granularity == "sample" else each
    torch.testing.assert_close(tap.totals["w", "l1"], each.abs().sum(dim=0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tap.totals["w", "l2"], each.square().sum(dim=0), rtol=1e-12, atol=1e-12)


def test_an_input_that_is_overwritten_later():
    module = linear()
    states = torch.randn(1, 3, 4).double().requires_grad_()
    with tap_of(module):
        own = states * 2
        output = module(own)
        own.add_(1)
    message = (
        "w: its input is overwritten after the multiplication, so that its gradient cannot be taken. "
        "Skip it with --skip, or use a method without gradients."
    )
    with pytest.raises(ModelStructureError, match=pinned(message)):
        output.sum().backward()


def test_samples_that_cannot_be_told_apart():
    module = linear()
    states = torch.randn(5, 4).double().requires_grad_()  # some tokens of two samples
    with tap_of(module, samples=2, length=3):
        output = module(states)
    message = (
        "w: multiplies an input of shape (5, 4), in which the 2 samples of 3 tokens cannot be told apart. "
        "Use --batch-size 1."
    )
    with pytest.raises(ModelStructureError, match=pinned(message)):
        output.sum().backward()


def test_a_product_of_what_needs_no_gradient():
    """Such as of embeddings that a block has of its own."""
    module, x = linear(), torch.randn(1, 3, 4).double()
    tap = tap_of(module)
    with tap:
        output = module(x)
    (output**2).sum().backward()
    tap.end()
    torch.testing.assert_close(tap.totals["w", "l1"], (2 * output[0].t() @ x[0]).abs(), rtol=1e-12, atol=1e-12)


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


# Half precision


def save_half(folder: Path, dtype: torch.dtype, head: float = 1.0) -> Path:
    """The tiny LLaMA rounded to half precision, its last norm and its head each scaled by a power of two."""
    model = tiny.build("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(head)
        model.model.norm.weight.mul_(head)
    model.to(dtype).save_pretrained(folder)
    return folder


def root(total: Tensor, norm: str) -> Tensor:
    return total.sqrt() if norm == "l2" else total


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)], ids=str)
@pytest.mark.parametrize(
    ("scope", "granularity"), [("model", "sample"), ("model", "token"), ("block", "sample"), ("block", "token")]
)
def test_half_precision(dtype, tolerance, scope, granularity, ids, tmp_path):
    """Against float64 on the same rounded weights: a few units of the last place (2 ** -11 and 2 ** -8)."""
    source = save_half(tmp_path / "source", dtype)
    options = {"scope": scope, "granularity": granularity}
    exact = totals_of(take(source, tmp_path / "exact", ids, dtype="float64", **options))
    name = str(dtype).removeprefix("torch.")
    for batch_size in (1, 3):
        file = take(source, tmp_path / f"half-{batch_size}", ids, dtype=name, batch_size=batch_size, **options)
        assert file.provenance["dtype"] == name
        half = totals_of(file)
        assert all(total.dtype == torch.float32 for total in half.values())
        worst = max(distance(root(half[key], key[1]), root(value, key[1])) for key, value in exact.items())
        assert worst <= tolerance, worst


def test_float16_does_not_underflow(tmp_path):
    """Gradients far below the smallest float16 number, 6e-8: plain autograd loses them, and ours keeps them."""
    source = save_half(tmp_path / "source", torch.float16, head=2.0**-9)
    ids = tiny.tokens(samples=2, length=48)
    with in_float64():
        expected = sums(model := dense(source), autograd(model, ids))["l1"]
    plain = sums(model := dense(source, torch.float16), autograd(model, ids))["l1"]
    ours = take(source, tmp_path / "half", ids, dtype="float16", norms=["l1"])
    for matrix in open_model(source).skeleton.matrices:
        exact = matrix.view(expected)
        got = ours.read(matrix.name, GradientKind("l1")).total
        assert bool((exact > 0).all())
        lost = float((matrix.view(plain) == 0).float().mean())
        assert lost > 0.9, f"{matrix.name}: plain float16 loses {lost:.1%}"
        assert bool((got > 0).all()), matrix.name
        assert distance(got, exact) <= 4e-3, matrix.name
        # Entry by entry too: as far as the rounding of sums of both signs allows.
        assert float(((got - exact).abs() / exact).median()) <= 4e-3, matrix.name


def test_bfloat16_does_not_underflow(tmp_path):
    source = save_half(tmp_path / "source", torch.bfloat16, head=2.0**-9)
    ids = tiny.tokens(samples=2, length=48)
    exact = totals_of(take(source, tmp_path / "exact", ids, dtype="float64"))
    for key, got in totals_of(take(source, tmp_path / "half", ids, dtype="bfloat16")).items():
        assert bool((got > 0).all()), key
        assert distance(got, exact[key]) <= 6e-2, key


def test_float16_that_overflows_says_so(tmp_path):
    source = save_half(tmp_path / "source", torch.float16, head=2.0**7)
    with pytest.raises((NumericalError, CalibrationError), match=r"finite|NaN or infinity"):
        take(source, tmp_path / "half", tiny.tokens(samples=1, length=12), dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# What is left as it was


def watched_model(name: str = "llama") -> tuple[nn.Module, Callable[[], None]]:
    """A module in training mode, some parameters frozen, and a check that it is still as it was given."""
    model = tiny.build(name)
    model.train()
    model.get_submodule("model.layers.1.self_attn").eval()
    model.requires_grad_()
    model.get_parameter("model.layers.0.self_attn.q_proj.weight").requires_grad_(False)
    accumulated: list[str] = []
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, path=path: accumulated.append(path))
    weights = {path: value.clone() for path, value in model.state_dict().items()}
    modes = {path: module.training for path, module in model.named_modules()}
    trained = {path: parameter.requires_grad for path, parameter in model.named_parameters()}

    def check() -> None:
        assert accumulated == []
        assert all(parameter.grad is None for parameter in model.parameters())
        assert {path: parameter.requires_grad for path, parameter in model.named_parameters()} == trained
        assert {path: module.training for path, module in model.named_modules()} == modes
        now = model.state_dict()
        assert now.keys() == weights.keys()
        assert all(torch.equal(bits(now[path]), bits(value)) for path, value in weights.items())

    return model, check


@pytest.mark.parametrize("scope", ["model", "block"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_module_stays_as_it_was_given(name, scope, tmp_path):
    model, check = watched_model(name)
    ids = tiny.tokens(samples=4, length=16)

    def no_gradients(stage: str, done: int, total: int) -> None:
        assert all(parameter.grad is None for parameter in model.parameters())

    take(model, tmp_path / "gradients", ids, scope=scope, progress=no_gradients)
    check()


@pytest.mark.parametrize("stage", ["record", "forward", "head", "backward", "write"])
def test_a_module_stays_as_it_was_given_after_a_failure(stage, ids, tmp_path):
    model, check = watched_model()
    with pytest.raises(KeyboardInterrupt):
        take(model, tmp_path / "gradients", ids, progress=interrupting(stage))
    check()
    assert contents(tmp_path) == []


@pytest.mark.parametrize(
    "options",
    [{"only": ["nothing"]}, {"calibration": tiny.tokens() + 1000}],
    ids=["no such matrix", "no such token"],
)
def test_a_module_stays_as_it_was_given_after_a_mistake(options, ids, tmp_path):
    model, check = watched_model()
    with pytest.raises(secateur.SecateurError):
        take(model, tmp_path / "gradients", ids, **options)
    check()


def test_a_module_stays_as_it_was_given_after_a_mistake_in_pruning(ids, file):
    model, check = watched_model()
    with pytest.raises(CalibrationError, match="the method wanda uses no gradients"):
        prune(model, method=wanda(), calibration=ids, gradient=file.path)
    check()


def test_parameters_never_have_a_gradient(ids, tmp_path):
    """Looked at while each block of a folder is loaded."""
    skeleton = open_model(tiny.save("mixtral", tmp_path / "source"), dtype="float64").skeleton
    skeleton.load_outside()
    count = 0
    for sweep in (backward.model_gradients, backward.regional_gradients):
        found = sweep(
            skeleton,
            ids,
            lambda block: tapped(block, [m for m in skeleton.matrices if m.block == block.index])[0],
            norms=NORMS,
            batch_size=1,
        )
        for gradients in found:
            for parameter in skeleton.model.parameters():
                assert parameter.grad is None
                assert not parameter.requires_grad
            for total in gradients.totals.values():
                assert total.grad_fn is None
                assert not total.requires_grad
            count += 1
    assert count == 2 * tiny.BLOCKS


# Memory and disk


def with_memory_for(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the host have memory for the states of so many samples of the tiny models in float64."""
    each = (tiny.BLOCKS + 3) * LENGTH * tiny.HIDDEN * 8
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * samples * each + 1))


@pytest.mark.parametrize("name", ["llama", "gemma3n_text", "mixtral"])
@pytest.mark.parametrize("scope", ["model", "block"])
def test_samples_in_parts_that_fit(name, scope, tmp_path, monkeypatch):
    source = tiny.save(name, tmp_path / "source")
    ids = tiny.tokens(samples=5, length=LENGTH)
    size = 1 if routes(source) else 2
    skip = ["*.experts.*"] if name == "mixtral" else []
    options = {"dtype": "float64", "batch_size": size, "scope": scope, "skip": skip}
    whole = take(source, tmp_path / "whole", ids, **options)
    stages: list[str] = []
    with_memory_for(2, monkeypatch)
    if scope == "block":  # nothing is saved there but the states between two blocks, in and out
        monkeypatch.setattr(
            psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * 2 * 2 * LENGTH * tiny.HIDDEN * 8)
        )
    parts = take(source, tmp_path / "parts", ids, **options, progress=lambda stage, *_: stages.append(stage))
    assert {stage.rpartition(" ")[2] for stage in stages if stage.startswith("record")} == {"1/3", "2/3", "3/3"}
    assert_same_totals(whole, parts, 1e-12)
    for key in ("samples", "length", "tokens_digest", "model_digest"):
        assert whole.provenance[key] == parts.provenance[key]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "source", "whole"]


def test_a_zero_in_one_part_is_no_zero_in_the_whole(tmp_path, monkeypatch):
    """An expert that one part of the samples never reaches has a gradient from the others."""
    source = tiny.save("mixtral", tmp_path / "source")
    ids = tiny.tokens(samples=8, length=4)
    whole = take(source, tmp_path / "whole", ids, dtype="float64")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    stages: list[str] = []
    parts = take(source, tmp_path / "parts", ids, dtype="float64", progress=lambda stage, *_: stages.append(stage))
    assert "backward 8/8" in stages
    assert_same_totals(whole, parts, 1e-12)


def test_chunks_are_whole_batches_and_never_none(llama, monkeypatch):
    skeleton = open_model(llama).skeleton
    each = (tiny.BLOCKS + 3) * LENGTH * tiny.HIDDEN * 4
    scratch = Path("/nowhere/g.states-1")

    def sizes(available: int, **changed: Any) -> Any:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
        given = {"samples": 100, "batch_size": 4, "scope": "model", "offload": "auto", "first": 0} | changed
        return chunk_sizes(skeleton, length=LENGTH, scratch=scratch, **given)

    assert (sizes(10**12).samples, sizes(10**12).bytes, sizes(10**12).folder) == (100, 100 * each, None)
    assert sizes(2 * 11 * each).samples == 8, "whole batches only"
    assert sizes(2 * 11 * each, offload="never").samples == 8
    assert sizes(0).samples == 4, "one batch at least"
    assert sizes(0, samples=3).samples == 3
    assert sizes(2 * 10 * each, batch_size=1).samples == 10
    assert sizes(2 * 10 * each, first=2, batch_size=1).samples == 15, "earlier blocks keep nothing: 4 states, not 6"
    assert sizes(2 * 10 * each, scope="block", batch_size=1).samples == 25, "2 states, not 6"
    assert sizes(2 * 99 * each, batch_size=1).samples == 50, "parts of equal size"


def test_offloaded_chunks_are_measured_by_the_disk(llama, tmp_path, monkeypatch):
    skeleton = open_model(llama).skeleton
    each = (tiny.BLOCKS + 3) * LENGTH * tiny.HIDDEN * 4
    asked: list[Path] = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=2 * 5 * each)

    monkeypatch.setattr("shutil.disk_usage", usage)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    deep = tmp_path / "not" / "there"
    sizes = chunk_sizes(skeleton, 100, LENGTH, 1, "model", str(deep), 0, tmp_path / "g.states-1")
    assert (sizes.samples, sizes.folder) == (5, deep / "g.states-1")
    assert asked == [tmp_path]


@pytest.mark.parametrize("scope", ["model", "block"])
@pytest.mark.parametrize("name", ["llama", "gemma3n_text"])
def test_states_on_disk_change_nothing(name, scope, tmp_path):
    source = tiny.save(name, tmp_path / "source")
    ids = tiny.tokens(samples=5, length=LENGTH)
    options = {"batch_size": 1 if routes(source) else 2, "scope": scope}
    in_memory = take(source, tmp_path / "memory", ids, offload_states="never", **options)
    fast = tmp_path / "fast"
    seen: set[str] = set()

    def look(stage: str, done: int, total: int) -> None:
        seen.update(contents(fast) if fast.exists() else [])

    (tmp_path / "fast").mkdir()
    (tmp_path / "fast" / "precious.txt").write_text("mine")
    on_disk = take(source, tmp_path / "disk", ids, offload_states=str(fast), progress=look, **options)
    assert_same_totals(in_memory, on_disk)
    assert any(path.endswith("states-2.bin") for path in seen), seen
    assert contents(fast) == ["precious.txt"]


def interrupting(stage: str) -> Callable[[str, int, int], None]:
    def progress(now: str, done: int, total: int) -> None:
        if now.startswith(stage):
            raise KeyboardInterrupt

    return progress


FAILURES = [
    *(("model", stage) for stage in ("calibrate", "record", "forward", "head", "backward", "write")),
    *(("block", stage) for stage in ("record", "forward and backward")),
]


@pytest.mark.parametrize(("scope", "stage"), FAILURES)
@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_leaves_nothing(scope, stage, existing, llama, ids, tmp_path):
    fast, target = tmp_path / "fast", tmp_path / "gradients"
    fast.mkdir()
    if existing:
        take(llama, target, ids, only=["*.0.*"])
    held = target.read_bytes() if existing else None
    before = contents(tmp_path)
    options = {"scope": scope, "offload_states": str(fast), "overwrite": existing, "progress": interrupting(stage)}
    if stage == "calibrate":
        text = tmp_path.parent / "text.txt"
        text.write_text("words " * 1000)
        options |= {"calibration": str(text), "samples": 2, "length": 12, "tokenizer": Words()}
    with pytest.raises(KeyboardInterrupt):
        take(llama, target, ids, **options)
    assert contents(tmp_path) == before
    assert not existing or target.read_bytes() == held


class Words:
    """A tokenizer that knows one word."""

    name_or_path = "words"

    def __call__(self, text: Any, **_: Any) -> dict[str, Any]:
        one = [5] * 1000
        return {"input_ids": one if isinstance(text, str) else [one for _ in text]}


def test_a_full_disk_leaves_nothing(llama, ids, tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("secateur.files.writer.reserve", full)
    with pytest.raises(CheckpointError, match=r"cannot reserve [\d,]+ bytes \(No space left on device\)"):
        take(llama, tmp_path / "gradients", ids)
    assert contents(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norms": []}, "norm: got none, expected l1, l2 or both."),
        ({"batch_size": 0}, "--batch-size: got 0, expected at least 1."),
        ({"batch_size": -1}, "--batch-size: got -1, expected at least 1."),
        (
            {"calibration": torch.full((2, 1), 5)},
            "--length: got 1, expected at least 2: the loss is that of predicting the next token.",
        ),
    ],
    ids=["no norm", "batches of none", "batches of less", "one token"],
)
def test_mistakes(options, message, llama, ids, tmp_path):
    with pytest.raises(CalibrationError, match=pinned(message)):
        take(llama, tmp_path / "gradients", ids, **options)
    assert contents(tmp_path) == []


def test_one_glob_and_one_norm_need_no_list(llama, ids, tmp_path):
    one = take(llama, tmp_path / "one", ids, norms="l2", only="*.q_proj", skip="*.2.*")
    assert sorted(one.matrices) == [f"model.layers.{block}.self_attn.q_proj.weight" for block in (0, 1)]
    assert one.provenance["norms"] == ["l2"]


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


def assert_same_weights(one: Path, two: Path) -> None:
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


@each_norm
@each_pattern
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


# The command line


def test_the_command_writes_prints_and_tells(call, tmp_path):  # noqa: F811
    source = save_model(tmp_path / "model")
    out = tmp_path / "new" / "gradients.safetensors"
    told = call("gradients", source, "-o", out, "--norm", "l1,l2", *CALIBRATION)
    assert told.code == 0, told.err
    assert re.search(r"^forward, [\d.]+ s$", told.err, re.MULTILINE)
    assert re.search(r"^backward, [\d.]+ s$", told.err, re.MULTILINE)
    rows = [line.split() for line in told.out.splitlines()]
    for kind in ("self_attn.q_proj", "mlp.down_proj"):
        for norm in NORMS:
            assert any(row[:3] == [f"model.layers.*.{kind}.weight", "3", norm] for row in rows), told.out
    assert "4 samples of 32" in told.out
    assert "per sample, of the model" in told.out
    file = GradientFile(out)
    assert len(file.matrices) == 21
    assert file.provenance["norms"] == ["l1", "l2"]

    again = call("gradients", source, "-o", out, *CALIBRATION)
    assert again.code == 2
    assert again.message == f"Error: {out}: exists already. Choose another name, or pass --overwrite."
    as_json = call(
        "gradients",
        source,
        "-o",
        out,
        "--overwrite",
        "--json",
        "--granularity",
        "token",
        "--scope",
        "block",
        *CALIBRATION,
    )
    assert as_json.code == 0, as_json.err
    told = as_json.json
    assert (told["file"], told["matrices"]) == (str(out), 21)
    assert told | {"file": 0, "matrices": 0} == {"file": 0, "matrices": 0, **GradientFile(out).provenance}
    assert [told[key] for key in ("norms", "granularity", "scope", "samples")] == [["l1"], "token", "block", 4]


def test_pruning_from_the_command_line(call, tmp_path):  # noqa: F811
    source = save_model(tmp_path / "model")
    file = tmp_path / "gradients.safetensors"
    assert call("gradients", source, "-o", file, "--norm", "l1,l2", *CALIBRATION).code == 0
    gblm_l2 = ["--method", "gblm", "--norm", "l2", "--alpha", "50"]
    with_file = call("prune", source, "-o", tmp_path / "file", *gblm_l2, "--gradient", file, *CALIBRATION, "--json")
    assert with_file.code == 0, with_file.err
    assert with_file.json["settings"]["gradient"] == {"norm": "l2", "granularity": "sample", "scope": "model"}
    without = call("prune", source, "-o", tmp_path / "own", *gblm_l2, *CALIBRATION)
    assert without.code == 0, without.err
    assert re.search(r"^gradients: backward, [\d.]+ s$", without.err, re.MULTILINE)
    assert_same_weights(tmp_path / "file", tmp_path / "own")
    other = call("prune", source, "-o", tmp_path / "other", "--method", "gblm", "--gradient", file, *CALIBRATION)
    assert other.code == 0, other.err
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != (
        tmp_path / "own" / "model.safetensors"
    ).read_bytes()
    by_hyphen = call("prune", source, "-o", tmp_path / "plus", "--method", "wanda-plus", *CALIBRATION, "--json")
    assert by_hyphen.code == 0, by_hyphen.err
    assert by_hyphen.json["method"] == "wanda_plus"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "file",
        "gradients.safetensors",
        "model",
        "other",
        "own",
        "plus",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--method", "wanda", "--alpha", "3"],
            "Error: --alpha: the method wanda has no such option; gblm, gblm_inverse, wanda_plus do.",
        ),
        (
            ["--method", "magnitude", "--norm", "l1"],
            "Error: --norm: the method magnitude has no such option; gblm, gblm_inverse, gradient, pruner_zero do.",
        ),
        (["--method", "gblm", "--norm", "l3"], 'Error: norm: got "l3", expected l1 or l2.'),
    ],
)
def test_options_of_other_methods(arguments, message, call, tmp_path):  # noqa: F811
    (tmp_path / "model").mkdir()
    told = call("prune", tmp_path / "model", "-o", tmp_path / "out", *arguments)
    assert (told.code, told.message) == (2, message)


def test_a_norm_that_does_not_exist(call, tmp_path):  # noqa: F811
    told = call("gradients", tmp_path, "-o", tmp_path / "g", "--norm", "l1,l3")
    assert (told.code, told.message) == (2, 'Error: norm: got "l3", expected l1 or l2.')
