"""What checkpoints hold, read by safetensors and transformers themselves, and which architectures are pruned how."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import tiny
from secateur.core.patterns import NM, Unstructured
from secateur.core.problem import Method, Problem, Solution
from secateur.core.statistics import SquaredNorm
from secateur.methods.wanda import wanda
from secateur.record.manifest import Manifest

NOT_STREAMED = {"hrm_text"}  # runs the same blocks several times; see test_stream.py
STREAMED = [name for name in tiny.ARCHITECTURES if name not in NOT_STREAMED]
# Matrices that no token ever reaches, by design: LongCat's zero experts only hand their input on.
NEVER_SEEN = {"longcat_flash": ["*.experts.4.*", "*.experts.5.*"]}
SAMPLES, LENGTH = 8, 32
PATTERNS = {"half": Unstructured(0.5), "2:4": NM(2, 4)}


def calibration() -> Tensor:
    """256 tokens: enough for every expert to see some."""
    return tiny.tokens(samples=SAMPLES, length=LENGTH)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, by safetensors itself."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            tensors.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118
    return tensors


def file_hashes(folder: Path) -> dict[str, str]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def same_bytes(one: Tensor, two: Tensor) -> bool:
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), two.contiguous().view(-1).view(torch.uint8))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize])


def stored(tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> Tensor:
    """The (out, in) matrix that a manifest entry speaks of."""
    tensor = tensors[entry["tensor"]]
    tensor = tensor if entry["index"] is None else tensor[entry["index"]]
    return tensor.t() if entry["transposed"] else tensor


def masks(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    tensors = read_tensors(folder)
    return {name: stored(tensors, entry) != 0 for name, entry in manifest.matrices.items()}


def load(folder: Path, **kwargs: Any) -> PreTrainedModel:
    """The model as transformers loads it, nothing missing and nothing unexpected, experts one by one."""
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(told.values()), told
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model.eval()


def assert_same_tensors(one: Path, two: Path) -> None:
    first, second = read_tensors(one), read_tensors(two)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert same_bytes(tensor, second[name]), name


def recording(statistics: dict[str, tuple[Tensor, int, int]], method: Method | None = None) -> Method:
    """Wanda, which leaves (sum of squares, tokens, samples) of every matrix in `statistics`."""
    inner = method or wanda()

    def solve(problem: Problem) -> Solution:
        statistic = problem.statistic(SquaredNorm)
        statistics[problem.name] = (statistic.total.clone(), statistic.tokens, statistic.samples)
        return inner.solve(problem)

    return Method("recording", solve, inner.needs, inner.per)


def moe_inputs(model: PreTrainedModel, module: nn.Module, ids: Tensor) -> Tensor:
    """What goes into a module, as (tokens, hidden)."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids, use_cache=False)
    handle.remove()
    assert len(seen) == 1
    return seen[0].reshape(-1, seen[0].shape[-1])


def squares(x: Tensor) -> Tensor:
    return x.double().square().sum(dim=0)
