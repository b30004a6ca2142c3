"""Gradients by full autograd on the whole model, in float64, and gradient files to compare with them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

import secateur
import tiny
from secateur.collect.gradient_file import GradientFile
from secateur.core.gradients import GradientKind
from secateur.models.opening.opened import open_model

NORMS = ("l1", "l2")
SAMPLES, LENGTH = 3, 12
each_norm = pytest.mark.parametrize("norm", NORMS)


def pinned(message: str) -> str:
    return f"^{re.escape(message)}$"


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


def interrupting(stage: str) -> Callable[[str, int, int], None]:
    def progress(now: str, done: int, total: int) -> None:
        if now.startswith(stage):
            raise KeyboardInterrupt

    return progress


def assert_same_weights(one: Path, two: Path) -> None:
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
